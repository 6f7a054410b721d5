"""``nest-fn pretrain`` from outside: what it leaves behind; nothing but the config decides it (levels R0 to R2)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nest_fn.train.cli.main import main
from tests.train.conftest import Corpus

STEPS = 24


def words(corpus: Corpus, run: Path, *overrides: str) -> list[str]:
    """A command line for some seconds of training."""
    data = [f"data.train={corpus.train}", f"data.valid={corpus.valid}", f"data.noise={corpus.noise}"]
    sizes = ["data.batch_seconds=8", "data.max_duration=8", "encoder.n_layers=1", "encoder.subsampling_conv_channels=8"]
    often = ["trainer.log_every=5", "trainer.valid_every=9", "trainer.save_every=6", "trainer.keep_last=9"]
    return [
        "pretrain",
        "-c",
        "tiny",
        "--folder",
        str(run),
        *data,
        *sizes,
        f"trainer.max_steps={STEPS}",
        *often,
        *overrides,
    ]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Its lines, times aside."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def checkpoints(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint."""
    files = sorted(path for path in (run / "checkpoints").rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def started(argv: list[str], program: tuple[str, ...] = ("nest_fn.train",)) -> subprocess.Popen[str]:
    """The command, or another program with its words, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *program, *argv]
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen(command, cwd=root, env=environment, text=True, stderr=subprocess.PIPE)


def until(found: Path, process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Wait for a file."""
    end = time.monotonic() + seconds
    while not found.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{found} never came"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def reference(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main(words(corpus, run)) == 0
    return run


def assert_same(run: Path, reference: Path) -> None:
    """Metrics and every checkpoint that both still have are equal to the last bit."""
    assert metrics(run) == metrics(reference)
    ours, theirs = checkpoints(run), checkpoints(reference)
    assert f"checkpoints/step_{STEPS:08d}/meta.json" in ours
    assert not [name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]]


def test_what_a_run_leaves_behind(reference: Path, corpus: Corpus) -> None:
    names = {path.name for path in reference.iterdir()} - {"tensorboard"}
    texts = {"config.yaml", "command.txt", "environment.json", "data.json", "metrics.jsonl", "log.txt"}
    assert names == texts | {"checkpoints"}
    assert (reference / "config.yaml").read_text().count("max_steps: 24") == 1
    data = json.loads((reference / "data.json").read_text())
    assert data["train"]["files"] == [corpus.train] and len(data["train"]["digest"]) == 64
    assert json.loads((reference / "environment.json").read_text())["torch"].startswith("2.")
    assert [path.name for path in sorted((reference / "checkpoints").iterdir())] == [
        f"step_{step:08d}" for step in (6, 12, 18, 24)
    ]


def test_what_is_measured(reference: Path) -> None:
    lines = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if "valid" not in line]
    assert [line["step"] for line in train] == [5, 10, 15, 20, 24]
    assert [line["step"] for line in lines if "valid" in line] == [9, 18, 24]
    wanted = {"step", "epoch", "loss", "accuracy", "unigram_accuracy", "masked_share", "masked_tokens", "coverage"}
    wanted |= {"perplexity", "overflow", "skipped", "lr", "grad_norm", "param_norm", "padding_efficiency", "time"}
    for line in train:
        assert line.keys() == wanted
        assert 0 < line["masked_share"] < 1 and 0 < line["coverage"] <= 1 <= line["perplexity"] <= 64
        assert line["loss"] > 0 < line["grad_norm"] and 0.5 < line["padding_efficiency"] <= 1
        assert line["time"]["audio_seconds_per_second"] > 0
    valid = next(line["valid"] for line in lines if "valid" in line)
    assert {"loss", "accuracy", "unigram_accuracy", "unmasked_accuracy", "coverage"} <= valid.keys()


@pytest.mark.parametrize("override", ["trainer.seed=0", "data.num_workers=2", "data.prefetch=1"])
def test_the_same_run_again_is_the_same_to_the_bit(
    corpus: Corpus, tmp_path: Path, reference: Path, override: str
) -> None:
    assert main(words(corpus, tmp_path / "run", override)) == 0
    assert checkpoints(tmp_path / "run").keys() == checkpoints(reference).keys()
    assert_same(tmp_path / "run", reference)


def test_another_seed_is_another_run(corpus: Corpus, tmp_path: Path, reference: Path) -> None:
    assert main(words(corpus, tmp_path / "run", "trainer.seed=1")) == 0
    assert metrics(tmp_path / "run") != metrics(reference)


def test_how_often_is_looked_changes_nothing(corpus: Corpus, tmp_path: Path, reference: Path) -> None:
    blind = ["trainer.log_every=0", "trainer.valid_every=0", "trainer.save_every=0", "data.valid="]
    assert main(words(corpus, tmp_path / "run", *blind)) == 0
    ours, theirs = checkpoints(tmp_path / "run"), checkpoints(reference)
    assert {name.split("/")[1] for name in ours} == {f"step_{STEPS:08d}"}
    tensors = [
        name for name in ours if name.startswith(f"checkpoints/step_{STEPS:08d}/") and name.endswith((".pt", "s"))
    ]
    tensors = [name for name in tensors if "window" not in name]
    assert len(tensors) >= 4 and all(ours[name] == theirs[name] for name in tensors)


def test_killed_and_started_again(corpus: Corpus, tmp_path: Path, reference: Path) -> None:
    run = tmp_path / "run"
    with started(words(corpus, run)) as process:
        until(run / "checkpoints" / "step_00000012" / "meta.json", process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert (run / "lock").exists() and len(metrics(run)) < len(metrics(reference))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # a line that the kill cut short
    assert main(words(corpus, run, "data.num_workers=2")) == 0
    assert_same(run, reference)
    assert not (run / "lock").exists()


def test_asked_to_stop_and_started_again(corpus: Corpus, tmp_path: Path, reference: Path) -> None:
    run = tmp_path / "run"
    with started(words(corpus, run)) as process:
        until(run / "checkpoints" / "step_00000006" / "meta.json", process)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "asked to stop: saved at step" in told and "Traceback" not in told
    assert main(words(corpus, run, "--resume", "must")) == 0
    assert_same(run, reference)


def test_killed_before_the_first_checkpoint(corpus: Corpus, tmp_path: Path, reference: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "command.txt").touch()
    (run / "metrics.jsonl").write_text((reference / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    assert main(words(corpus, run)) == 0
    assert_same(run, reference)


def test_one_writer_a_folder(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with started(words(corpus, run, "trainer.max_steps=1500")) as process:
        until(run / "metrics.jsonl", process)
        assert main(words(corpus, run)) == 4
        assert f"process {process.pid} on" in capsys.readouterr().err
        assert process.poll() is None and (run / "lock").exists()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert not (run / "lock").exists()


def test_two_micro_batches_see_the_same_tokens(corpus: Corpus, tmp_path: Path, reference: Path) -> None:
    assert main(words(corpus, tmp_path / "run", "trainer.accumulate=2", "data.row_multiple=1")) == 0
    ours, theirs = metrics(tmp_path / "run"), metrics(reference)
    for one, other in zip(ours, theirs, strict=True):
        one, other = one.get("valid", one), other.get("valid", other)
        assert all(one[name] == other[name] for name in ("masked_tokens", "masked_share", "coverage", "perplexity"))


def test_shards_train_as_files_do(corpus: Corpus, tmp_path: Path, reference: Path) -> None:
    assert main(["data", "shard", corpus.train, "--out", str(tmp_path / "tar"), "--shards", "3"]) == 0
    (manifest,) = (tmp_path / "tar").glob("*.jsonl")
    sharded = [f"data.train={manifest}", f"data.train_shards={tmp_path}/tar/audio_{{0..2}}.tar"]
    assert main(words(corpus, tmp_path / "run", *sharded)) == 0
    assert metrics(tmp_path / "run") == metrics(reference)


def test_rooms(corpus: Corpus, tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rooms = ["data.augment.rir_prob=0.5", "trainer.max_steps=5"]
    assert main(words(corpus, tmp_path / "none", *rooms)) == 2
    assert "data.rir names no manifest" in capsys.readouterr().err
    assert main(words(corpus, tmp_path / "run", *rooms, f"data.rir={corpus.rir}")) == 0
    assert metrics(tmp_path / "run")[0]["loss"] != metrics(reference)[0]["loss"]


def test_a_warning_comes_once_until_its_cause_has_gone(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = ["masking.mask_prob=0", "trainer.log_every=1", "trainer.max_steps=4", "trainer.save_every=2"]
    assert main(words(corpus, tmp_path / "run", *blind)) == 0
    assert capsys.readouterr().err.count("no token was masked") == 1
    assert all(line.get("valid", line)["loss"] == 0 for line in metrics(tmp_path / "run"))


def test_tensorboard_shows_the_metrics_and_changes_nothing(
    corpus: Corpus, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert main(words(corpus, tmp_path / "without")) == 0
    assert not (tmp_path / "without" / "tensorboard").exists()
    assert_same(tmp_path / "without", reference)
    pytest.importorskip("tensorboard", reason="the optional package tensorboard draws curves")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(reference / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    wanted = {line["step"]: line["loss"] for line in metrics(reference) if "loss" in line}
    assert losses == pytest.approx(wanted, rel=1e-6)
    assert {event.step for event in events.Scalars("valid/accuracy")} == {9, 18, 24}

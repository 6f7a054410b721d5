"""Fine-tuning through the command line: it learns, refuses, goes on after a kill to the byte, and transcribes."""

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
import torch

from nest_fn.checkpoint.folder import read_checkpoint
from nest_fn.checkpoint.model_files import load
from nest_fn.layers.tree import flatten
from nest_fn.train.cli.main import main
from nest_fn.train.ctc.model_files import load_recogniser
from nest_fn.train.finetune import loop
from nest_fn.train.run import device

from .conftest import finetuning, write_lines

ROOT = Path(__file__).resolve().parents[3]
Captured = pytest.CaptureFixture[str]


def entries(spoken: Path, **changes: Any) -> list[dict[str, object]]:
    """Four lines with absolute paths."""
    lines = [json.loads(line) for line in (spoken / "all.jsonl").read_text().splitlines()[:4]]
    return [line | {"audio_filepath": str(spoken / line["audio_filepath"])} | changes for line in lines]


def measured(out: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of the metrics without their times."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines if kind in line]


def checkpoints(out: Path) -> dict[str, bytes]:
    """All files of the checkpoints and of the best model."""
    found = (path for name in ("checkpoints", "model") for path in (out / name).rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


@pytest.fixture(scope="module")
def trained(spoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recogniser that has learnt its corpus by heart."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert main(finetuning(spoken, out, "trainer.max_steps=60", "trainer.valid_every=20", "trainer.save_every=30")) == 0
    return out


def test_learns_by_heart_and_keeps_the_best(spoken: Path, trained: Path) -> None:
    validations = [(line["step"], line["valid"]) for line in measured(trained, "valid")]
    assert [step for step, _ in validations] == [20, 40, 60]
    made, meta = load_recogniser(trained)
    best = min(validations, key=lambda one: (one[1]["cer"], one[1]["loss"], one[0]))
    assert meta["step"] == best[0] and meta["valid"] == best[1] and best[1]["cer"] < 0.1
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["step_00000030", "step_00000060"]
    before, now = (flatten(tree) for tree in (load(spoken / "model")[0], made.params))
    assert not torch.equal(before["encoder.layers.0.attention.query.weight"],
                           now["encoder.layers.0.attention.query.weight"])  # fmt: skip
    assert torch.equal(before["decoder.weight"], now["decoder.weight"])
    assert len(measured(trained, "lr")) == 6 and (trained / "log.txt").read_text().count("validation:") == 3


def test_transcribes(spoken: Path, trained: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "found.jsonl"
    command = ["transcribe", str(trained), str(spoken / "all.jsonl"), "--out", str(out), "data.num_workers=1"]
    assert main(command) == 0
    _, meta = load_recogniser(trained)
    told = capsys.readouterr().out
    assert f"CER {meta['valid']['cer']:.4f}  WER {meta['valid']['wer']:.4f}  over 24 utterances, 24 words" in told
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [Path(line["audio_filepath"]).name for line in lines] == [f"{index}.wav" for index in range(24)]
    right = [line for line in lines if line["text"] == line["reference"] == "ab"]
    assert right and all("".join(token["token"] for token in line["tokens"]) == "ab" for line in right)
    for line in right:
        first, second = line["tokens"]
        assert 0 <= first["start"] < first["end"] <= second["start"] < second["end"] <= 1.05
    assert main(command) == 0 and "finished" in capsys.readouterr().out
    assert main(["data", "validate", str(out)]) == 0
    assert main([*command, "data.min_duration=1"]) == 2
    assert "transcribe: data.min_duration has no effect" in capsys.readouterr().err
    assert main([*command, "data.channel=first"]) == 2
    assert "was made of something else (channel" in capsys.readouterr().err
    assert main(["transcribe", str(trained), str(spoken / "0.wav")]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert alone["text"] == lines[0]["text"] and "reference" not in alone
    assert main(["transcribe", str(spoken / "model"), str(spoken / "0.wav")]) == 4
    assert main(["transcribe", str(trained), str(spoken / "0.wav"), "optim.lr=1"]) == 2
    assert "transcribe: optim.lr has no effect" in capsys.readouterr().err


def test_transcription_goes_on_where_it_was_stopped(
    spoken: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    from nest_fn.train.downstream import transcribe

    words = ["transcribe", str(trained), str(spoken / "all.jsonl"), "data.batch_seconds=6"]
    assert main([*words, "--out", str(tmp_path / "whole.jsonl")]) == 0
    real, seen = transcribe._recognised, []

    def stopping(*args: Any) -> Any:
        seen.append(len(args[3]))
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(transcribe, "_recognised", stopping)
    cut = [*words, "--out", str(tmp_path / "cut.jsonl")]
    assert main(cut) == 75 and not (tmp_path / "cut.jsonl").exists()
    first = sum(seen)
    assert 0 < first < 24
    assert main(cut) == 0 and sum(seen) == 24
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not list(tmp_path.glob(".*.part"))


# All that can change at once: frozen steps, masks, weighted layers, micro-batches, dropout.
EVERYTHING = (
    "trainer.max_steps=20", "trainer.valid_every=5", "trainer.save_every=4", "trainer.log_every=3",
    "trainer.accumulate=2", "encoder.dropout=0.1", "--frozen-steps", "4", "--layer", "weighted", "--time-masks", "1",
    "--freq-masks", "1", "--encoder-lr", "0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(spoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(finetuning(spoken, out, *EVERYTHING)) == 0
    return out


def assert_same(cut: Path, whole: Path) -> None:
    assert checkpoints(cut) == checkpoints(whole)
    for kind in ("valid", "lr"):
        assert measured(cut, kind) == measured(whole, kind)
    assert "resumed at step" in (cut / "log.txt").read_text()


def test_a_killed_run_goes_on_to_the_byte(spoken: Path, whole: Path, tmp_path: Path) -> None:
    command = finetuning(spoken, tmp_path / "cut", *EVERYTHING)
    process = subprocess.Popen([sys.executable, "-m", "nest_fn.train", *command], cwd=ROOT, stderr=subprocess.PIPE,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})  # fmt: skip
    metrics, deadline = tmp_path / "cut" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert main(command) == 0
    assert_same(tmp_path / "cut", whole)


@pytest.mark.parametrize("where", ["validate", "with_targets"])
def test_a_stopped_run_goes_on_to_the_byte(
    spoken: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Stopped in a validation, which is given up, and between two checkpoints, where one is made that is passing."""
    real, calls = getattr(loop, where), []

    def stopping(*args: Any) -> Any:
        calls.append(where)
        if len(calls) == (2 if where == "validate" else 13):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(loop, where, stopping)
    command = finetuning(spoken, tmp_path / "cut", *EVERYTHING)
    assert main(command) == 75
    assert main(command) == 0
    assert_same(tmp_path / "cut", whole)


def test_a_frozen_encoder_stands_still(spoken: Path, tmp_path: Path) -> None:
    assert main(finetuning(spoken, tmp_path / "out", "trainer.max_steps=3", "--frozen-steps", "all")) == 0
    trees, _, _ = read_checkpoint(tmp_path / "out" / "checkpoints" / "step_00000003")
    params, state, _ = load(spoken / "model")
    for tree, other in ((trees["params"], params), (trees["state"], state)):
        assert all(torch.equal(leaf, flatten(other)[path]) for path, leaf in flatten(tree).items())


def test_an_inner_layer_leaves_those_above_alone(spoken: Path, tmp_path: Path) -> None:
    assert main(finetuning(spoken, tmp_path / "out", "trainer.max_steps=3", "--layer", "0")) == 0
    made, _ = load_recogniser(tmp_path / "out")
    before, now = flatten(load(spoken / "model")[0]), flatten(made.params)
    moved = {path for path, leaf in now.items() if not torch.equal(leaf, before[path])}
    assert any(path.startswith("encoder.layers.0.") for path in moved)
    assert not any(path.startswith(("encoder.layers.1.", "decoder")) for path in moved)
    assert main(["extract", str(tmp_path / "out" / "model"), str(spoken / "0.wav"), "--out", str(tmp_path / "x")]) == 0


def precision(words: tuple[str, ...]) -> str:
    return "bf16" if "trainer.precision=bf16" in words else "fp32"


def test_precision_and_scratch_change_the_result(spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "check_precision", lambda *_: None)  # this CPU may have no bfloat16, which is slow
    found = {}
    for name, more in {"plain": (), "bf16": ("trainer.precision=bf16",), "scratch": ("--from-scratch",)}.items():
        assert main(finetuning(spoken, tmp_path / name, "trainer.max_steps=2", *more)) == 0
        found[name] = measured(tmp_path / name, "valid")[-1]["valid"]["loss"]
        assert main(["transcribe", str(tmp_path / name), str(spoken / "0.wav"), f"trainer.precision={precision(more)}",
                     "--out", str(tmp_path / f"{name}.jsonl")]) == 0  # fmt: skip
    assert len(set(found.values())) == 3


LONG = "abababababababababababab"


@pytest.mark.parametrize(
    "changes, code, told",
    [
        ([{"text": LONG}] * 4, 3, ["none is left: 4 lines that need more frames of 80 ms than their", "--tokens"]),
        ([{"text": LONG}] * 2 + [{}] * 2, 3, ["2 of 4 lines cannot be learnt from", "--most-left-out 0.50"]),
        ([{"text": LONG}] + [{}] * 3, 0, ["left out of training: 1 line that need", "l.jsonl:1 (24 for 13)"]),
        ([{"text": ""}, {"text": "  "}, {"text": 7}, {}], 0,
         ["2 lines with an empty text: ", "1 line whose text is no string: ", "l.jsonl:3 (int 7)"]),
        ([{"text": None}] * 4, 3, ["none is left: 4 lines without a 'text'"]),
    ],
)  # fmt: skip
def test_transcripts_that_cannot_be_learnt_from(
    spoken: Path, tmp_path: Path, capsys: Captured, changes: list[dict[str, object]], code: int, told: list[str]
) -> None:
    lines = [line | change for line, change in zip(entries(spoken), changes, strict=True)]
    write_lines(tmp_path / "l.jsonl", lines)
    command = finetuning(spoken, tmp_path / "out", "trainer.max_steps=1", train=tmp_path / "l.jsonl")
    assert main(command) == code
    err = capsys.readouterr().err
    assert all(text in err for text in told), err
    assert (tmp_path / "out").exists() == (code == 0)


def test_characters_of_validation_alone_are_told_before_the_first_step(
    spoken: Path, tmp_path: Path, capsys: Captured
) -> None:
    write_lines(tmp_path / "v.jsonl", entries(spoken, text="ab!"))
    command = finetuning(spoken, tmp_path / "out", "trainer.max_steps=1", valid=tmp_path / "v.jsonl")
    assert main(command) == 0
    err = capsys.readouterr().err
    told = "in validation's error rates, and not in its loss: 4 lines with what is no token ('!')"
    assert err.index(told) < err.index("step 1/1")
    assert measured(tmp_path / "out", "valid")[0]["valid"].keys() == {"cer", "wer"}
    assert "validation: no text that can be aligned  CER" in err
    (tmp_path / "t.txt").write_text("a\n")
    assert main(finetuning(spoken, tmp_path / "o2", "--tokens", str(tmp_path / "t.txt"))) == 3
    assert "24 lines with what is no token ('b')" in capsys.readouterr().err and not (tmp_path / "o2").exists()


def test_pieces_are_the_default(spoken: Path, tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("sentencepiece", reason="the optional package sentencepiece makes pieces")
    command = finetuning(spoken, tmp_path / "out", "trainer.max_steps=1", "--pieces", "8")
    command = command[: command.index("--pieces")]
    assert main(command) == 0
    assert "tokens (sentencepiece)" in capsys.readouterr().err and (tmp_path / "out" / "tokenizer.model").exists()
    assert main(["transcribe", str(tmp_path / "out"), str(spoken / "0.wav")]) == 0


@pytest.mark.parametrize(
    "override, told",
    [
        ("encoder.n_layers=7", "encoder.n_layers is 7, the checkpoint's model has "),
        ("sample_rate=8000", "sample_rate is 8000, the checkpoint's model has 16000"),
        ("trainer.ema_decay=0.9", "trainer.ema_decay has no effect"),
        ("data.augment.prob=0.1", "data.augment.prob has no effect"),
        ("data.augment.prob=0.5", "data.augment.prob has no effect"),
        ("masking.mask_prob=0.1", "masking.mask_prob has no effect"),
        ("data.valid=[]", "data.valid names no manifest"),
    ],
)
def test_what_would_be_in_vain_is_refused(
    spoken: Path, tmp_path: Path, override: str, told: str, capsys: Captured
) -> None:
    assert main(finetuning(spoken, tmp_path / "out", override)) == 2
    assert f"error: finetune-ctc: {told}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_folder_remembers_what_it_was_made_from(spoken: Path, trained: Path, capsys: Captured) -> None:
    first = checkpoints(trained)
    same = ["trainer.max_steps=60", "trainer.valid_every=20", "trainer.save_every=30"]
    assert main(finetuning(spoken, trained, *same)) == 0 and "finished" in capsys.readouterr().err
    for more, told in (("trainer.seed=1", "trainer.seed was 0, is 1"), ("--encoder-lr=0.5", "recipe.encoder_lr was")):
        assert main(finetuning(spoken, trained, *same, more)) == 2
        assert told in capsys.readouterr().err
    assert checkpoints(trained) == first

"""Requests to stop, wherever they come: the run ends at once, saved, and goes on to the same bits (faults F1, F2)."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from nest_fn.checkpoint.folder import read_meta
from nest_fn.train.cli.main import _parser, main, read_config
from nest_fn.train.run.pretrain import pretrain
from nest_fn.train.run.record.run_folder import RunFolder
from tests.train.conftest import Corpus
from tests.train.run.reporters import At
from tests.train.run.test_pretrain import checkpoints, metrics, started, until, words

OFTEN = ["trainer.log_every=1", "trainer.valid_every=6", "trainer.save_every=3", "trainer.keep_last=2"]
OFTEN += ["trainer.keep_best=1", "trainer.keep_every=12"]


HANGING = ("tests.train.hanging",)
"""Storage on which some files never open."""


def signals(step: int, number: int) -> At:
    """A reporter by which this process is asked to stop as soon as a line of metrics has come."""
    return At(step, lambda: os.kill(os.getpid(), number))


@pytest.fixture(scope="module")
def reference(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("kept") / "undisturbed"
    assert main(words(corpus, run, *OFTEN)) == 0
    return run


def steps(run: Path) -> list[int]:
    """Of its checkpoints."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def test_which_checkpoints_are_kept(reference: Path) -> None:
    losses = {line["step"]: line["valid"]["loss"] for line in metrics(reference) if "valid" in line}
    assert steps(reference) == sorted({21, 24, 12, min(losses, key=lambda step: losses[step])})
    for step in steps(reference):
        assert read_meta(reference / "checkpoints" / f"step_{step:08d}")["meta"].get("valid_loss") == losses.get(step)


@pytest.mark.parametrize("step", [4, 6, 18, 23])
def test_stopped_before_a_validation_or_between_two_saves(
    corpus: Corpus, tmp_path: Path, reference: Path, step: int
) -> None:
    run, reporter = tmp_path / "run", signals(step, signal.SIGUSR1)
    cfg = read_config(_parser().parse_args(words(corpus, run, *OFTEN)))
    assert pretrain(cfg, RunFolder(run), reporter) == 75
    assert f"asked to stop: saved at step {step}; the same command goes on from there" in reporter.told
    assert steps(run)[-1] == step
    assert main(words(corpus, run, *OFTEN)) == 0
    assert metrics(run) == metrics(reference)
    assert checkpoints(run) == checkpoints(reference)


def test_the_best_wants_a_validation(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(corpus, tmp_path / "run", "trainer.keep_best=1", "data.valid=")) == 2
    assert "trainer.keep_best is 1 and data.valid names no manifest" in capsys.readouterr().err


def _asked(process: subprocess.Popen[str], number: int, seconds: float = 10.0) -> str:
    """What a process tells that is asked to stop, and must within some seconds."""
    process.send_signal(number)
    try:
        return process.communicate(timeout=seconds)[1]
    finally:
        process.kill()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_stopped_while_the_first_batch_is_awaited(corpus: Corpus, tmp_path: Path, number: int, code: int) -> None:
    run = tmp_path / "run"
    late = ["data.check_files=false", "data.num_workers=2"]
    with started(words(corpus, run, *late), (*HANGING, r"train\d+\.wav")) as process:
        until(run / "data.json", process)  # written when data is open, before the first batch
        time.sleep(1.0)
        told = _asked(process, number)
    assert process.returncode == code and "saved at step 0" in told and "Traceback" not in told
    assert steps(run) == [0]
    again = words(corpus, run, "trainer.max_steps=6", "trainer.valid_every=0")
    assert main([*again, "--resume", "must"]) == 0
    assert steps(run) == [6]


def test_stopped_while_validation_waits_for_data(corpus: Corpus, tmp_path: Path) -> None:
    run, often = tmp_path / "run", ["trainer.valid_every=2", "trainer.log_every=2"]
    late = ["data.check_files=false", "data.num_workers=2"]
    with started(words(corpus, run, *often, *late), (*HANGING, r"valid\d+\.wav")) as process:
        until(run / "metrics.jsonl", process)
        time.sleep(1.0)
        told = _asked(process, signal.SIGTERM)
    assert process.returncode == 75 and "saved at step 2" in told and "Traceback" not in told
    assert not [line for line in metrics(run) if "valid" in line]


def test_stopped_while_data_is_opened(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(words(corpus, run), (*HANGING, r"train\.jsonl")) as process:
        until(run / "lock", process)
        time.sleep(1.0)
        told = _asked(process, signal.SIGTERM)
    assert process.returncode == 75 and "while data was opened, nothing to save" in told and "Traceback" not in told
    assert not run.exists()

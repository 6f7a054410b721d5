"""Checkpoints are written beside the steps: at most one at a time, to the same bytes, and nothing of one is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.train.cli.main import _parser, main, read_config
from nest_fn.train.errors import CheckpointError
from nest_fn.train.run import endings, saving
from nest_fn.train.run.pretrain import pretrain
from nest_fn.train.run.record.background import BackgroundSave, Warn
from nest_fn.train.run.record.progress import Progress
from nest_fn.train.run.record.run_folder import RunFolder
from nest_fn.train.step.step import init_train_state
from tests.train.conftest import Corpus
from tests.train.run.reporters import At
from tests.train.run.test_pretrain import checkpoints, metrics, words

OFTEN = ["trainer.log_every=1", "trainer.valid_every=0", "trainer.save_every=4", "trainer.max_steps=12"]
OFTEN += ["data.num_workers=0"]
PATIENCE = 60.0  # seconds


def _refuse(text: str) -> None:
    raise AssertionError(f"nothing was to be told: {text}")


def test_at_most_one_and_what_it_says_comes_when_asked_for() -> None:
    background, go, told = BackgroundSave(), threading.Event(), list[str]()

    def save(warn: Warn) -> None:
        assert go.wait(PATIENCE)
        warn("slow")

    background.begin(save)
    with pytest.raises(RuntimeError, match="before the one before"):
        background.begin(save)
    background.report(_refuse)
    assert background.running and not background.finish(_refuse, 0.01)
    go.set()
    assert background.finish(told.append) and told == ["slow"] and not background.running
    background.report(_refuse)  # once alone
    background.begin(lambda warn: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        background.finish(_refuse)
    assert background.finish(_refuse)


def test_the_copy_shares_no_memory(corpus: Corpus, tmp_path: Path) -> None:
    cfg = read_config(_parser().parse_args(words(corpus, tmp_path, "trainer.ema_decay=0.9")))
    progress = Progress(init_train_state(random.key(0), cfg), 1, 2, {"loss": torch.ones(1)}, 3)
    copied = saving._copied(progress)
    assert (copied.epoch, copied.batch, copied.skipped) == (1, 2, 3)
    ours, theirs = _leaves(progress), _leaves(copied)
    assert ours.keys() == theirs.keys() and len(ours) > 50
    for name, leaf in ours.items():
        assert torch.equal(leaf, theirs[name]) and leaf.data_ptr() != theirs[name].data_ptr(), name


def _leaves(progress: Progress) -> dict[str, torch.Tensor]:
    trees = {"params": progress.ts.params, "state": progress.ts.state, "ema": progress.ts.ema}
    return flatten({**trees, **progress.ts.opt_state._asdict(), "window": dict(progress.window)})


@pytest.fixture(scope="module")
def reference(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("saved") / "undisturbed"
    assert main(words(corpus, run, *OFTEN)) == 0
    return run


Write = Callable[..., None]


def _instead(monkeypatch: pytest.MonkeyPatch, write: Callable[[Write, Path, Any], None]) -> None:
    """Have checkpoints written by ``write(original, path, arguments)``."""
    original = checkpoint_folder.write_checkpoint
    monkeypatch.setattr(
        checkpoint_folder,
        "write_checkpoint",
        lambda path, *args, **options: write(lambda: original(path, *args, **options), path, args),
    )


def _run(corpus: Corpus, run: Path, reporter: At) -> int:
    cfg = read_config(_parser().parse_args(words(corpus, run, *OFTEN)))
    return pretrain(cfg, RunFolder(run), reporter)


def _until_measured(run: Path, step: int) -> None:
    end = time.monotonic() + PATIENCE
    while metrics(run)[-1]["step"] < step:
        assert time.monotonic() < end
        time.sleep(0.005)


def test_steps_go_on_meanwhile_and_the_bytes_are_the_same(
    corpus: Corpus, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, beside = tmp_path / "run", []

    def late(write: Write, path: Path, args: Any) -> None:
        beside.append(threading.current_thread() is not threading.main_thread())
        if beside[-1]:
            _until_measured(run, int(path.name[5:]) + 3)  # the train state is another one by now
        write()

    _instead(monkeypatch, late)
    assert _run(corpus, run, At(0, lambda: None)) == 0
    assert beside == [True, True, False]  # the last one is waited for
    assert checkpoints(run) == checkpoints(reference) and metrics(run) == metrics(reference)


def test_a_stop_is_asked_for_while_one_is_written(
    corpus: Corpus, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def late(write: Write, path: Path, args: Any) -> None:
        _until_measured(run, 6)
        write()

    with monkeypatch.context() as patched:
        _instead(patched, late)
        reporter = At(6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert _run(corpus, run, reporter) == 75
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000004", "step_00000006"]
    assert main(words(corpus, run, *OFTEN)) == 0
    assert checkpoints(run) == checkpoints(reference) and metrics(run) == metrics(reference)


def test_what_fails_is_told_at_a_later_step_and_the_run_goes_on(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(write: Write, path: Path, args: Any) -> None:
        if path.name == "step_00000004":
            raise CheckpointError("no room")
        write()

    _instead(monkeypatch, fails)
    reporter = At(0, lambda: None)
    assert _run(corpus, tmp_path / "run", reporter) == 0
    assert "step 4: no room" in reporter.told
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_00000008",
        "step_00000012",
    ]


def test_a_bug_in_it_ends_the_run_saved(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(write: Write, path: Path, args: Any) -> None:
        if path.name == "step_00000004":
            raise ZeroDivisionError("a bug")
        write()

    _instead(monkeypatch, fails)
    reporter = At(0, lambda: None)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        _run(corpus, tmp_path / "run", reporter)
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert reporter.told[-1] == f"saved at step {int(saved.name[5:])}; the same command goes on from there"


def test_an_end_that_is_wanted_at_once_waits_a_moment_alone(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()
    _instead(monkeypatch, lambda _, path, args: None if never.wait(PATIENCE) else pytest.fail(path.name))
    monkeypatch.setattr(endings, "_MOMENT", 0.05)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    reporter, started = At(6, twice), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        _run(corpus, tmp_path / "run", reporter)
    assert time.monotonic() - started < PATIENCE
    never.set()
    told = "step 6 is not saved: the end was wanted at once; the newest checkpoint is that of step 0"
    assert reporter.told[-1] == told


def test_without_memory_for_a_copy_it_is_written_at_once(
    corpus: Corpus, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(progress: Progress) -> Progress:
        raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")

    beside = []

    def written(write: Write, path: Path, args: Any) -> None:
        beside.append(threading.current_thread() is not threading.main_thread())
        write()

    _instead(monkeypatch, written)
    monkeypatch.setattr(saving, "_copied", no_room)
    assert _run(corpus, tmp_path / "run", At(0, lambda: None)) == 0
    assert beside == [False] * 3 and checkpoints(tmp_path / "run") == checkpoints(reference)

"""Every end of a run but a kill leaves a checkpoint of the last finished step, or says why not; none costs a bit."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from nest_fn.layers import random
from nest_fn.train.cli.main import _parser, main, read_config
from nest_fn.train.errors import DataError, MemoryExhausted
from nest_fn.train.run.pretrain import pretrain
from nest_fn.train.run.record.run_folder import RunFolder
from nest_fn.train.step.step import OVERWRITTEN, init_train_state, make_step
from tests.train.conftest import Corpus
from tests.train.run.reporters import At
from tests.train.run.test_pretrain import metrics, started, until, words
from tests.train.run.test_speech import ENDLESS, log, logged_steps, saved_steps

OFTEN = ["trainer.log_every=1", "data.num_workers=0"]


def _run(argv: list[str], reporter: At) -> int:
    args = _parser().parse_args(argv)
    return pretrain(read_config(args), RunFolder(args.folder), reporter)


@pytest.fixture(scope="module")
def data(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the corpus that may be spoilt."""
    folder = tmp_path_factory.mktemp("spoilt") / "data"
    shutil.copytree(Path(corpus.train).parent, folder)
    return folder


@pytest.fixture(scope="module")
def reference(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main(words(corpus, run, *OFTEN)) == 0
    return run


@pytest.mark.parametrize("policy", ["raise", "zero_weight"])
def test_a_file_that_goes_in_the_middle(
    corpus: Corpus, data: Path, tmp_path: Path, reference: Path, policy: str
) -> None:
    """At step 8 an epoch is over; in the next one the file is wanted again."""
    run, file = tmp_path / "run", data / "train3.wav"
    limit = [f"data.on_error={policy}", "data.max_bad_fraction=0"]
    argv = words(corpus, run, *OFTEN, f"data.train={data / 'train.jsonl'}", *limit)
    reporter = At(8, lambda: file.rename(tmp_path / "away.wav"))
    with pytest.raises(DataError, match="train3.wav"):
        _run(argv, reporter)
    last = saved_steps(run)[-1]
    assert 8 <= last < 16 and logged_steps(run)[-1] == last
    assert reporter.told[-1] == f"saved at step {last}; the same command goes on from there"
    assert log(run)[-1].startswith("error: " if policy == "raise" else "  ") and "train3.wav" in log(run)[-1]
    (tmp_path / "away.wav").rename(file)
    assert main([*argv, "--resume", "must"]) == 0
    assert metrics(run) == metrics(reference) and logged_steps(run) == list(range(1, 25))


def test_audio_removed_while_the_command_runs(corpus: Corpus, data: Path, tmp_path: Path) -> None:
    own = tmp_path / "data"
    shutil.copytree(data, own)
    run = tmp_path / "run"
    with started(words(corpus, run, *ENDLESS, f"data.train={own / 'train.jsonl'}")) as process:
        until(run / "checkpoints" / "step_00000006" / "meta.json", process)
        for file in own.glob("train*.wav"):
            file.unlink()
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 3 and "Traceback" not in told
    last = saved_steps(run)[-1]
    assert logged_steps(run)[-1] == last and f"saved at step {last}; the same command" in told
    assert told.splitlines()[-1] == log(run)[-1] and log(run)[-1].startswith("error: ")


def test_a_bug_is_written_down_and_the_run_saved(corpus: Corpus, tmp_path: Path, reference: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        _run(words(corpus, run, *OFTEN), At(10, lambda: print(1 // 0)))
    assert saved_steps(run)[-1] == 10 and "saved at step 10; the same command goes on from there" in log(run)
    assert "Traceback (most recent call last):" in log(run) and log(run)[-1].startswith("ZeroDivisionError")


def test_a_second_ctrl_c_ends_at_once_and_says_what_is_lost(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    reporter = At(10, twice)
    with pytest.raises(KeyboardInterrupt):
        _run(words(corpus, run, *OFTEN), reporter)
    assert saved_steps(run)[-1] == 6 and log(run)[-1] == "stopped"
    told = "step 10 is not saved: the end was wanted at once; the newest checkpoint is that of step 6"
    assert reporter.told[-1] == told


def test_an_update_that_broke_off_is_not_saved(corpus: Corpus, tmp_path: Path) -> None:
    """What the optimizer has begun to overwrite is no state of the run; the error of memory hides it not."""
    argv = words(corpus, tmp_path / "run", *OFTEN)

    def breaks() -> None:
        broken = RuntimeError("can't allocate memory")
        broken.add_note(OVERWRITTEN)
        raise MemoryExhausted("out of memory") from broken

    reporter = At(10, breaks)
    with pytest.raises(MemoryExhausted):
        _run(argv, reporter)
    assert saved_steps(tmp_path / "run")[-1] == 6
    assert reporter.told[-1].startswith("step 10 is not saved: the update broke off in the middle, and the train state")


@pytest.mark.parametrize("donate", [True, False])
def test_only_a_donated_state_is_said_to_be_overwritten(corpus: Corpus, tmp_path: Path, donate: bool) -> None:
    cfg = read_config(_parser().parse_args(words(corpus, tmp_path)))
    audio = {"audio": torch.ones(1, 16000, dtype=torch.int16), "audio_len": torch.tensor([16000])}
    raw = audio | {"noise": torch.zeros(1, 16000, dtype=torch.int16), "noise_len": torch.tensor([16000])}
    raw |= {"row": torch.tensor([0]), "utterance": torch.tensor([1]), "weight": torch.ones(1)}
    ts = init_train_state(random.key(0), cfg)
    ts = ts._replace(opt_state=ts.opt_state._replace(square={}))
    with pytest.raises(KeyError) as caught:
        make_step(cfg, donate=donate)(ts, [raw], random.key(1))
    assert (OVERWRITTEN in getattr(caught.value, "__notes__", ())) is donate


def test_a_disk_that_is_full_at_the_end_says_so(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def no_more_checkpoints() -> None:
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").write_text("a file in place of the folder")
        raise DataError("a shard vanished")

    reporter = At(10, no_more_checkpoints)
    with pytest.raises(DataError):
        _run(words(corpus, run, *OFTEN), reporter)
    assert reporter.told[-1].startswith("step 10 is not saved, as told above; the newest checkpoint is that of step 0")

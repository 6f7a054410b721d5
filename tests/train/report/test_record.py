"""What a run folder says, in words: finished, in progress, ended with an error, or not begun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nest_fn.config import Config
from nest_fn.config.writer import to_text
from nest_fn.files.lock import Lock
from nest_fn.train.cli.main import main
from nest_fn.train.report.examples import make_examples
from nest_fn.train.report.record import Record, read_record, read_records
from nest_fn.train.report.sections import nearest_preset
from nest_fn.train.report.verdict import verdict
from tests.train.conftest import Corpus
from tests.train.run.test_pretrain import words
from tests.train.step.test_nonfinite import WILD


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps with a validation."""
    folder = tmp_path_factory.mktemp("report") / "run"
    assert main(words(corpus, folder, "trainer.log_every=2", "trainer.max_steps=12", "trainer.save_every=6")) == 0
    return folder


def made_up(folder: Path, lines: list[dict[str, object]], log: str = "", *overrides: str) -> Record:
    """A record of invented metrics."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_text(Config.preset("demo", overrides).to_dict()))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.txt").write_text(
        "".join(f"2026-01-01 00:00:{n:02d}+0000 {t}\n" for n, t in enumerate(log.splitlines()))
    )
    return read_record(folder)


def line(step: int, **values: float) -> dict[str, object]:
    usual = {
        "loss": 4.0,
        "accuracy": 0.3,
        "unigram_accuracy": 0.1,
        "coverage": 0.9,
        "perplexity": 100.0,
        "grad_norm": 1.0,
    }
    return {"step": step, **usual, **values}


def told(record: Record) -> str:
    return " ".join(sentence.text for sentence in verdict(record))


def test_a_finished_run(run: Path) -> None:
    record = read_record(run)
    assert record.finished and record.done == 12 and record.error is None and record.holder is None
    assert [step for step, _ in zip(*record.series("loss"), strict=True)] == [2, 4, 6, 8, 10, 12]
    assert record.series("loss", valid=True)[0] == [9, 12]
    assert verdict(record)[0].text == "Finished: 12 of 12 updates (100%)." and "CPU thread" in told(record)


def test_a_run_in_progress_and_one_that_stopped(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    lock = Lock(copy / "lock")
    assert lock.take() is None
    try:
        assert verdict(read_record(copy))[0].text.startswith("In progress: 12 of 12 updates (100%); process ")
    finally:
        lock.release()
    stopped = made_up(tmp_path / "stopped", [line(20)])
    assert told(stopped).startswith("Stopped after 20 of 1,800 updates (1%); the same command goes on from there.")


def test_a_run_that_ended_not_finite(corpus: Corpus, tmp_path: Path) -> None:
    assert main(words(corpus, tmp_path / "run", *WILD)) == 5
    record = read_record(tmp_path / "run")
    first = verdict(record)[0]
    assert (
        first.kind == "bad"
        and first.text.startswith("Ended with an error after 1 of ")
        and "nothing was updated" in first.text
    )
    assert record.failures == [1] and "A dump of the state before step 1" in told(record)


def test_what_is_said_of_the_numbers(tmp_path: Path) -> None:
    good = made_up(tmp_path / "good", [line(20 * n) for n in range(1, 20)])
    assert "30.0% of the masked tokens are right on training data" in told(good) and "3.0 times" in told(good)
    assert "0.605 less than by guessing each token by its frequency (about 4.605)" in told(good)
    bad = made_up(tmp_path / "bad", [line(20, accuracy=0.1), line(40, accuracy=0.1, perplexity=3.0, skipped=2)])
    assert "It has not learnt from context" in told(bad) and "a sign of collapse" in told(bad)
    assert "2 updates were skipped" in told(bad)
    norms = [1.0] * 15 + [50.0] + [1.0] * 4
    wild = made_up(tmp_path / "wild", [line(n, grad_norm=norm, loss=float("nan")) for n, norm in enumerate(norms)])
    assert "peaks of 50, 50 times its median" in told(wild)
    valid = [{"step": n, "valid": line(n, loss=loss)} for n, loss in enumerate((3.0, 2.0, 2.5), 1)]
    over = made_up(tmp_path / "over", [line(1), *valid], "command: x\nwarning: hm\nwarning: hm")
    assert "lowest at step 2 (2.000) and has risen to 2.500" in told(over) and "It warned 2 times" in told(over)
    assert over.seconds == 2


def test_nothing_recorded_yet(tmp_path: Path) -> None:
    assert told(made_up(tmp_path / "new", [])).endswith("It has recorded no metrics yet.")


def test_names_differ(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        folder.parent.mkdir()
        made_up(folder, [])
    assert [record.name for record in read_records(folders)] == ["a/run", "b/run"]
    assert [record.name for record in read_records([folders[0].parent.parent / "a" / "run"])] == ["a/run"]


@pytest.mark.parametrize("name", ["demo", "tiny", "nest_large"])
def test_the_nearest_preset(name: str) -> None:
    cfg = Config.preset(name, ["optim.lr=0.123", "data.train=x.jsonl"])
    assert nearest_preset(cfg)[0] == name
    assert [one.split(" -> ")[1] for one in nearest_preset(cfg)[1]] == ["0.123"]


def test_utterances_are_those_of_the_files(run: Path, corpus: Corpus) -> None:
    record = read_record(run)
    made = make_examples(record, ("data.augment.prob=1",), 3)
    assert (made.step, made.split, len(made.utterances)) == (12, "valid", 3)
    assert made.counted_s == pytest.approx(5.75)  # all of the validation data
    tokens = sum(-(-round(seconds * 100 + 1) // 8) for seconds in (1.5, 2.0, 1.25, 1.0))
    assert abs(int(made.counts.sum()) - tokens) <= 4
    for one in made.utterances:
        assert len(one.audio) == len(one.noisy) == round(one.seconds * 16000)
        assert one.clean_mel.shape == one.noisy_mel.shape == (80, len(one.mask))
        assert len(one.targets) == len(one.guesses) == len(one.masked) == len(one.chance) == -(-len(one.mask) // 8)
        assert not (one.audio == one.noisy).all() and ((one.chance >= 0) & (one.chance <= 1)).all()
        assert one.masked.sum() <= one.mask.sum() / 7  # a token is hidden if nearly all of its frames are

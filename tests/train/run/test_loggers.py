"""Curves beside metrics.jsonl: Weights & Biases by a stand-in of its package, and offline where it is installed."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from nest_fn.train.cli.main import main
from nest_fn.train.run.record.loggers import Loggers
from nest_fn.train.run.record.tensorboard import scalars
from tests.train.conftest import Corpus
from tests.train.run.test_pretrain import metrics, words

QUICK = ["trainer.max_steps=4", "trainer.save_every=2", "trainer.log_every=1", "trainer.loggers=wandb"]
Captured = pytest.CaptureFixture[str]


class Stand:
    """What is used of the package: ``init``, ``Settings``, and of a run ``log``, ``define_metric`` and ``finish``."""

    def __init__(self) -> None:
        self.begun: list[dict[str, Any]] = []
        self.lines: list[dict[str, float]] = []
        self.finished = 0
        self.fails = False

    def module(self) -> types.ModuleType:
        made = types.ModuleType("wandb")
        made.Settings = dict  # type: ignore[attr-defined]
        made.init = self.init  # type: ignore[attr-defined]
        return made

    def init(self, **given: Any) -> Any:
        if self.fails:
            raise RuntimeError("no API key\nand more")
        self.begun.append(given)
        return types.SimpleNamespace(
            id=given["id"] or "abc", url=None, dir="offline", log=self.lines.append, finish=self._finish,
            define_metric=lambda name, step_metric=None: None,
        )  # fmt: skip

    def _finish(self) -> None:
        self.finished += 1


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    made = Stand()
    monkeypatch.setitem(sys.modules, "wandb", made.module())
    return made


def drawn(folder: Path) -> list[dict[str, float]]:
    return [{"step": line["step"], **dict(scalars(line))} for line in metrics(folder)]


def test_weights_and_biases_gets_every_line_and_a_resumption_goes_on_with_its_run(
    corpus: Corpus, tmp_path: Path, stand: Stand, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    run = tmp_path / "run"
    assert main(words(corpus, run, *QUICK)) == 0
    assert "Weights & Biases: offline" in capsys.readouterr().err
    without_time = [{k: v for k, v in line.items() if not k.startswith("time")} for line in stand.lines]
    wanted = [{k: v for k, v in line.items() if not k.startswith("time")} for line in drawn(run)]
    assert without_time == wanted and len(wanted) >= 4 and stand.finished == 1
    assert stand.begun[0]["config"]["trainer"]["max_steps"] == 4 and stand.begun[0]["name"] == "run"
    monkeypatch.setenv("WANDB_NAME", "mine")
    assert main(words(corpus, run, *QUICK, "trainer.max_steps=6")) == 0
    assert [given["id"] for given in stand.begun] == [None, "abc"] and stand.begun[1]["name"] is None
    assert stand.lines[-1]["step"] == 6
    assert not (run / "tensorboard").exists()


def test_what_the_package_raises_is_told_once_and_ends_no_run(
    corpus: Corpus, tmp_path: Path, stand: Stand, capsys: Captured
) -> None:
    stand.fails = True
    assert main(words(corpus, tmp_path / "run", *QUICK)) == 0
    told = capsys.readouterr().err
    assert told.count("Weights & Biases gets no more curves (RuntimeError: no API key); metrics.jsonl has them") == 1
    assert metrics(tmp_path / "run")[-1]["step"] == 4


def test_loggers_are_checked_before_the_run(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    assert main(words(corpus, tmp_path / "run", "trainer.loggers=comet")) == 2
    assert "'trainer.loggers' must be one of tensorboard, wandb; got 'comet'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(words(corpus, tmp_path / "run", *QUICK)) == 2
    assert "trainer.loggers=wandb: the package wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_full_disk_under_one_logger_costs_the_others_nothing() -> None:
    class Full:
        def add(self, line: Any) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None: ...

    class Kept(Full):
        lines: list[Any]

        def add(self, line: Any) -> None:
            self.lines = [line]

    kept = Kept()
    with pytest.raises(OSError, match="No space"):
        Loggers([Full(), kept]).add({"step": 1})
    assert kept.lines == [{"step": 1}]


@pytest.mark.filterwarnings("ignore")
def test_the_package_itself_offline(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the optional package wandb writes runs offline")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    assert main(words(corpus, tmp_path / "run", *QUICK)) == 0
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert record.stat().st_size > 0 and (tmp_path / "run" / "wandb_id.txt").read_text().strip() in record.name
    assert os.environ["WANDB_MODE"] == "offline"

"""``trainer.digest_every``: a digest of every tensor at some steps; verify and diff name the first that differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn.train.cli.main import main
from nest_fn.train.rerun.verdict import Comparison, verdict
from nest_fn.train.run.record.digests import append_digests, cut_digests, digests_of, first_difference, read_digests
from tests.train.conftest import Corpus
from tests.train.rerun.test_diff import diff
from tests.train.rerun.test_verify import flip, verify
from tests.train.run.test_pretrain import checkpoints, metrics, words

Captured = pytest.CaptureFixture[str]
NAME = "encoder.layers.0.norm_out.weight"
OFTEN = ["trainer.log_every=3", "trainer.save_every=4", "trainer.max_steps=8", "trainer.valid_every=0"]


@pytest.fixture(scope="module")
def run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps with digests of each second, saved at 4 and 8."""
    run = tmp_path_factory.mktemp("digests") / "run"
    assert main(words(corpus, run, *OFTEN, "trainer.digest_every=2")) == 0
    return run


def test_a_run_with_digests_is_the_same_run(run: Path, corpus: Corpus, tmp_path: Path) -> None:
    assert main(words(corpus, tmp_path / "without", *OFTEN)) == 0
    assert checkpoints(run) == checkpoints(tmp_path / "without")
    assert metrics(run) == metrics(tmp_path / "without")
    assert not (tmp_path / "without" / "digests.jsonl").exists()


def test_every_tensor_has_a_digest_in_the_order_of_computation(run: Path) -> None:
    records = dict(read_digests(run / "digests.jsonl"))
    assert list(records) == [2, 4, 6, 8]
    kinds = list(dict.fromkeys(name.split(".")[0] for name in records[2]))
    assert kinds == ["batch", "key", "state", "metrics", "optimizer", "params"]
    assert all(len(digest) == 16 for digest in records[2].values())
    lines = (run / "digests.jsonl").read_text().splitlines()
    assert [("tensors" in json.loads(line)) for line in lines] == [True, False, False, False]
    assert len(lines[1]) < 16 * len(records[2]) + 60


def test_verify_compares_them(run: Path, capsys: Captured) -> None:
    code, lines = verify(capsys, str(run), "--from", "4")
    assert code == 0 and lines[0].startswith("step 4: the checkpoint from which the steps are made: tensors equal")
    assert [line.split(",")[0] for line in lines[1:4]] == [
        "step 6: tensors equal", "step 6: metrics equal", "step 8: tensors equal"
    ]  # fmt: skip
    assert main(["verify", str(run)]) == 0
    assert "recorded are 2 lines of metrics, 1 checkpoint, 2 records of digests" in capsys.readouterr().err


def test_a_changed_checkpoint_is_told_from_a_changed_run(run: Path, tmp_path: Path, capsys: Captured) -> None:
    flip(run, tmp_path / "begins", 4, NAME)
    code, lines = verify(capsys, str(tmp_path / "begins"), "--from", "4", "--steps", "2")
    assert code == 1 and f"tensors differ, 1 of {_count(lines[0])}, first params.{NAME}; equal: state" in lines[0]
    assert lines[-2] == f"the first tensor that differs: params.{NAME}, step 4"
    assert lines[-1] == "the likely cause: the checkpoint of step 4 was changed after it was written"
    code, lines = verify(capsys, str(tmp_path / "begins"), "--from", "0")
    assert code == 1 and "step 4: tensors equal" in "".join(lines)
    assert lines[-1] == "the likely cause: the checkpoint of step 4 was changed after it was written"


def _count(line: str) -> str:
    return line.split(" of ")[1].split(",")[0]


def test_other_settings_are_named_by_the_first_tensor(run: Path, capsys: Captured) -> None:
    code, lines = verify(capsys, str(run), "--from", "0", "--steps", "2", "encoder.dropout=0.3")
    assert code == 1 and "; equal: batch, key" in lines[0]
    assert lines[-2].startswith("the first tensor that differs: state.")
    assert lines[-1].endswith("encoder.dropout=0.3")


def test_diff_names_the_first_step_and_tensor(run: Path, corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    changes = ["trainer.digest_every=2", "trainer.max_steps=4", "trainer.ema_decay=0.5"]
    assert main(words(corpus, tmp_path / "same", *OFTEN, *changes)) == 0
    code, found = diff(capsys, run, tmp_path / "same")
    assert found["digests"].startswith("digests: equal") and "2 common records, to step 4" in found["digests"]
    assert main(words(corpus, tmp_path / "other", *OFTEN, *changes, "optim.weight_decay=0.5")) == 0
    code, found = diff(capsys, run, tmp_path / "other")
    assert code == 1 and "step 2: tensors differ, " in found["digests"]
    assert "first state.encoder.layers.0.conv.norm." in found["digests"] and "equal: batch, key; " in found["digests"]


def test_a_resumed_run_writes_the_same_records(run: Path, corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    (tmp_path / "run" / "digests.jsonl").write_bytes((run / "digests.jsonl").read_bytes()[:-9])  # torn by a kill
    assert main(words(corpus, tmp_path / "run", *OFTEN, "trainer.digest_every=2")) == 0
    assert (tmp_path / "run" / "digests.jsonl").read_bytes() == (run / "digests.jsonl").read_bytes()


def test_records_are_written_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "digests.jsonl"
    first = digests_of({"a": torch.ones(2), "b": torch.zeros(())})
    more = first | digests_of({"c": torch.ones(3)})
    assert not list(read_digests(path))
    cut_digests(path, 3)
    for step, record in ((1, first), (2, more), (3, first)):
        append_digests(path, step, record)
    assert list(read_digests(path)) == [(1, first), (2, more), (3, first)]
    cut_digests(path, 2)
    assert list(read_digests(path)) == [(1, first), (2, more)]
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 3, "dig')  # torn by a kill
    cut_digests(path, 2)
    assert path.read_bytes() == whole
    cut_digests(path, 0)
    assert path.read_bytes() == b""


def test_digests_are_of_dtype_shape_and_bits() -> None:
    leaves = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.tensor([0.0, 0, 0, -0.0])]
    found = digests_of({str(number): leaf for number, leaf in enumerate(leaves)})
    assert len(set(found.values())) == 4
    assert digests_of({"x": torch.zeros(4)})["x"] == found["0"]


def test_a_tensor_that_was_not_recorded_does_not_count() -> None:
    assert first_difference({"a": "1"}, {"a": "1", "b": "2"}) == (None, "tensors equal, 1 digests")
    assert first_difference({"a.x": "1", "b.y": "2"}, {"a.x": "1"})[0] == "b.y"


def test_versions_are_the_likely_cause() -> None:
    def told(kind: Any, relative: float, changed: list[str]) -> list[str]:
        return verdict([Comparison(kind, 5, "", False, relative)], changed, [])

    found = told("metrics", 1e-7, ["python: 3.11.1 -> 3.11.2", "torch: 2.11.0 -> 2.14.1"])
    assert found[-1] == "the likely cause, not as when the run was made: torch: 2.11.0 -> 2.14.1"
    assert "in which tensor is not known" in found[1]
    assert "none that was recorded" in told("metrics", 1e-7, ["python: 3.11.1 -> 3.11.2"])[-1]

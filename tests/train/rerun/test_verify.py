"""``nest-fn verify``: a run made again is equal to the bit; what was changed since is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.files.atomic import anything
from nest_fn.layers.tree import fill, flatten
from nest_fn.train.cli.main import main
from tests.train.conftest import Corpus
from tests.train.run.test_pretrain import words
from tests.train.step.test_nonfinite import WILD

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def healthy(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps, a line of metrics every third, saved at 4, 8 and 12, killed and resumed by nobody."""
    run = tmp_path_factory.mktemp("verify") / "run"
    often = ["trainer.log_every=3", "trainer.save_every=4", "trainer.max_steps=12", "trainer.accumulate=2"]
    assert main(words(corpus, run, *often)) == 0
    return run


def flip(run: Path, target: Path, step: int, path: str, bit: int = 0) -> None:
    """A copy of a run with one bit of one element of a parameter flipped in a checkpoint, and its digests made anew."""
    shutil.copytree(run, target)
    checkpoint = target / "checkpoints" / f"step_{step:08d}"
    trees, config, meta = checkpoint_folder.read_checkpoint(checkpoint)
    leaves = flatten(trees["params"])
    changed = leaves[path].clone()
    changed.reshape(-1).view(torch.int32)[3] ^= 1 << bit
    trees["params"] = fill(trees["params"], leaves | {path: changed})
    meta.pop("versions")
    checkpoint_folder.write_checkpoint(checkpoint, trees, config, meta, replaces=anything)


def verify(capsys: Captured, *argv: str) -> tuple[int, list[str]]:
    """Exit code and lines."""
    capsys.readouterr()
    code = main(["verify", *argv])
    return code, capsys.readouterr().out.splitlines()


def test_a_finished_run_is_equal_and_nothing_is_written(healthy: Path, capsys: Captured) -> None:
    before = {str(path): path.read_bytes() for path in healthy.rglob("*") if path.is_file()}
    code, lines = verify(capsys, str(healthy))
    assert code == 0
    assert [line.split(":")[0] for line in lines] == ["step 9", "step 12", "step 12", "equal to the last bit"]
    assert "checkpoint equal, " in lines[2] and lines[-1].endswith("3 records, steps 9 to 12")
    code, lines = verify(capsys, str(healthy), "--from", "0", "--steps", "12")
    assert code == 0 and lines[-1].endswith("7 records, steps 3 to 12")
    code, lines = verify(capsys, str(healthy), "--from", "5", "--steps", "2")  # made from the checkpoint of step 4
    assert code == 0 and lines[-1].endswith("1 record, steps 6 to 6")
    assert {str(path): path.read_bytes() for path in healthy.rglob("*") if path.is_file()} == before


def test_a_flipped_bit_is_named(healthy: Path, tmp_path: Path, capsys: Captured) -> None:
    name = "encoder.layers.0.norm_out.weight"
    flip(healthy, tmp_path / "run", 8, name)
    code, lines = verify(capsys, str(tmp_path / "run"), "--from", "4")
    assert code == 1 and "metrics equal" in lines[0]
    assert f"differs in 1 of {lines[1].split(' of ')[1].split()[0]} tensors, first params.{name}: 1 of 32" in lines[1]
    assert lines[-3].startswith("differs from step 8 on") and lines[-3].endswith("of the size of rounding")
    assert lines[-2].startswith(f"the first tensor that differs: params.{name}, step 8, the first step whose tensors")
    code, lines = verify(capsys, str(tmp_path / "run"), "--from", "8")  # what comes of the wrong weight
    assert code == 1 and "differs from step 9 on" in lines[-3]
    assert "step 12, the first step whose tensors can be compared; a run with trainer.digest_every=1" in lines[-2]
    assert "the likely cause is none that was recorded" in lines[-1]
    flip(healthy, tmp_path / "high", 8, name, bit=27)  # an exponent's bit
    code, lines = verify(capsys, str(tmp_path / "high"), "--from", "4")
    assert code == 1 and lines[-3].endswith("more than rounding")


def test_a_damaged_checkpoint_is_told(healthy: Path, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    shutil.copytree(healthy, run)
    (file,) = (run / "checkpoints" / "step_00000008").glob("params.*")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    code, lines = verify(capsys, str(run), "--from", "4")
    assert code == 1 and "checkpoint damaged: " in lines[1] and "bytes changed since they were written" in lines[1]


def test_another_machine_is_told(healthy: Path, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    shutil.copytree(healthy, run)
    found = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(found | {"threads": 99, "torch": "1.0"}))
    assert main(["verify", str(run)]) == 0
    told = capsys.readouterr().err
    assert "torch: 1.0 -> " in told and "threads: 99 -> " in told and "trainer.threads sets the threads" in told


def test_other_settings_give_other_numbers(healthy: Path, capsys: Captured) -> None:
    code, lines = verify(capsys, str(healthy), "optim.lr=0.5")
    assert code == 1 and "metrics differ (recorded and now): " in lines[0]
    assert lines[-1] == "the likely cause, not as when the run was made: optim.lr=0.5"


def test_a_run_that_ended_not_finite_does_so_again(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    assert main(words(corpus, run, *WILD, "trainer.save_every=0", "trainer.log_every=1")) == 5
    code, lines = verify(capsys, str(run))
    assert code == 0 and lines[-1].startswith("equal to the last bit")


def test_what_cannot_be_verified(healthy: Path, tmp_path: Path, capsys: Captured) -> None:
    for argv, told in (
        ([str(tmp_path)], "holds no run"),
        ([str(healthy), "--from", "12"], "recorded nothing after step 12 up to 12; it has lines of metrics and"),
        ([str(healthy), "--from", "6", "--steps", "1"], "from step 3 to 12: give other --from and --steps"),
        ([str(healthy), "--steps", "0"], "--steps"),
    ):
        assert main(["verify", *argv]) == 2
        assert told in capsys.readouterr().err

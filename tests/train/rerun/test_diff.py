"""``nest-fn diff``: where two runs part, by what they recorded and by making them again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nest_fn.train.cli.main import main
from nest_fn.train.rerun.compare import line_difference, relative_distance, tensor_differences
from tests.train.conftest import Corpus
from tests.train.rerun.test_verify import flip
from tests.train.run.test_pretrain import words

Captured = pytest.CaptureFixture[str]
SHORT = ["trainer.log_every=2", "trainer.save_every=3", "trainer.max_steps=6"]


@pytest.fixture(scope="module")
def one(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, saved at 3 and 6."""
    run = tmp_path_factory.mktemp("diff") / "one"
    assert main(words(corpus, run, *SHORT)) == 0
    return run


def diff(capsys: Captured, *argv: object) -> tuple[int, dict[str, str]]:
    """Exit code, and the lines by what they are about."""
    capsys.readouterr()
    code, found, what = main(["diff", *map(str, argv)]), {}, ""
    for line in capsys.readouterr().out.splitlines():
        what = what if line.startswith("  ") else line.split(":")[0]
        found[what] = found.get(what, "") + line + "\n"
    return code, found


def test_a_copy_is_equal(one: Path, tmp_path: Path, capsys: Captured) -> None:
    shutil.copytree(one, tmp_path / "copy")
    code, found = diff(capsys, one, tmp_path / "copy", "--rerun")
    assert code == 0 and not [text for text in found.values() if "different" in text]
    assert "all updates to step 6 are equal" in found["made again from step 6"]


def test_another_seed_parts_at_the_first_tensor(one: Path, corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    assert main(words(corpus, tmp_path / "two", *SHORT, "trainer.seed=5")) == 0
    code, found = diff(capsys, one, tmp_path / "two", "--rerun")
    assert code == 1 and "trainer.seed: 0 -> 5" in found["config"]
    assert "different" in found["data"]  # the order is the seed's
    assert found["code, versions and machine"].startswith("code, versions and machine: equal")
    assert "step 2: " in found["metrics"] and "; 0 common lines before are equal" in found["metrics"]
    assert "before the first update" in found["made again from step 0"]


def test_another_learning_rate_parts_at_the_first_update(
    one: Path, corpus: Corpus, tmp_path: Path, capsys: Captured
) -> None:
    assert main(words(corpus, tmp_path / "two", *SHORT, "optim.lr=0.01")) == 0
    code, found = diff(capsys, one, tmp_path / "two", "--rerun")
    assert code == 1 and "optim.lr: " in found["config"] and found["data"].startswith("data: equal")
    again = found["made again from step 0"]
    assert "update 1: lr " in again and "tensors differ, first params." in again and "batches" not in again


def test_no_override_makes_steps_that_were_not(one: Path, tmp_path: Path, capsys: Captured) -> None:
    code, found = diff(capsys, one, one, "--rerun", "trainer.max_steps=1000000000")
    assert code == 0 and "all updates to step 6 are equal" in next(text for text in found.values() if "updates" in text)


def test_one_bit_is_found(one: Path, tmp_path: Path, capsys: Captured) -> None:
    name = "encoder.layers.0.norm_out.weight"
    flip(one, tmp_path / "two", 3, name)
    code, found = diff(capsys, one, tmp_path / "two")
    assert code == 1 and found["metrics"].startswith("metrics: equal")
    assert f"step 3: 1 tensor differs, first params.{name}: 1 of 32 elements" in found["checkpoints"]


def test_no_run(one: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["diff", str(one), str(tmp_path)]) == 2
    assert "diff: " in (told := capsys.readouterr().err) and "holds no run" in told


def test_tensors_are_compared_by_their_bits() -> None:
    nan, zero = torch.tensor([1.0, float("nan")]), torch.tensor([0.0, 1.0])
    assert not list(tensor_differences({"a": nan}, {"a": nan.clone()}))
    (found,) = tensor_differences({"a": zero}, {"a": torch.tensor([-0.0, 1.0])})
    assert found.text.startswith("1 of 2 elements by at most 0 ") and found.relative == 0
    (found,) = tensor_differences({"a": zero}, {"a": torch.tensor([0.0, 1.25])})
    assert found.relative == pytest.approx(0.2)
    texts = [one.text for one in tensor_differences({"a": zero, "b": zero}, {"a": zero.double(), "c": zero})]
    assert texts == ["float32 [2], and float64 [2]", "float32 [2], and nothing", "nothing, and float32 [2]"]


def test_the_distance_is_that_of_whole_parts() -> None:
    """A tensor of rounding alone, as the gradient of a bias before a batch norm, does not count against the others."""
    then = {"params.w": torch.tensor([3.0, 4.0]), "params.b": torch.tensor([1e-9]), "state.n": torch.tensor([7])}
    now = then | {"params.b": torch.tensor([-1e-9])}
    assert relative_distance(then, now) == pytest.approx(2e-9 / 5, rel=1e-6)
    assert relative_distance(then, then | {"params.w": torch.tensor([3.0, 4.5])}) == pytest.approx(0.1)
    nan = {"optimizer.mean.w": torch.tensor([float("nan"), 2.0])}
    assert relative_distance(nan, {"optimizer.mean.w": nan["optimizer.mean.w"].clone()}) == 0
    assert relative_distance(nan, {"optimizer.mean.w": torch.tensor([1.0, 2.0])}) == float("inf")
    assert relative_distance(then, nan) == float("inf")


def test_lines_are_compared_without_their_times() -> None:
    line = {"step": 1, "loss": float("nan"), "time": 3}
    assert line_difference(line, line | {"time": 4}) is None
    found = line_difference({"loss": 2.0, "lr": 1}, {"loss": 2.5, "lr": 1})
    assert found is not None and found.relative == pytest.approx(0.2) and found.text == "loss 2.0 and 2.5"

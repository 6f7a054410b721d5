"""``nest-fn replay``: the same step to the last bit, the culprit by name, nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nest_fn.train.cli.main import main
from nest_fn.train.commands.replay import Replayed, replay
from tests.train.conftest import Corpus
from tests.train.run.test_pretrain import metrics, words
from tests.train.step.test_nonfinite import WILD, silent

__all__ = ["silent"]  # a fixture

Captured = pytest.CaptureFixture[str]


class Told:
    """A reporter that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Keep it."""
        self.warnings.append(text)

    def progress(self, step: int, total: int, values: object) -> None:
        """Nothing."""


def again(run: Path, step: int, *overrides: str) -> Replayed:
    """A replay without a warning."""
    told = Told()
    found = replay(run, step, overrides, told)
    assert told.warnings == []
    return found


@pytest.fixture(scope="module")
def healthy(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps, each with a line of metrics, saved at 4, 8 and 12; a third of the second epoch is reached."""
    run = tmp_path_factory.mktemp("replay") / "run"
    often = ["trainer.log_every=1", "trainer.save_every=4", "trainer.max_steps=12", "trainer.accumulate=2"]
    assert main(words(corpus, run, *often)) == 0
    return run


def contents(run: Path) -> dict[str, bytes]:
    """Every byte of a run."""
    return {str(path): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("step", [0, 3, 4, 11])
def test_a_logged_step_comes_back_to_the_last_bit(healthy: Path, step: int) -> None:
    before = contents(healthy)
    found = again(healthy, step)
    line = next(line for line in metrics(healthy) if line["step"] == step + 1 and "loss" in line)
    assert (found.loss, found.grad_norm, found.epoch) == (line["loss"], line["grad_norm"], line["epoch"])
    assert found.finite and found.wrong == ()
    assert (found.origin and found.origin.name) == (f"step_{step // 4 * 4:08d}" if step >= 4 else None)
    assert contents(healthy) == before


def test_rows_add_up_to_the_step(healthy: Path) -> None:
    found = again(healthy, 5)
    masked = sum(row.masked for row in found.rows)
    line = next(line for line in metrics(healthy) if line["step"] == 6 and "loss" in line)
    assert masked == line["masked_tokens"]
    assert sum(row.loss * row.masked for row in found.rows) / masked == pytest.approx(found.loss, rel=1e-5)
    assert len({row.name for row in found.rows}) == len(found.rows) > 2
    assert all(row.remarks == () and 1 <= row.seconds <= 2.1 for row in found.rows)


def test_while_the_run_is_locked(healthy: Path, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    shutil.copytree(healthy, run)
    (run / "lock").write_text("1 another-machine")
    assert main(["replay", str(run), "9", "data.num_workers=0"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 9 (line 10 of the metrics), from ") and out[-1] == "finite"
    assert (run / "lock").read_text() == "1 another-machine"


def test_a_failure_is_met_again(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    assert main(words(corpus, run, *WILD, "trainer.save_every=0")) == 5
    before = contents(run)
    capsys.readouterr()
    assert main(["replay", str(run), "1"]) == 5
    told = capsys.readouterr()
    assert "failures/step_00000001: epoch 0, batch 1" in told.out and told.out.splitlines()[-1] == "not finite"
    assert "gradients not finite, " in told.out and "encoder.layers.0." in told.out
    assert contents(run) == before
    assert main(["replay", str(run), "1", "optim.lr=1e-3"]) == 5  # the parameters are what they are
    capsys.readouterr()
    assert main(["replay", str(run), "0"]) == 0  # no checkpoint was made before it
    (first,) = [line for line in metrics(run) if line["step"] == 1]
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("from the seed: epoch 0, batch 0") and told[1].startswith(f"loss {first['loss']!r}, ")


def test_the_culprit_is_named(corpus: Corpus, silent: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(words(corpus, run, *silent)) == 5
    (dump,) = (run / "failures").iterdir()
    found = again(run, int(dump.name.removeprefix("step_")))
    odd = [row for row in found.rows if row.remarks]
    assert not found.finite and [row.name.split("/")[-1].split("@")[0].split(":")[0] for row in odd] == ["silence.wav"]
    assert "audio silent" in odd[0].remarks and "features of the audio not finite" in odd[0].remarks


def test_steps_that_were_left_out_are_left_out_again(corpus: Corpus, silent: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    rule = ["trainer.skip_nonfinite=1", "trainer.save_every=2", "trainer.keep_last=99", "trainer.log_every=1"]
    assert main(words(corpus, run, *silent, *rule)) == 0
    lines = [line for line in metrics(run) if "loss" in line]
    bad = next(line["step"] for line in lines[3:] if line["skipped"])  # the update after bad - 1
    for path in (run / "checkpoints").iterdir():
        if int(path.name[5:]) > 2:
            shutil.rmtree(path)
    assert again(run, bad).loss == next(line["loss"] for line in lines if line["step"] == bad + 1)
    assert not again(run, bad - 1).finite


def test_what_cannot_be_replayed(healthy: Path, tmp_path: Path, capsys: Captured) -> None:
    for argv, code, words_ in (
        ([str(tmp_path), "3"], 2, "holds no run"),
        ([str(healthy), "12"], 2, "step 12 of a run of 12; want the number of updates before it, from 0 to 11"),
        ([str(healthy), "5", "encoder.d_model=48"], 4, "of another model"),
    ):
        assert main(["replay", *argv]) == code
        assert words_ in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    shutil.copytree(healthy, damaged)
    for step, origin in ((8, "step_00000004"), (4, None)):
        (damaged / "checkpoints" / f"step_{step:08d}" / "config.yaml").write_text("x")
        told = Told()
        found = replay(damaged, 9, (), told)
        assert (found.origin and found.origin.name) == origin and found.loss == again(healthy, 9).loss
    assert [line.split("/")[-2] for line in told.warnings] == ["step_00000008", "step_00000004"]


def test_what_the_seed_does_not_say_is_told(healthy: Path) -> None:
    told = Told()
    replay(healthy, 1, ["optim.lr=1", "encoder.dropout=0.5"], told)
    assert len(told.warnings) == 2 and "settings changed since step 4: optim.lr: " in told.warnings[0]
    assert "no longer one: encoder.dropout: was " in told.warnings[1]

"""A run's checkpoints: all comes back bit for bit, changes are refused by name, damage is noticed.

Faults B4, E3, E5, E8.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn.checkpoint import retention
from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Tensor
from nest_fn.train.errors import CheckpointError
from nest_fn.train.run.record.checkpoints import _completed, recorded, restore, save
from nest_fn.train.run.record.progress import Progress
from nest_fn.train.run.record.run_folder import RunFolder
from nest_fn.train.step.step import TrainState, init_train_state

CPU = torch.device("cpu")


def _config(*overrides: str) -> Config:
    return Config.preset("tiny", ["encoder.d_model=8", "encoder.n_layers=1", "encoder.n_heads=2", *overrides])


def _saved(cfg: Config, step: int = 7) -> Progress:
    """A state in which no two tensors are alike."""
    ts = init_train_state(random.key(step), cfg)
    fill = {path: random.normal(random.fold_in(random.key(9), n), leaf.shape)
            for n, (path, leaf) in enumerate(flatten(list(ts.opt_state)).items())}  # fmt: skip
    parts = [{p.removeprefix(f"{n}."): leaf for p, leaf in fill.items() if p.startswith(f"{n}.")} or fill[str(n)]
             for n in range(len(ts.opt_state))]  # fmt: skip
    window = {"loss_sum": torch.tensor(1 / 3, dtype=torch.float64), "steps": torch.tensor(2.0, dtype=torch.float64)}
    return Progress(ts._replace(step=step, opt_state=type(ts.opt_state)(*parts)), 3, 14, window)


def _folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse(text: str) -> None:
    raise AssertionError(f"there was a warning: {text}")


def _restore(
    cfg: Config, folder: RunFolder, resume: str = "auto", digest: str = "d", **options: Any
) -> Progress | None:
    options = {"warn": _refuse, "allow_changes": False} | options
    return restore(cfg, folder, digest, options["warn"], CPU, resume, options["allow_changes"])


def _leaves(ts: TrainState) -> dict[str, Tensor]:
    return flatten({"p": ts.params, "s": ts.state, "o": list(ts.opt_state), "e": ts.ema})


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_all_comes_back_bit_for_bit(tmp_path: Path, optimizer: str, decay: float) -> None:
    cfg = _config(f"optim.name={optimizer}", f"trainer.ema_decay={decay}")
    saved, folder = _saved(cfg), _folder(tmp_path)
    save(cfg, folder, saved, "d", _refuse)
    got = _restore(cfg, folder)
    assert got is not None and (got.ts.step, got.epoch, got.batch) == (7, 3, 14)
    assert type(got.ts.opt_state) is type(saved.ts.opt_state)
    ours, theirs = _leaves(got.ts), _leaves(saved.ts)
    assert ours.keys() == theirs.keys() and bool(got.ts.ema) == (decay > 0)
    assert all(torch.equal(ours[path], leaf) and ours[path].dtype == leaf.dtype for path, leaf in theirs.items())
    assert got.window.keys() == saved.window.keys()
    assert all(torch.equal(got.window[name], leaf) for name, leaf in saved.window.items())


def test_the_same_state_makes_the_same_bytes_on_any_machine(tmp_path: Path) -> None:
    one, two = _folder(tmp_path / "a"), _folder(tmp_path / "b")
    save(_config(), one, _saved(_config()), "d", _refuse)
    other = _config("data.num_workers=9", "trainer.threads=3", "data.prefetch=1", "data.timeout_s=1")
    save(other, two, _saved(other), "d", _refuse)
    files = sorted(path.relative_to(one.path) for path in one.path.rglob("*") if path.is_file())
    assert len(files) > 4 and all((one.path / f).read_bytes() == (two.path / f).read_bytes() for f in files)


def test_changes_are_refused_key_by_key_unless_allowed(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    save(_config(), folder, _saved(_config()), "d", _refuse)
    changed = _config("encoder.dropout=0.3", "data.augment.prob=0.9", "trainer.max_steps=999", "optim.lr=1")
    with pytest.raises(CheckpointError) as caught:
        _restore(changed, folder, digest="other")
    text = str(caught.value)
    assert "encoder.dropout: was 0.1, is 0.3" in text and "data.augment.prob: was 0.5, is 0.9" in text
    assert "data: the manifests" in text and "--allow-changes" in text
    assert "max_steps" not in text and "optim.lr" not in text
    told: list[str] = []
    got = _restore(changed, folder, digest="other", warn=told.append, allow_changes=True)
    assert got is not None and got.ts.step == 7
    assert len(told) == 2 and "no longer one" in told[1] and "was 0.1, is 0.3" in told[1]
    assert told[0].startswith("settings changed since step 7: optim.lr: 0.05 -> 1.0; ")


@pytest.mark.parametrize(
    "override",
    ["trainer.max_steps=5", "trainer.save_every=1", "data.num_workers=7", "optim.lr=0.2", "data.train=elsewhere.jsonl"],
)
def test_what_may_change(tmp_path: Path, override: str) -> None:
    folder = _folder(tmp_path)
    save(_config(), folder, _saved(_config()), "d", _refuse)
    told: list[str] = []
    assert _restore(_config(override), folder, warn=told.append) is not None
    key, _, value = override.partition("=")
    assert not told if key.startswith("data.") else f"{key}: " in told[0] and told[0].endswith(f" -> {value}")


@pytest.mark.parametrize(
    "override, words",
    [
        ("encoder.d_model=16", "params: 'encoder"),
        ("optim.name=sgd", "optimizer: '"),
        ("encoder.n_layers=2", "params: '"),
    ],
)
def test_another_model_is_refused_even_if_changes_are_allowed(tmp_path: Path, override: str, words: str) -> None:
    folder = _folder(tmp_path)
    save(_config(), folder, _saved(_config()), "d", _refuse)
    with pytest.raises(CheckpointError, match=f"of another model: {words}"):
        _restore(_config(override), folder, warn=lambda text: None, allow_changes=True)


def test_averaging_can_begin_and_end_with_a_part_of_a_run(tmp_path: Path) -> None:
    folder, plain, averaged = _folder(tmp_path), _config(), _config("trainer.ema_decay=0.9")
    save(plain, folder, _saved(plain), "d", _refuse)
    got = _restore(averaged, folder, warn=lambda text: None, allow_changes=True)
    assert got is not None
    assert all(torch.equal(flatten(got.ts.ema)[path], leaf) for path, leaf in flatten(got.ts.params).items())
    save(averaged, folder, got._replace(ts=got.ts._replace(step=8)), "d", _refuse)
    back = _restore(plain, folder, warn=lambda text: None, allow_changes=True)
    assert back is not None and back.ts.step == 8 and back.ts.ema == {}


def test_a_damaged_newest_one(tmp_path: Path) -> None:
    cfg, folder = _config(), _folder(tmp_path)
    for step in (3, 6):
        save(cfg, folder, _saved(cfg, step), "d", _refuse)
    newest = retention.step_path(folder.checkpoints, 6)
    file = next(newest.glob("params.*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    told: list[str] = []
    got = _restore(cfg, folder, warn=told.append)
    assert got is not None and got.ts.step == 3 and len(told) == 1 and str(file) in told[0]
    with pytest.raises(CheckpointError, match="auto would take the one before"):
        _restore(cfg, folder, "must")
    save(cfg, folder, _saved(cfg, 6), "d", _refuse)  # having come to step 6 again
    again = _restore(cfg, folder, "must")
    assert again is not None and again.ts.step == 6
    for path in retention.list_checkpoints(folder.checkpoints):
        (path / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        _restore(cfg, folder, warn=told.append)


def test_must_and_never(tmp_path: Path) -> None:
    cfg, folder = _config(), _folder(tmp_path)
    assert _restore(cfg, folder) is None and _restore(cfg, folder, "never") is None
    with pytest.raises(CheckpointError, match="holds no checkpoint, and --resume must wants one"):
        _restore(cfg, folder, "must")
    save(cfg, folder, _saved(cfg), "d", _refuse)
    with pytest.raises(CheckpointError, match="holds 1 checkpoints"):
        _restore(cfg, folder, "never")
    assert _restore(cfg, folder, "must") is not None


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    cfg, folder = _config("trainer.keep_last=2"), _folder(tmp_path)
    for step in (1, 2, 3):
        save(cfg, folder, _saved(cfg, step), "d", _refuse)
    assert [path.name for path in retention.list_checkpoints(folder.checkpoints)] == [
        "step_00000002", "step_00000003",
    ]  # fmt: skip


def _steps(folder: RunFolder) -> list[int]:
    return [int(path.name[5:]) for path in retention.list_checkpoints(folder.checkpoints)]


def test_the_best_and_every_so_many_are_kept(tmp_path: Path) -> None:
    cfg, folder = _config("trainer.keep_last=1", "trainer.keep_best=2", "trainer.keep_every=4"), _folder(tmp_path)
    losses = {1: 5.0, 2: 1.0, 3: float("nan"), 4: 3.0, 5: 2.0, 6: 4.0, 7: None}
    for step, loss in losses.items():
        assert save(cfg, folder, _saved(cfg, step)._replace(valid_loss=loss), "d", _refuse)
    assert _steps(folder) == [2, 4, 5, 7]  # 2 and 5 by loss, 4 by its number, 7 as the last


def test_a_checkpoint_in_passing_pushes_none_out_and_goes(tmp_path: Path) -> None:
    cfg, folder = _config("trainer.keep_last=2", "trainer.keep_best=1"), _folder(tmp_path)
    for step in (2, 4):
        save(cfg, folder, _saved(cfg, step)._replace(valid_loss=float(step)), "d", _refuse)
    for step in (5, 5, 6):  # twice at one step: as if asked to stop as soon as it had begun again
        save(cfg, folder, _saved(cfg, step)._replace(valid_loss=0.0, skipped=2), "d", _refuse, passing=True)
        got = _restore(cfg, folder)
        assert got is not None and (got.ts.step, got.skipped, got.valid_loss) == (step, 2, None)
        assert _steps(folder) == [2, 4, step]
    save(cfg, folder, _saved(cfg, 6), "d", _refuse)  # a regular one after all
    assert _steps(folder) == [2, 4, 6]
    save(cfg, folder, _saved(cfg, 8)._replace(valid_loss=9.0), "d", _refuse)
    assert _steps(folder) == [2, 6, 8]


def test_a_late_validation_enters_the_checkpoint(tmp_path: Path) -> None:
    cfg, one, two = _config(), _folder(tmp_path / "a"), _folder(tmp_path / "b")
    for folder, losses in ((one, [None, 1 / 3]), (two, [1 / 3])):
        for loss in losses:
            save(cfg, folder, _saved(cfg)._replace(valid_loss=loss), "d", _refuse)
    meta = Path("checkpoints") / "step_00000007" / "meta.json"
    assert (one.path / meta).read_bytes() == (two.path / meta).read_bytes()
    assert "valid_loss" in (one.path / meta).read_text()


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    cfg, blocked = _config(), RunFolder(tmp_path / "blocked")
    blocked.path.mkdir()
    blocked.checkpoints.write_text("a file where the folder should be")
    told: list[str] = []
    save(cfg, blocked, _saved(cfg), "d", told.append)
    assert len(told) == 1 and told[0].startswith("step 7: ")


def test_a_setting_that_an_older_version_did_not_know_is_no_change(tmp_path: Path) -> None:
    cfg = _config()
    settings = recorded(cfg)
    del settings["trainer"]["skip_nonfinite"], settings["data"]["augment"]["rir_prob"]
    settings["optim"]["sched"] = None
    whole = _completed(settings, recorded(Config()))
    assert whole["trainer"]["skip_nonfinite"] == 0 and whole["data"]["augment"]["rir_prob"] == 0
    assert whole["optim"]["sched"] is None and whole["optim"]["lr"] == cfg.optim.lr

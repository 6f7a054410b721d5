"""A run's checkpoints: the whole of its progress, so that it goes on to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.checkpoint import retention
from nest_fn.config import Config
from nest_fn.files.atomic import anything
from nest_fn.layers.tree import check_same, flatten, tree_map, unflatten
from nest_fn.layers.types import Tensor
from nest_fn.model import abstract
from nest_fn.train.errors import CheckpointError, UsageError
from nest_fn.train.step.optimizer import AdamState, MomentumState
from nest_fn.train.step.step import TrainState, start_from

from .progress import Progress
from .run_folder import RunFolder

# Settings that may change between parts of a run; the arithmetic of the steps to come is then what they say.
_FREE = (
    "trainer.max_steps", "trainer.log_every", "trainer.valid_every", "trainer.save_every", "trainer.keep_last",
    "trainer.keep_best", "trainer.keep_every", "trainer.skip_nonfinite", "trainer.skip_norm",
    "trainer.stop_on_collapse", "trainer.shard", "trainer.recompute",
    "trainer.device", "trainer.compile", "optim.lr", "optim.sched.max_steps",
    "data.noise_budget_mb", "data.valid", "data.valid_shards", "data.root", "data.remote_cache",
    "data.train", "data.train_shards", "data.noise", "data.rir",  # where the data lies; what it is, the digest says
)  # fmt: skip

# Settings of the machine at hand, not of the run: they are not written into checkpoints.
_LOCAL = (
    "data.num_workers", "data.prefetch", "data.timeout_s", "data.check_files", "data.remote_cache",
    "data.remote_cache_mb",
    "trainer.threads", "trainer.rank_timeout_s", "trainer.collective_timeout_s", "trainer.loggers",
    "trainer.digest_every",
)  # fmt: skip


def save(
    cfg: Config, folder: RunFolder, progress: Progress, digest: str, warn: Callable[[str], None], passing: bool = False
) -> bool:
    """Write a checkpoint and drop old ones; whether it is there. A failure is reported and changes nothing.

    A ``passing`` one, made because a stop was asked for, goes with the next save and pushes no other one out, so that
    an interrupted run keeps the same checkpoints as any other. It has no validation loss to be among the best by.
    """
    path = retention.step_path(folder.checkpoints, progress.ts.step)
    scored = progress.valid_loss is not None and isfinite(progress.valid_loss) and not passing
    extra = ({"passing": True} if passing else {}) | ({"valid_loss": progress.valid_loss} if scored else {})
    try:
        if not _stands(path, _meta(progress, digest) | extra):
            write(cfg, path, progress, digest, extra)
    except CheckpointError as error:
        warn(f"step {progress.ts.step}: {error}")
        return False
    for other in retention.list_checkpoints(folder.checkpoints):
        if other != path and _is_passing(other):
            retention.discard(other)
    if not passing:
        keep = cfg.trainer
        retention.prune(folder.checkpoints, keep.keep_last, keep.keep_best, keep.keep_every)
    return True


def write(cfg: Config, path: Path, progress: Progress, digest: str, extra: Mapping[str, Any]) -> None:
    """Write a checkpoint with further values in its meta. Raises ``CheckpointError``."""
    trees = trees_of(progress)
    meta = _meta(progress, digest) | dict(extra)
    checkpoint_folder.write_checkpoint(path, trees, recorded(cfg), meta, replaces=anything)


def trees_of(progress: Progress) -> dict[str, Any]:
    """All tensors of a progress, as the trees that a checkpoint holds."""
    ts = progress.ts
    trees = {"params": ts.params, "state": ts.state, "optimizer": optimizer_tree(ts.opt_state), "ema": ts.ema}
    return trees | {"window": dict(progress.window)}


def check_keeping(cfg: Config) -> None:
    """Raise ``UsageError`` if the best checkpoints are to be kept and there is no validation to rank them."""
    trainer = cfg.trainer
    if trainer.keep_best > 0 and not cfg.data.valid:
        raise UsageError(
            f"trainer.keep_best is {trainer.keep_best} and data.valid names no manifest; the best checkpoints are "
            "those of the lowest validation loss, so set data.valid, or trainer.keep_best=0."
        )


def _meta(progress: Progress, digest: str) -> dict[str, Any]:
    place = {"step": progress.ts.step, "epoch": progress.epoch, "batch": progress.batch, "data_digest": digest}
    return (
        place
        | ({"skipped": progress.skipped} if progress.skipped else {})
        | ({"init": progress.init} if progress.init else {})
    )


def _stands(path: Path, meta: Mapping[str, Any]) -> bool:
    """Whether a whole checkpoint with this meta is there already."""
    try:
        return path.exists() and bool(checkpoint_folder.verify(path)["meta"] == meta)
    except CheckpointError:
        return False


def _is_passing(path: Path) -> bool:
    try:
        return bool(checkpoint_folder.read_meta(path)["meta"].get("passing"))
    except CheckpointError:
        return False


def recorded(cfg: Config) -> dict[str, Any]:
    """The config as a checkpoint holds it, so that equal runs on different machines write equal bytes."""
    settings = cfg.to_dict()
    for path in _LOCAL:
        section, key = path.split(".")
        settings[section].pop(key, None)
    return settings


def restore(
    cfg: Config, folder: RunFolder, digest: str, warn: Callable[[str], None], device: torch.device, resume: str,
    allow_changes: bool,
) -> Progress | None:  # fmt: skip
    """The newest good checkpoint of the run, or None to start afresh. See ``pretrain`` for ``resume``."""
    present = retention.list_checkpoints(folder.checkpoints)
    if resume == "never" and present:
        raise CheckpointError(
            f"run folder {folder.path} holds {len(present)} checkpoints; go on with --resume auto, or choose another."
        )
    if not present:
        if resume == "must":
            raise CheckpointError(f"run folder {folder.path} holds no checkpoint, and --resume must wants one.")
        return None
    path, problems = retention.newest_valid(folder.checkpoints)
    for problem in problems:
        if resume == "must":
            raise CheckpointError(f"{problem.rstrip('.')}; --resume auto would take the one before it.")
        warn(problem)
    if path is None:
        raise CheckpointError(f"run folder {folder.path}: no checkpoint is whole; choose another folder with --folder.")
    return load(cfg, path, digest, warn, device, allow_changes)


def load(
    cfg: Config, path: Path, digest: str, warn: Callable[[str], None], device: torch.device, allow_changes: bool
) -> Progress:
    """The progress that one checkpoint holds, on ``device``. Raises ``CheckpointError``."""
    trees, settings, meta = checkpoint_folder.read_checkpoint(path)
    if "data_digest" not in meta:
        raise CheckpointError(
            f"{path}: holds a model and no run, so none can go on from it; take it out of the folder."
        )
    refuse_changes(cfg, settings, meta, digest, allow_changes, warn)
    return _from_trees(cfg, tree_map(lambda leaf: leaf.to(device), trees), meta)


def _from_trees(cfg: Config, trees: dict[str, Any], meta: dict[str, Any]) -> Progress:
    try:
        check_same("params", trees["params"], abstract(cfg)[0])
        check_same("state", trees["state"], abstract(cfg)[1])
        fresh = start_from(trees["params"], trees["state"], cfg)
        check_same("optimizer", trees["optimizer"], optimizer_tree(fresh.opt_state))
    except ValueError as error:
        raise CheckpointError(f"the checkpoint is of another model: {error}; no run can go on from it.") from error
    opt_state = optimizer_state(trees["optimizer"])
    ema = (trees["ema"] or fresh.ema) if fresh.ema else {}
    ts = TrainState(int(meta["step"]), trees["params"], trees["state"], opt_state, ema)
    window = {name: leaf.to("cpu") for name, leaf in trees["window"].items()}
    skipped, init = int(meta.get("skipped", 0)), str(meta.get("init", ""))
    return Progress(ts, int(meta["epoch"]), int(meta["batch"]), window, skipped, init=init)


def optimizer_tree(state: Any) -> dict[str, Any]:
    """An optimizer's NamedTuple of leaves by path, as a tree."""
    return {name: unflatten(part) if isinstance(part, dict) else part for name, part in state._asdict().items()}


def optimizer_state(tree: dict[str, Any]) -> AdamState | MomentumState:
    """The optimizer's state from the tree that ``optimizer_tree`` made."""

    def leaves(name: str) -> dict[str, Tensor]:
        return flatten(tree[name])

    if "mean" in tree:
        return AdamState(tree["updates"], leaves("mean"), leaves("square"))
    return MomentumState(tree["updates"], leaves("velocity"))


def _completed(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, completed by the defaults of settings that are newer than it: these do what it did."""
    whole = {**defaults, **settings}
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, dict) and isinstance(default, dict):
            whole[name] = _completed(value, default)
    return whole


def refuse_changes(
    cfg: Config, settings: dict[str, Any], meta: dict[str, Any], digest: str, allow: bool, warn: Callable[[str], None]
) -> None:
    """Compare config and data with those of a checkpoint, key by key; report what may change.

    Raises ``CheckpointError`` for what may not, or tells it where ``allow`` is true.
    """
    then, now = flatten(_completed(settings, recorded(Config()))), flatten(recorded(cfg))
    other = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    free = [key for key in other if any(key == name or key.startswith(f"{name}.") for name in _FREE)]
    told = [f"{key}: {then.get(key)} -> {now.get(key)}" for key in free if key.startswith(("optim.", "trainer."))]
    changed = [f"{key}: was {then.get(key)!r}, is {now.get(key)!r}" for key in other if key not in free]
    if meta["data_digest"] != digest:
        changed.append("data: the manifests or the batching are not those of the checkpoint")
    text = "; ".join(changed)
    if changed and not allow:
        raise CheckpointError(
            f"the run in this folder was started otherwise: {text}. Choose another folder with --folder, "
            "or go on all the same with --allow-changes."
        )
    if told:
        warn(f"settings changed since step {meta['step']}: {'; '.join(told)}")
    if changed:
        warn(f"going on with changes, so the run is no longer one: {text}")

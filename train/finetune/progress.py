"""All that changes during a fine-tuning run, as one value, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.checkpoint import retention
from nest_fn.config import Config
from nest_fn.files.atomic import anything
from nest_fn.layers.tree import check_same, tree_map
from nest_fn.layers.types import Tensor
from nest_fn.train.ctc.model_files import Recogniser, recogniser_trees
from nest_fn.train.ctc.step import FinetuneState
from nest_fn.train.ctc.tokens import Tokenizer
from nest_fn.train.errors import CheckpointError
from nest_fn.train.run.record.checkpoints import optimizer_state, optimizer_tree, recorded


class Progress(NamedTuple):
    """Where a run is: after ``ts.step`` updates, before batch ``batch`` of epoch ``epoch``."""

    ts: FinetuneState
    epoch: int = 0
    batch: int = 0
    window: Mapping[str, Tensor] = {}
    best: Mapping[str, Any] | None = None  # rates of the best validation, and its step
    started: float = 0.0  # of the window on the monotonic clock, s; not written


def save(
    cfg: Config, folder: Path, progress: Progress, made: Recogniser, passing: bool, warn: Callable[[str], None]
) -> bool:
    """Write a checkpoint and drop old ones; whether it is there. A failure is reported and changes nothing.

    A ``passing`` one, made because a stop was asked for, goes with the next save.
    """
    ts, path = progress.ts, retention.step_path(folder, progress.ts.step)
    trees, values = recogniser_trees(made)
    trees |= {
        "encoder_optimizer": optimizer_tree(ts.encoder_opt),
        "head_optimizer": optimizer_tree(ts.head_opt),
        "window": dict(progress.window),
    }
    meta = {**values, "step": ts.step, "epoch": progress.epoch, "batch": progress.batch, "best": progress.best}
    try:
        checkpoint_folder.write_checkpoint(
            path, trees, recorded(cfg), meta | ({"passing": True} if passing else {}), replaces=anything
        )
    except CheckpointError as error:
        warn(f"step {ts.step}: {error}")
        return False
    if not passing:
        for other in retention.list_checkpoints(folder):
            if other != path and _is_passing(other):
                retention.discard(other)
        retention.prune(folder, cfg.trainer.keep_last)
    return True


def restore(folder: Path, fresh: Progress, tokenizer: Tokenizer, warn: Callable[[str], None]) -> Progress | None:
    """The newest good checkpoint, None if there is none; ``fresh`` is the start of the run, to compare with.

    Raises ``CheckpointError`` if there are checkpoints and none is whole or of this run's model.
    """
    path, problems = retention.newest_valid(folder)
    for problem in problems:
        warn(problem)
    if path is None:
        if problems:
            raise CheckpointError(f"{folder}: no checkpoint is whole; choose another folder with --out.")
        return None
    trees, _, meta = checkpoint_folder.read_checkpoint(path)
    start = fresh.ts
    try:
        for name, wanted in (("params", start.params), ("state", start.state), ("head", start.head)):
            check_same(name, trees[name], wanted)
        check_same("encoder_optimizer", trees["encoder_optimizer"], optimizer_tree(start.encoder_opt))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: is of another model: {error}; choose another folder with --out.") from error
    if bytes(trees["tokenizer"]["content"].numpy().tobytes()) != tokenizer.content:
        raise CheckpointError(f"{path}: has other tokens than the run; choose another folder with --out.")
    device = next(iter(start.head["linear"].values())).device
    trees = tree_map(lambda leaf: leaf.to(device), trees)
    ts = FinetuneState(
        int(meta["step"]), trees["params"], trees["head"], trees["state"],
        optimizer_state(trees["encoder_optimizer"]), optimizer_state(trees["head_optimizer"]),
    )  # fmt: skip
    window = {name: leaf.to("cpu") for name, leaf in trees["window"].items()}
    return Progress(ts, int(meta["epoch"]), int(meta["batch"]), window, meta["best"])


def broadcast(progress: Progress, ranks: Any) -> Progress:
    """Rank 0's progress on every rank; each brings one of equal shapes."""
    without = progress._replace(ts=FinetuneState(progress.ts.step, {}, {}, {}, None, None))
    received = ranks.broadcast_object(without)
    ts = progress.ts
    leaves: list[Tensor] = []
    tree_map(lambda leaf: leaves.append(leaf), [ts.params, ts.head, ts.state])
    for opt in (ts.encoder_opt, ts.head_opt):
        for part in opt:
            leaves += part.values() if isinstance(part, dict) else (part,)
    ranks.broadcast_(leaves)
    return Progress(ts._replace(step=received.ts.step), received.epoch, received.batch, received.window, received.best)


def add(window: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add a step to a window: sums, and the last gradient norm and learning rate."""
    summed = {"loss_sum", "utterances", "impossible", "audio_samples"}
    now = {name: value.detach().to("cpu", torch.float64) for name, value in values.items()}
    now["steps"] = torch.ones((), dtype=torch.float64)
    return {
        name: window[name] + value if name in window and (name in summed or name == "steps") else value
        for name, value in now.items()
    }


def _is_passing(path: Path) -> bool:
    try:
        return bool(checkpoint_folder.read_meta(path)["meta"].get("passing"))
    except CheckpointError:
        return False

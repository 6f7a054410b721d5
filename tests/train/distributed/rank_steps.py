"""Some training steps in float64, alone or as one of several ranks: the program that ``test_ranks.py`` starts.

    python -m tests.train.distributed.rank_steps OUT KEY=VALUE... -- STEPS KEY=VALUE... -- ...

runs the preset tiny once for each group of overrides, each beside the first group, and writes to OUT, on rank 0, loss,
masked tokens and gradient norm of each step and the whole train state at the end.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import flatten, tree_map
from nest_fn.train.augment.speaker_exchange import gather_speaker_pool
from nest_fn.train.data.dataset import batches, open_dataset
from nest_fn.train.data.transfer import to_device
from nest_fn.train.distributed.launch import Job, init_ranks
from nest_fn.train.distributed.sharding import Sharding, make_sharding
from nest_fn.train.run.batch import micro_batches
from nest_fn.train.run.state_sharding import shard_state, unshard_state
from nest_fn.train.step.compiled import EAGER, compile_parts
from nest_fn.train.step.step import TrainState, init_train_state, make_step, training_loss

CPU = torch.device("cpu")


def in_float64(tree: Any) -> Any:
    """A tree whose numbers that are not counts have 53 bits."""
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def run(cfg: Config, job: Job, steps: int) -> dict[str, Any]:
    """``steps`` updates from one beginning; what they gave."""
    ts = init_train_state(random.key(0), cfg)
    moments = {name: in_float64(part) for name, part in ts.opt_state._asdict().items() if isinstance(part, dict)}
    ts = ts._replace(
        params=in_float64(ts.params), state=in_float64(ts.state), ema=in_float64(ts.ema),
        opt_state=ts.opt_state._replace(**moments),
    )  # fmt: skip
    ranks, parts = job.ranks, cfg.trainer.accumulate
    sharding = make_sharding(flatten(ts.params), ranks, CPU) if cfg.trainer.shard else Sharding(ranks)
    ts = shard_state(ts, sharding)
    # All but code generation, which takes minutes on a CPU.
    functions = compile_parts(lambda _: "aot_eager") if cfg.trainer.compile == "on" else EAGER
    loss = training_loss(cfg, sharding=sharding, parts=functions)
    step = make_step(cfg, donate=True, loss=loss, sharding=sharding)
    stream = batches(open_dataset(cfg.data, 0), rank=ranks.rank, world=ranks.world, parts=parts)
    lines = []
    for number in range(steps):
        raw, key = next(stream), random.fold_in(random.key(1), number)
        pool = gather_speaker_pool(raw, raw["audio"], cfg.data.augment, key, ranks)
        ts, metrics = step(ts, micro_batches(to_device(raw, CPU), parts, pool), key)
        lines.append({name: metrics[name].double() for name in ("loss_sum", "masked_tokens", "grad_norm")})
    held = sum(leaf.numel() for leaf in flatten(ts.params).values())
    return {"lines": lines, "leaves": leaves(unshard_state(ts, sharding)), "cut": len(sharding.sharded), "held": held}


def leaves(ts: TrainState) -> dict[str, torch.Tensor]:
    """All tensors of a train state by path."""
    trees: dict[str, Any] = {"params": ts.params, "state": ts.state, "optimizer": list(ts.opt_state), "ema": ts.ema}
    return flatten(trees)


def main() -> None:
    out, *words = sys.argv[1:]
    first, *others = [group.split() for group in " ".join(words).split(" -- ")]
    with init_ranks(20.0, 120.0, lambda error: os._exit(error.exit_code)) as job:
        found = [run(Config.preset("tiny", [*first, *more]), job, int(steps)) for steps, *more in others]
        if job.ranks.is_main:
            torch.save(found, out)


if __name__ == "__main__":
    main()

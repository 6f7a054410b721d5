"""A train state over ranks: the same on all of them, cut among them, and whole again to be saved."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nest_fn.layers import random
from nest_fn.layers.tree import fill, flatten
from nest_fn.layers.types import Params, Tensor
from nest_fn.train.distributed.sharding import Sharding
from nest_fn.train.step.step import TrainState, init_train_state

from .context import INIT, Run
from .record.checkpoints import Saved

Leaves = dict[str, Tensor]


def beginning(run: Run) -> TrainState:
    """A run's first train state, which its seed says."""
    return init_train_state(random.fold_in(run.key, INIT), run.cfg)


def share(saved: Saved | None, run: Run) -> Saved:
    """What rank 0 restored, or a run's beginning where that is None, on every rank, cut as the run says."""
    ranks = run.ranks
    ts = beginning(run) if saved is None else saved.ts
    head = ranks.from_first(None if saved is None else saved._replace(ts=TrainState(ts.step, {}, {}, None, {})))
    same(ts, run.sharding)
    head = Saved(ts, 0, 0, {}) if head is None else head._replace(ts=ts._replace(step=head.ts.step))
    return head._replace(ts=cut(head.ts, run.sharding))


def cut(ts: TrainState, sharding: Sharding) -> TrainState:
    """This rank's part of a whole train state."""
    return _map(ts, sharding.own) if sharding.cut else ts


def whole(ts: TrainState, sharding: Sharding) -> TrainState:
    """The whole of it, on every rank, from all ranks' parts."""
    with torch.no_grad():
        return _map(ts, sharding.assemble) if sharding.cut else ts


def whole_params(params: Params, sharding: Sharding) -> Params:
    """Parameters alone, made whole."""
    with torch.no_grad():
        return fill(params, sharding.assemble(flatten(params))) if sharding.cut else params


def same(ts: TrainState, sharding: Sharding) -> None:
    """Overwrite a whole train state by that of rank 0."""
    leaves = [*flatten(ts.params).values(), *flatten(ts.state).values()]
    leaves += flatten(ts.ema).values() if ts.ema else ()
    for part in ts.opt_state:
        leaves += part.values() if isinstance(part, dict) else (part,)
    sharding.ranks.same(leaves)


def _map(ts: TrainState, f: Callable[[Leaves], Leaves]) -> TrainState:
    """All that has a parameter's shape: parameters, their average, and what the optimizer remembers of each."""
    remembered = {name: f(part) for name, part in ts.opt_state._asdict().items() if isinstance(part, dict)}
    return ts._replace(
        params=fill(ts.params, f(flatten(ts.params))),
        ema=fill(ts.ema, f(flatten(ts.ema))) if ts.ema else ts.ema,
        opt_state=ts.opt_state._replace(**remembered),
    )

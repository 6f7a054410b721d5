"""A train state over ranks: broadcast from rank 0, sharded for training, and unsharded to be saved."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nest_fn.interop.take_over import TakenOver, take_over
from nest_fn.layers.tree import fill, flatten
from nest_fn.layers.types import Params, Tensor
from nest_fn.model import init
from nest_fn.train.distributed.sharding import Sharding
from nest_fn.train.errors import CheckpointError
from nest_fn.train.keys import init_key
from nest_fn.train.step.step import TrainState, init_train_state, start_from

from .context import Run
from .record.progress import Progress

Leaves = dict[str, Tensor]


def initial_train_state(run: Run) -> TrainState:
    """The train state before step 1, a function of the run's seed, and of the model that it begins from."""
    if run.initial is None:
        return init_train_state(init_key(run.key), run.cfg)
    made = taken_over(run)
    return start_from(made.params, made.state, run.cfg)


def taken_over(run: Run) -> TakenOver:
    """The model that the run begins from, in the shapes of its config.

    Raises ``CheckpointError`` if no part of the encoder fits.
    """
    assert run.initial is not None
    made = take_over(*init(init_key(run.key), run.cfg), run.initial.params, run.initial.state)
    if not any(part.startswith("encoder.") for part in made.taken):
        raise CheckpointError(
            f"--init {run.initial.source}: no part of its encoder fits the config: {made.fresh[0]}; leave -c out, and "
            "the config is that of the file."
        )
    return made


def broadcast_progress(restored: Progress | None, run: Run) -> Progress:
    """What rank 0 restored, or the start of the run where that is None: on every rank, sharded as the run says."""
    ts = initial_train_state(run) if restored is None else restored.ts
    without_tensors = None if restored is None else restored._replace(ts=TrainState(ts.step, {}, {}, None, {}))
    received = run.ranks.broadcast_object(without_tensors)
    broadcast_(ts, run.sharding)
    if received is None:
        digest = "" if run.initial is None else run.initial.digest
        return Progress(shard_state(ts, run.sharding), 0, 0, {}, init=digest)
    return received._replace(ts=shard_state(ts._replace(step=received.ts.step), run.sharding))


def shard_state(ts: TrainState, sharding: Sharding) -> TrainState:
    """This rank's shard of a full train state."""
    return _map(ts, sharding.shard) if sharding.sharded else ts


def unshard_state(ts: TrainState, sharding: Sharding) -> TrainState:
    """The full train state, on every rank, from all ranks' shards."""
    with torch.no_grad():
        return _map(ts, sharding.all_gather) if sharding.sharded else ts


def unshard_params(params: Params, sharding: Sharding) -> Params:
    """The full parameters alone."""
    with torch.no_grad():
        return fill(params, sharding.all_gather(flatten(params))) if sharding.sharded else params


def broadcast_(ts: TrainState, sharding: Sharding) -> None:
    """Overwrite a full train state by that of rank 0."""
    leaves = [*flatten(ts.params).values(), *flatten(ts.state).values()]
    leaves += flatten(ts.ema).values() if ts.ema else ()
    for part in ts.opt_state:
        leaves += part.values() if isinstance(part, dict) else (part,)
    sharding.ranks.broadcast_(leaves)


def _map(ts: TrainState, f: Callable[[Leaves], Leaves]) -> TrainState:
    """All that has a parameter's shape: parameters, their average, and the optimizer's moments."""
    remembered = {name: f(part) for name, part in ts.opt_state._asdict().items() if isinstance(part, dict)}
    return ts._replace(
        params=fill(ts.params, f(flatten(ts.params))),
        ema=fill(ts.ema, f(flatten(ts.ema))) if ts.ema else ts.ema,
        opt_state=ts.opt_state._replace(**remembered),
    )

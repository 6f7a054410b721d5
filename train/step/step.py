"""One training step as a function: ``step(train_state, batches, key) -> (train_state, metrics)``.

Gradients come from autograd around the loss, whose parts may be compiled: detached leaves go in, gradients come out,
and nothing that was given has changed (docs/design.md, "Two gradient engines"). A key goes in and never comes out:
``fold_in(root, step)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch

from nest_fn.config import Config
from nest_fn.layers.tree import fill, flatten, tree_map
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.mel import Tables
from nest_fn.model import init, loss_sum
from nest_fn.train.distributed.collectives import Ranks
from nest_fn.train.distributed.sharding import REPLICATED, Sharding
from nest_fn.train.errors import NonFiniteError

from .compiled import EAGER, StepParts
from .optimizer import Optimizer, make_optimizer, scale
from .schedule import Schedule, make_schedule

OVERWRITTEN = "the update broke off in the middle, and the train state is overwritten in part"
"""A note on every error of an update with ``donate=True``."""

Metrics = dict[str, Tensor]
LossSum = Callable[..., tuple[Tensor, tuple[Metrics, State]]]


class TrainState(NamedTuple):
    """All that a run changes. ``ema`` is empty unless ``trainer.ema_decay`` asks for averaged parameters."""

    step: int  # updates done
    params: Params
    state: State
    opt_state: Any
    ema: Params


class RefusedUpdate(NonFiniteError):
    """An update that was not made: its loss or gradient norm is not finite, or the norm is above ``skip_norm``."""

    def __init__(
        self, ts: TrainState, metrics: Metrics, grads: Mapping[str, Tensor], skip_norm: float, ranks: Ranks
    ) -> None:
        self.step, self.metrics = ts.step, metrics
        self.loss = float(metrics["loss_sum"]) / max(float(metrics["masked_tokens"]), 1.0)  # nats
        self.norm = float(metrics["grad_norm"])
        self.finite = isfinite(self.loss) and isfinite(self.norm)
        bad = torch.stack([(~torch.isfinite(grad)).any().to(torch.float32) for grad in grads.values()])
        everywhere = ranks.all_reduce_sum({"bad": bad})["bad"].tolist()  # of a sharded leaf each rank sees its own rows
        self.wrong = [path for path, count in zip(grads, everywhere, strict=True) if count > 0]
        above = f" above trainer.skip_norm {skip_norm:g}" if self.finite else ""
        super().__init__(
            f"step {ts.step}: loss {self.loss:g}, gradient norm {self.norm:g}{above}; nothing was updated."
        )


def init_train_state(key: Key, cfg: Config) -> TrainState:
    """The train state of a new run: parameters and state from ``key``, a fresh optimizer."""
    params, state = init(key, cfg)
    return start_from(params, state, cfg)


def start_from(params: Params, state: State, cfg: Config) -> TrainState:
    """The train state of a run that starts from given parameters."""
    optimizer = make_optimizer(cfg.optim)
    ema = tree_map(torch.clone, params) if cfg.trainer.ema_decay > 0 else {}
    return TrainState(0, params, state, optimizer.init(_trained(flatten(params), cfg)), ema)


def value_and_grad(f: LossSum) -> Callable[..., tuple[tuple[Tensor, tuple[Metrics, State]], dict[str, Tensor]]]:
    """``f(params, ...) -> (value, aux)`` to ``g(params, leaves, ...) -> ((value, aux), gradients by path)``.

    ``leaves`` are the paths to differentiate by. Autograd stands outside of ``f``, which may be compiled.
    """

    def g(params: Params, paths: Sequence[str], *args: Any) -> Any:
        flat = flatten(params)
        flat = {path: leaf.detach() for path, leaf in flat.items()}
        leaves = [flat[path].requires_grad_() for path in paths]
        value, aux = f(fill(params, flat), *args)
        grads = torch.autograd.grad(value, leaves, materialize_grads=True)
        return (value.detach(), aux), dict(zip(paths, grads, strict=True))

    return g


def training_loss(
    cfg: Config, rirs: Tensor | None = None, sharding: Sharding = REPLICATED, *,
    parts: StepParts = EAGER, tables: Tables | None = None,
) -> LossSum:  # fmt: skip
    """``f(params, state, raw, key)``: mix, mask, encode, compare; a sum, with its metrics and the new state.

    Draws are named by utterance, so that they do not depend on how a batch is cut into parts or over ranks; nor do the
    speakers mixed in, if ``raw`` holds all rows of the batch under ``pool``. ``rirs`` float ``[R, L]`` are room
    responses for ``data.augment.rir_prob``. Of several ranks each sums over its own rows, batch statistics are over all
    rows, and ``params`` are the rank's shards. ``parts`` are the functions that it calls, as
    they are or compiled; ``tables`` those of the preprocessor, on the device, if they are not to be made each time.
    """
    gather = None if sharding.ranks.is_single else sharding.ranks.all_gather
    dtype = torch.bfloat16 if cfg.trainer.precision == "bf16" else None

    def f(params: Params, state: State, raw: Mapping[str, Any], key: Key) -> tuple[Tensor, tuple[Metrics, State]]:
        batch, model = parts.mix(raw, cfg, key, rirs)
        if sharding.sharded:
            params = fill(params, sharding.all_gather(flatten(params), dtype))
        return loss_sum(
            cast(params, cfg), state, batch, cfg,
            key=model, train=True, gather=gather, tables=tables, parts=parts.model,
        )  # fmt: skip

    return f


def make_step(
    cfg: Config,
    *,
    donate: bool = False,
    loss: LossSum | None = None,
    sharding: Sharding = REPLICATED,
) -> Callable[[TrainState, Sequence[Mapping[str, Any]], Key], tuple[TrainState, Metrics]]:
    """The step of a config. ``donate=True`` lets it overwrite the given train state's tensors.

    ``step(ts, batches, key)`` sums over ``batches`` (micro-batches of one update) and over ranks, and divides by the
    masked tokens of all. Metrics are sums over the update, with ``grad_norm`` and ``lr``. Raises ``RefusedUpdate``, on
    all ranks alike and before anything is changed, where loss or gradient norm is not finite or the norm is above
    ``trainer.skip_norm``.
    """
    f = loss if loss is not None else training_loss(cfg, sharding=sharding)
    grads_of = value_and_grad(f)
    optimizer, schedule = make_optimizer(cfg.optim), make_schedule(cfg)

    def step(ts: TrainState, batches: Sequence[Mapping[str, Any]], key: Key) -> tuple[TrainState, Metrics]:
        paths = list(_trained(flatten(ts.params), cfg))
        total: Metrics = {}
        grads: dict[str, Tensor] = {}
        state = ts.state
        for batch in batches:
            (_, (metrics, state)), part = grads_of(ts.params, paths, state, batch, key)
            total = metrics if not total else {name: total[name] + metrics[name] for name in total}
            grads = part if not grads else {path: grads[path] + part[path] for path in paths}
        grads, total = sharding.all_reduce_grads(grads), _total(total, sharding.ranks)
        factor = 1.0 / total["masked_tokens"].clamp(min=1).to(torch.float32)
        norm = sharding.global_norm(grads) * factor
        total |= {"grad_norm": norm, "lr": torch.tensor(schedule(ts.step), dtype=torch.float64)}
        if not _acceptable(total["loss_sum"], norm, cfg.trainer.skip_norm):
            raise RefusedUpdate(ts, total, grads, cfg.trainer.skip_norm, sharding.ranks)
        if cfg.trainer.clip_norm > 0:
            factor = factor * (cfg.trainer.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = scale(grads, factor)
        try:
            return _update(ts, state, grads, optimizer, schedule, cfg, donate), total
        except BaseException as error:
            if donate:
                error.add_note(OVERWRITTEN)
            raise

    return step


def _total(metrics: Metrics, ranks: Ranks) -> Metrics:
    """Sums over the ranks, exact for counts, in one collective."""
    if ranks.is_single:
        return metrics
    summed = ranks.all_reduce_sum({name: metric.to(torch.float64) for name, metric in metrics.items()})
    return {name: summed[name].to(metric.dtype) for name, metric in metrics.items()}


def _update(
    ts: TrainState, state: State, grads: dict[str, Tensor], optimizer: Optimizer, schedule: Schedule, cfg: Config,
    donate: bool,
) -> TrainState:  # fmt: skip
    flat = flatten(ts.params)
    trained = {path: flat[path].detach() for path in grads}
    moved, opt_state = optimizer.update(trained, grads, ts.opt_state, schedule(ts.step), donate=donate)
    params = fill(ts.params, flat | moved)
    ema = ts.ema
    if ema:
        ema = tree_map(lambda mean, leaf: torch.lerp(mean, leaf, 1.0 - cfg.trainer.ema_decay), ema, params)
    return TrainState(ts.step + 1, params, state, opt_state, ema)


def _trained(leaves: dict[str, Tensor], cfg: Config) -> dict[str, Tensor]:
    """Parameters that have a gradient. Others are neither updated nor decayed, as in the reference (Q18)."""
    frozen = cfg.mask_position == "post_conv" and cfg.encoder.detach_subsampling
    return {path: leaf for path, leaf in leaves.items() if not (frozen and path.startswith("encoder.subsampling."))}


def cast(params: Params, cfg: Config) -> Params:
    """Parameters in the precision of the arithmetic; gradients flow back to the float32 ones."""
    return tree_map(lambda leaf: leaf.to(torch.bfloat16), params) if cfg.trainer.precision == "bf16" else params


def _acceptable(loss: Tensor, norm: Tensor, skip_norm: float) -> bool:
    """Whether the update may be made; the only point of a step at which the host waits for the device."""
    good = torch.isfinite(loss) & torch.isfinite(norm)
    return bool(good & (norm <= skip_norm) if skip_norm > 0 else good)

"""One fine-tuning step as a function: ``step(ts, batches, key) -> (ts, metrics)``.

The loss of an utterance is CTC (Graves et al., ICML 2006) in nats per token, that of a batch the mean over its
utterances, whatever the number of ranks and micro-batches. The encoder has its own learning rate, and stands still for
the first steps: it is then in evaluation mode (no dropout, running statistics unchanged), and has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nest_fn.config import Config
from nest_fn.layers.tree import fill, flatten, global_norm
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.mel import Tables
from nest_fn.parts import EAGER, Parts
from nest_fn.train.distributed.collectives import ALONE, Ranks
from nest_fn.train.errors import NonFiniteError
from nest_fn.train.step.optimizer import make_optimizer, scale
from nest_fn.train.step.schedule import make_schedule

from .recogniser import Design, cast, step_keys, token_log_probs, used_encoder, with_encoder
from .spec_augment import SpecAugment
from .tokens import BLANK

Metrics = dict[str, Tensor]
Batch = Mapping[str, Any]
"""``audio [B, N]``, ``audio_len [B]``, ``utterance [B]``, ``frames`` (numbers), ``targets [B, U]``, ``target_len [B]``,
``needed [B]``: the frames that CTC needs at least."""


class Recipe(NamedTuple):
    """How a recogniser is trained, beside the config's ``optim`` and ``trainer``."""

    design: Design
    frozen_steps: int | None = 0  # first steps in which only the head learns; None: all
    encoder_lr: float = 1.0  # learning rate of the encoder, as a multiple of that of the head
    masks: SpecAugment = SpecAugment()


class FinetuneState(NamedTuple):
    """All that fine-tuning changes; ``params`` and ``state`` are laid out as in pre-training."""

    step: int  # updates done
    params: Params
    head: Params
    state: State
    encoder_opt: Any
    head_opt: Any


def start(params: Params, state: State, head: Params, cfg: Config, design: Design) -> FinetuneState:
    """The state before the first step."""
    optimizer = make_optimizer(cfg.optim)
    encoder = flatten(used_encoder(params, design))
    return FinetuneState(0, params, head, state, optimizer.init(encoder), optimizer.init(flatten(head)))


def ctc_sum(log_probs: Tensor, lengths: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
    """Sum over the utterances of nats per token, with ``loss_sum``, ``utterances``, and ``impossible`` ones, left out.

    ``log_probs [B, T, C]``, ``lengths [B]``; rows without targets do not count.
    """
    given = batch["target_len"] > 0
    used = given & (lengths >= batch["needed"])
    each = F.ctc_loss(
        log_probs.transpose(0, 1), batch["targets"], lengths, batch["target_len"], blank=BLANK, reduction="none",
        zero_infinity=True,
    )  # fmt: skip
    total = torch.where(used, each / batch["target_len"].clamp(min=1), 0.0).sum()
    counts = {"utterances": used.sum(), "impossible": (given & ~used).sum()}
    return total, {"loss_sum": total.detach(), **counts}


def make_finetune_step(
    cfg: Config, recipe: Recipe, *, ranks: Ranks = ALONE, tables: Tables | None = None, parts: Parts = EAGER,
    donate: bool = False,
) -> Callable[[FinetuneState, Sequence[Batch], Key], tuple[FinetuneState, Metrics]]:  # fmt: skip
    """The step. ``donate=True`` lets it overwrite the given state's tensors.

    The step raises ``NonFiniteError``, on all ranks and before anything changes, if loss or gradient is not finite.
    """
    optimizer, schedule = make_optimizer(cfg.optim), make_schedule(cfg)
    gather = None if ranks.is_single else ranks.all_gather

    def gradients(ts: FinetuneState, state: State, batch: Batch, key: Key, frozen: bool) -> Any:
        leaves = _trained(ts, recipe.design, frozen)
        given = {path: leaf.detach().requires_grad_() for path, leaf in leaves.items()}
        encoder = used_encoder(ts.params, recipe.design)
        encoder = encoder if frozen else fill(encoder, _below(given, "encoder."))
        head = fill(ts.head, _below(given, "head."))
        log_probs, lengths, state = token_log_probs(
            with_encoder(ts.params, cast(encoder, cfg.trainer.precision)), cast(head, cfg.trainer.precision), state,
            batch, cfg, recipe.design,
            keys=step_keys(key, batch["utterance"]), train=not frozen, masks=recipe.masks,
            gather=None if frozen else gather, tables=tables, parts=parts,
        )  # fmt: skip
        total, metrics = ctc_sum(log_probs, lengths, batch)
        made = torch.autograd.grad(total, list(given.values()), materialize_grads=True)
        return dict(zip(given, made, strict=True)), metrics, state

    def step(ts: FinetuneState, batches: Sequence[Batch], key: Key) -> tuple[FinetuneState, Metrics]:
        frozen = recipe.frozen_steps is None or ts.step < recipe.frozen_steps
        grads: dict[str, Tensor] = {}
        total: Metrics = {}
        state = ts.state
        for batch in batches:
            part, metrics, state = gradients(ts, state, batch, key, frozen)
            grads = {path: grads[path] + leaf for path, leaf in part.items()} if grads else part
            total = {name: total[name] + value for name, value in metrics.items()} if total else metrics
        grads, total = ranks.all_reduce_sum(grads), ranks.all_reduce_sum(total)
        factor = 1.0 / total["utterances"].clamp(min=1).to(torch.float32)
        norm = global_norm(grads) * factor
        _check_finite(ts, total, norm)
        if cfg.trainer.clip_norm > 0:
            factor = factor * (cfg.trainer.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        rate = schedule(ts.step)
        moved = _update(ts, scale(grads, factor), state, optimizer, rate, recipe, frozen, donate)
        return moved, total | {"grad_norm": norm, "lr": torch.tensor(rate, dtype=torch.float64)}

    return step


def _update(
    ts: FinetuneState, grads: Mapping[str, Tensor], state: State, optimizer: Any, rate: float, recipe: Recipe,
    frozen: bool, donate: bool,
) -> FinetuneState:  # fmt: skip
    leaves = _trained(ts, recipe.design, frozen)
    head, head_opt = optimizer.update(_below(leaves, "head."), _below(grads, "head."), ts.head_opt, rate, donate=donate)
    moved = ts._replace(step=ts.step + 1, head=fill(ts.head, head), head_opt=head_opt)
    if frozen:
        return moved
    encoder, encoder_opt = optimizer.update(
        _below(leaves, "encoder."), _below(grads, "encoder."), ts.encoder_opt, rate * recipe.encoder_lr, donate=donate
    )
    params = with_encoder(ts.params, fill(used_encoder(ts.params, recipe.design), encoder))
    return moved._replace(params=params, state=state, encoder_opt=encoder_opt)


def _trained(ts: FinetuneState, design: Design, frozen: bool) -> dict[str, Tensor]:
    trees = {"head": ts.head} if frozen else {"head": ts.head, "encoder": used_encoder(ts.params, design)}
    return flatten(trees)


def _below(leaves: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}


def _check_finite(ts: FinetuneState, total: Metrics, norm: Tensor) -> None:
    loss = float(total["loss_sum"])
    if not isfinite(loss) or not isfinite(float(norm)):
        raise NonFiniteError(
            f"step {ts.step}: loss {loss:g}, gradient norm {float(norm):g}; nothing was updated. Lower optim.lr, or "
            "look at the data with nest-fn data validate."
        )

"""Validation with fixed masks and fixed noise: its loss is comparable from pass to pass and run to run (Q46)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from nest_fn.config import Config
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.losses import score_tokens, token_histogram
from nest_fn.model import forward
from nest_fn.train.augment.mixing import prepare_inputs
from nest_fn.train.distributed.collectives import ALONE, Ranks

from .metrics import Sums, add, summarise

Evaluate = Callable[[Params, State, Mapping[str, Any], Key], Sums]


def make_evaluate(cfg: Config, rirs: Tensor | None = None) -> Evaluate:
    """``evaluate(params, state, raw, key) -> sums`` over one batch, without dropout and with running statistics.

    Beside the training metrics it counts the unmasked tokens and how many of these are right. ``rirs`` float ``[R, L]``
    are room impulse responses for ``data.augment.rir_prob``.
    """

    @torch.no_grad()
    def evaluate(params: Params, state: State, raw: Mapping[str, Any], key: Key) -> Sums:
        batch, model = prepare_inputs(raw, cfg, key, rirs)
        output, _ = forward(params, state, batch, cfg, key=model, train=False)
        found = score_tokens(*output, cfg.loss, batch["weight"])
        books = found.tokens.shape[2]
        unmasked = found.valid & ~found.masked
        return {
            "loss_sum": torch.where(found.masked[..., None], found.losses.float(), 0.0).sum(),
            "masked_tokens": found.masked.sum() * books,
            "correct": (found.correct & found.masked[..., None]).sum(),
            "unmasked_tokens": unmasked.sum() * books,
            "unmasked_correct": (found.correct & unmasked[..., None]).sum(),
            "overflow": torch.zeros((), dtype=torch.int64),
            "valid_tokens": found.valid.sum(),
            "token_counts": token_histogram(found.tokens, found.valid, cfg.num_classes),
            "masked_token_counts": token_histogram(found.tokens, found.masked, cfg.num_classes),
        }

    return evaluate


def validate(
    evaluate: Evaluate, params: Params, state: State, batches: Iterable[Mapping[str, Any]], key: Key,
    ranks: Ranks = ALONE,
) -> dict[str, float]:  # fmt: skip
    """The report over all batches of all ranks, with ``unmasked_accuracy``. The same key gives the same masks.

    Empty if there is no batch.
    """
    window: Sums = {}
    for raw in batches:
        window = add(window, evaluate(params, state, raw, key))
    if not window:
        return {}
    window = ranks.all_reduce_sum({name: value.to("cpu") for name, value in window.items()})
    return summarise(window) | {
        "unmasked_accuracy": float(window["unmasked_correct"] / window["unmasked_tokens"].clamp(min=1))
    }

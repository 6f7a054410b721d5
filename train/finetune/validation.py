"""Validation of a recogniser: loss, and error rates of greedy decoding, over all ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nest_fn.train.ctc.decode import greedy
from nest_fn.train.ctc.recogniser import cast, token_log_probs
from nest_fn.train.ctc.scores import Errors, count_errors
from nest_fn.train.ctc.step import FinetuneState, ctc_sum
from nest_fn.train.data.dataset import RawBatch

from .context import FinetuneRun, with_targets


@torch.no_grad()
def validate(run: FinetuneRun, ts: FinetuneState, stream: Iterable[RawBatch]) -> dict[str, float]:
    """``loss`` in nats per token, ``cer`` and ``wer`` of a rank's batches, summed over all ranks.

    Without ``loss`` if no line can be aligned.
    The model is in evaluation mode. Every rank calls this with equally many batches.
    """
    precision = run.cfg.trainer.precision
    params = {**ts.params, "encoder": cast(ts.params["encoder"], precision)}
    head = cast(ts.head, precision)
    loss, used, errors = 0.0, 0, Errors()
    for raw in stream:
        (batch,) = with_targets(raw, run.valid_texts, run.cfg, run.device)
        log_probs, lengths, _ = token_log_probs(
            params, head, ts.state, batch, run.cfg, run.recipe.design, tables=run.tables
        )
        _, metrics = ctc_sum(log_probs, lengths, batch)
        loss, used = loss + float(metrics["loss_sum"]), used + int(metrics["utterances"])
        found = greedy(log_probs, lengths.tolist())
        texts = run.valid_texts.text
        pairs = [
            (run.tokenizer.decode(one.numbers), texts[name])
            for one, name in zip(found, raw["ids"], strict=True)
            if name
        ]
        errors = Errors(*(first + second for first, second in zip(errors, count_errors(pairs), strict=True)))
    return _rates(run, loss, used, errors)


def _rates(run: FinetuneRun, loss: float, used: int, errors: Errors) -> dict[str, float]:
    sums: dict[str, Any] = run.ranks.all_reduce_sum(
        {"loss": torch.tensor(loss, dtype=torch.float64), "counts": torch.tensor([used, *errors])}
    )
    used, *counts = sums["counts"].tolist()
    total = Errors(*counts)
    loss_of = {"loss": float(sums["loss"]) / used} if used else {}
    return {**loss_of, "cer": total.cer, "wer": total.wer}

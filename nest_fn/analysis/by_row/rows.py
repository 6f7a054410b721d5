"""Rows of a batch: a batch in chunks that fit a memory, and the loss of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from nest_fn.config import Config
from nest_fn.decoder import logits
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.linear import LinearParams
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.losses import token_mask
from nest_fn.model import Batch, check_batch, loss_sum
from nest_fn.parts import EAGER, Parts


def row_count(batch: Batch) -> int:
    """Rows of a batch. Raises ``TypeError`` or ``ValueError`` for what is no batch."""
    check_batch(batch)
    return int(batch["audio" if "audio" in batch else "features"].shape[0])


def name_rows(batch: Batch) -> dict[str, Tensor]:
    """The batch with ``row``, int64 ``[B]``: with it, a row draws the same numbers in any part of the batch."""
    count = row_count(batch)
    device = batch["audio" if "audio" in batch else "features"].device
    return {"row": torch.arange(count, device=device), **batch}


def chunks(batch: Batch, size: int | None = None) -> Iterator[dict[str, Tensor]]:
    """The batch in parts of at most ``size`` rows (None: whole), each of the batch's width.

    Draws stay those of the whole. Raises ``ValueError`` if ``size`` is below 1.
    """
    named, count = name_rows(batch), row_count(batch)
    size = count if size is None else size
    if size < 1:
        raise ValueError(f"chunks: size is {size} rows; want 1 or more, or None for the whole batch.")
    for start in range(0, count, size):
        yield {name: leaf[start : start + size] for name, leaf in named.items()}


def saved_bytes(f: Callable[[], Any], without: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of ``f()``, each storage once: what a chunk costs in memory.

    ``without`` are tensors ``[...]`` not to count, as they are there anyhow: the parameters.
    """
    there = {leaf.untyped_storage().data_ptr() for leaf in without}
    sizes: dict[int, int] = {}

    def keep(leaf: Tensor) -> Tensor:
        storage = leaf.untyped_storage()
        if storage.data_ptr() not in there:
            sizes[storage.data_ptr()] = storage.nbytes()
        return leaf

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda leaf: leaf):
        kept = f()  # alive to the end, so that no address is used twice
    del kept
    return sum(sizes.values())


def rows_within(memory: int, per_row: int, fixed: int = 0) -> int:
    """Rows of a chunk that fits ``memory`` bytes, at ``per_row`` bytes a row beside ``fixed`` ones; at least 1."""
    return max(1, (memory - fixed) // max(per_row, 1))


def counted_tokens(mask: Tensor, lengths: Tensor, frames: int, weight: Tensor | None, cfg: Config) -> Tensor:
    """Tokens that enter the loss: mask bool ``[B, F]``, lengths ``[B]`` in encoder frames -> bool ``[B, T]``."""
    valid = valid_mask(lengths, frames)
    if weight is not None:
        valid = valid & (weight > 0)[:, None]
    return token_mask(mask, cfg.loss) & valid


def score_rows(
    params: LinearParams, encoded: Tensor, lengths: Tensor, tokens: Tensor, mask: Tensor, weight: Tensor | None,
    cfg: Config,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """As ``losses.score``, but a sum for each row: ``[B]`` nats, with ``masked_tokens [B]`` (tokens x codebooks).

    ``encoded [B, T, D]``, ``lengths [B]`` in encoder frames, ``tokens [B, T, K]``, ``mask`` bool ``[B, F]``. The
    decoder runs on the masked tokens of each row, filled up to the largest number of a row, which the host reads.
    """
    counted = counted_tokens(mask, lengths, encoded.shape[1], weight, cfg)
    targets = tokens if tokens.ndim == 3 else tokens[..., None]
    most = max(1, int(counted.sum(dim=1).max()))
    index = (~counted).to(torch.int8).argsort(dim=1, stable=True)[:, :most]  # the masked tokens of a row come first
    filled = counted.gather(1, index)
    chosen = encoded.gather(1, index[..., None].expand(-1, -1, encoded.shape[2]))
    chosen = torch.where(filled[..., None], chosen, 0.0)
    scores = logits(params, chosen, cfg.decoder)  # [B, n, C, K]
    scores = scores if scores.dtype == torch.float64 else scores.to(torch.float32)
    wanted = targets.gather(1, index[..., None].expand(-1, -1, targets.shape[2]))
    by_class = scores.transpose(2, 3)  # [B, n, K, C]
    losses = F.cross_entropy(by_class.flatten(0, 2), wanted.flatten(), reduction="none").view_as(wanted)
    sums = torch.where(filled[..., None], losses, 0.0).sum(dim=(1, 2))
    return sums, {"masked_tokens": counted.sum(dim=1) * targets.shape[2]}


BY_ROW = EAGER._replace(score=score_rows)
"""Parts with which ``loss_sum`` returns the sum of each row, ``[B]``."""


def row_losses(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key | None, train: bool = False,
    parts: Parts = BY_ROW,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum of the loss of each row in nats, ``[B]``, and its number of masked tokens x codebooks, ``[B]``."""
    sums, (metrics, _) = loss_sum(params, state, batch, cfg, key=key, train=train, parts=parts)
    return sums, metrics["masked_tokens"]


def check_independent(what: str, cfg: Config, train: bool) -> None:
    """Raise ``ValueError`` if rows depend on their batch: batch norm in training mode."""
    if train and cfg.encoder.conv_norm_type == "batch_norm":
        raise ValueError(
            f"{what}: with batch norm in training mode a row has no gradient of its own, for its statistics are those "
            "of the batch; pass train=False, or a config with conv_norm_type=layer_norm."
        )


def plain(cfg: Config) -> Config:
    """The same function, computed so that every transform of ``torch.func`` can differentiate it, whole.

    No fused attention, which has no forward-mode gradient, and room for all masked tokens in the decoder.
    """
    return cfg.override("encoder.use_pytorch_sdpa=false", "loss.capacity=1.0")

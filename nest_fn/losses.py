"""Cross-entropy of the masked tokens (reference 5), in two equivalent forms.

``masked_cross_entropy`` takes the log-probabilities of all tokens, as the reference does. ``masked_token_loss`` first
gathers the masked tokens and runs the decoder only on them, which is about a third of the work.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .config import Config
from .config.model import DecoderConfig, LossConfig
from .config.required import required
from .decoder import logits
from .layers.lengths import valid_mask
from .layers.linear import LinearParams
from .layers.types import Tensor

_MIN_CAPACITY = 512  # least capacity of a compiled graph, in tokens


class MaskedLoss(NamedTuple):
    """Sums over masked tokens and codebooks, additive over parts of a batch; mean: ``loss_sum / max(count, 1)``."""

    loss_sum: Tensor  # nats
    count: Tensor  # type: ignore[assignment]  # int64, masked tokens x codebooks in the sum
    correct: Tensor  # int64, those of them whose most probable class is the target
    overflow: Tensor  # int64, masked tokens x codebooks left out beyond the capacity


def token_mask(mask: Tensor, cfg: LossConfig) -> Tensor:
    """Tokens that enter the loss: ``[B, F] -> bool [B, T]`` (reference 5).

    A token enters if more than the fraction ``mask_threshold`` of its frames is masked. Raises ``ValueError`` if
    ``mask`` has another shape, or if ``F`` is not a multiple of ``combine_time_steps``.
    """
    combine = required(cfg.combine_time_steps, "loss.combine_time_steps")
    if mask.ndim != 2:
        raise ValueError(f"token_mask: mask wants [B, F], got {list(mask.shape)}; drop its feature axis.")
    if mask.shape[1] % combine:  # Q9
        raise ValueError(
            f"token_mask: {mask.shape[1]} frames are no multiple of combine_time_steps {combine}; pad or crop them."
        )
    fraction = mask.reshape(mask.shape[0], mask.shape[1] // combine, combine).to(torch.float32).mean(-1)
    return fraction > cfg.mask_threshold


class TokenScores(NamedTuple):
    """Loss and correctness of each target token."""

    losses: Tensor  # [B, T, K], nats
    correct: Tensor  # bool [B, T, K], where the most probable class is the target
    tokens: Tensor  # int64 [B, T, K], the targets
    valid: Tensor  # bool [B, T], not padding, in a row with weight > 0
    masked: Tensor  # bool [B, T], valid and masked: the tokens that enter the loss


def score_tokens(
    log_probs: Tensor, lengths: Tensor, masks: Tensor, tokens: Tensor, cfg: LossConfig, weight: Tensor | None = None
) -> TokenScores:
    """Loss in nats and correctness of each token; the first four arguments are the fields of ``forward``'s output.

    ``log_probs [B, T, C, K]`` with ``tokens [B, T, K]``, or ``[B, T, C]`` with ``[B, T]``; ``lengths [B]`` in encoder
    frames; ``masks [B, M, F]``; ``weight [B]``, 0 for rows to exclude. Raises ``ValueError`` if the shapes do not match
    (Q45).
    """
    scores, targets = _by_book("score_tokens", log_probs, tokens)
    valid = valid_mask(lengths, targets.shape[1])
    if weight is not None:
        valid = valid & (weight > 0)[:, None]
    losses = -scores.gather(2, targets[:, :, None, :])[:, :, 0]
    masked = token_mask(masks[:, 0] > 0.5, cfg) & valid
    return TokenScores(losses, scores.argmax(dim=2) == targets, targets, valid, masked)


def masked_cross_entropy(log_probs: Tensor, tokens: Tensor, token_mask: Tensor) -> Tensor:
    """Mean negative log-probability in nats over masked tokens and codebooks, a scalar (reference 5).

    ``log_probs [B, T, C, K]`` with ``tokens [B, T, K]``, or ``[B, T, C]`` with ``[B, T]``; ``token_mask`` is bool
    ``[B, T]``. 0 with zero gradients if nothing is masked (Q14: the reference gives NaN). Raises ``ValueError`` if the
    shapes do not match (Q45: the reference pads shorter targets with class 0 and crops longer ones).
    """
    scores, targets = _by_book("masked_cross_entropy", log_probs, tokens)
    _check_mask("masked_cross_entropy", token_mask, scores)
    losses = -scores.gather(2, targets[:, :, None, :])[:, :, 0]  # [B, T, K]
    total = torch.where(token_mask[..., None], losses, 0.0).sum()
    return total / (token_mask.sum() * targets.shape[2]).clamp(min=1)


def _by_book(what: str, log_probs: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Add the codebook axis if it is missing: log-probabilities ``[B, T, C, K]`` and tokens ``[B, T, K]``."""
    scores, targets = (log_probs, tokens) if log_probs.ndim == 4 else (log_probs[..., None], tokens[..., None])
    if targets.shape != (*scores.shape[:2], scores.shape[3]):
        raise ValueError(
            f"{what}: log_probs {list(log_probs.shape)} want one target each, tokens are {list(tokens.shape)}; "
            "clean and noisy features must be equally long."
        )
    return scores, targets


def masked_token_loss(
    params: LinearParams,
    encoded: Tensor,
    tokens: Tensor,
    token_mask: Tensor,
    cfg: DecoderConfig,
    capacity: float = 1.0,
) -> MaskedLoss:
    """Decoder and cross-entropy on the masked tokens only: ``encoded [B, T, D], tokens [B, T, K], token_mask [B, T]``.

    The loss is in nats, in float32 (float64 if ``encoded`` is). In eager mode on a CPU, exactly the masked tokens are
    gathered. A compiled graph and ``torch.func`` transforms need static shapes, and on other devices a data-dependent
    shape would synchronise with the device: there, a buffer holds the fraction ``capacity`` of the batch's tokens (at
    least 512), and masked tokens beyond it are left out and counted in ``overflow``.

    An empty mask gives 0 with zero gradients (Q14). Raises ``ValueError`` if the shapes do not match (Q45).
    """
    targets = tokens[..., None] if tokens.ndim == 2 else tokens
    books = required(cfg.num_decoders, "decoder.num_decoders")
    if encoded.ndim != 3 or targets.shape != (*encoded.shape[:2], books):
        raise ValueError(
            f"masked_token_loss: encoded {list(encoded.shape)} want tokens [B, T, {books}], got {list(tokens.shape)}; "
            f"clean and noisy features must be equally long."
        )
    _check_mask("masked_token_loss", token_mask, encoded)
    mask = token_mask.flatten()
    index, filled = _true_indices(mask) if _shapes_may_depend_on(mask) else _pad_to_capacity(mask, capacity)
    # Unused slots of the buffer hold zeros, so that a NaN in padding cannot reach the gradient.
    chosen = torch.where(filled[:, None], encoded.flatten(0, 1)[index], 0.0)
    scores = logits(params, chosen, cfg)  # [n, C, K]
    scores = scores if scores.dtype == torch.float64 else scores.to(torch.float32)
    wanted = targets.flatten(0, 1)[index]  # [n, K]
    with torch.autocast(scores.device.type, enabled=False):
        # Classes as the last axis, over which PyTorch's softmax is many times faster on a CPU.
        by_class = scores.transpose(1, 2).flatten(0, 1)  # [n K, C]
        losses = F.cross_entropy(by_class, wanted.flatten(), reduction="none").view_as(wanted)
    count = filled.sum()
    return MaskedLoss(
        loss_sum=torch.where(filled[:, None], losses, 0.0).sum(),
        count=count * books,
        correct=((scores.argmax(1) == wanted) & filled[:, None]).sum(),
        overflow=(mask.sum() - count) * books,
    )


def score(
    params: LinearParams, encoded: Tensor, lengths: Tensor, tokens: Tensor, mask: Tensor, weight: Tensor | None,
    cfg: Config,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Sum of the loss in nats over the masked tokens of rows with ``weight > 0``, and metrics (``model.loss_sum``).

    ``encoded [B, T, D]``, ``lengths [B]`` in encoder frames, ``tokens [B, T, K]``, ``mask`` bool ``[B, F]``,
    ``weight [B]``. Raises ``ValueError`` if there are not as many encoder frames as tokens.
    """
    if encoded.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"score: {encoded.shape[1]} encoder frames for {tokens.shape[1]} tokens; the loss pairs them. With "
            "encoder.causal_downsampling there is a frame more, here as in the reference; set it to false."
        )
    valid = valid_mask(lengths, encoded.shape[1])
    if weight is not None:
        valid = valid & (weight > 0)[:, None]
    counted = token_mask(mask, cfg.loss) & valid
    masked = masked_token_loss(params, encoded, tokens, counted, cfg.decoder, cfg.loss.capacity)
    metrics = {
        "loss_sum": masked.loss_sum.detach(),
        "masked_tokens": masked.count,
        "correct": masked.correct,
        "overflow": masked.overflow,
        "valid_tokens": valid.sum(),
        "token_counts": token_histogram(tokens, valid, cfg.num_classes),
        "masked_token_counts": token_histogram(tokens, counted, cfg.num_classes),
    }
    return masked.loss_sum, metrics


def token_histogram(tokens: Tensor, counted: Tensor, classes: int) -> Tensor:
    """Count the tokens of each class: tokens ``[B, T, K]`` where ``counted [B, T]`` is True -> int64 ``[K, C]``."""
    tokens = tokens if tokens.ndim == 3 else tokens[..., None]
    by_book = tokens.flatten(0, 1).transpose(0, 1)
    weight = counted.flatten()[None].expand_as(by_book).to(torch.int64)
    return torch.zeros(by_book.shape[0], classes, dtype=torch.int64, device=tokens.device).scatter_add(
        1, by_book, weight
    )


def _check_mask(what: str, token_mask: Tensor, like: Tensor) -> None:
    if token_mask.shape != like.shape[:2] or token_mask.dtype != torch.bool:
        raise ValueError(
            f"{what}: token_mask wants bool {list(like.shape[:2])}, got {token_mask.dtype} {list(token_mask.shape)}; "
            f"make it with token_mask(mask, cfg.loss)."
        )


def _shapes_may_depend_on(mask: Tensor) -> bool:
    if mask.device.type != "cpu":
        return False
    # PyTorch 2.11 has no public function that tells whether grad, vmap or jvp is active.
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def _true_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the True elements, and a mask that is all True: ``[N] -> int64 [n], bool [n]``."""
    index = mask.nonzero()[:, 0]
    return index, torch.ones_like(index, dtype=torch.bool)


def _pad_to_capacity(mask: Tensor, capacity: float) -> tuple[Tensor, Tensor]:
    """Indices of the first True elements, padded to a fixed length: ``[N] -> int64 [n], bool [n]`` (False: unused)."""
    size = mask.shape[0]
    length = min(size, max(_MIN_CAPACITY, math.ceil(capacity * size)))
    place = mask.cumsum(0) - 1
    # All other elements are written to one extra slot at the end, which is dropped.
    place = torch.where(mask & (place < length), place, length)
    positions = torch.arange(size, device=mask.device)
    index = positions.new_zeros(length + 1).scatter(0, place, positions)[:length]
    return index, torch.arange(length, device=mask.device) < mask.sum()

"""What the heads look at: span in seconds, entropy, and how much stays on the frame itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from nest_fn.config import Config
from nest_fn.encoder import EAGER, EncoderParts, encode_frames, subsample_features
from nest_fn.frontend import log_mel
from nest_fn.layers.attention import attention_weights
from nest_fn.layers.conformer import BlockContext, ConformerSpec, conformer_layer
from nest_fn.layers.feed_forward import feed_forward
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.norm import layer_norm
from nest_fn.layers.types import Params, State, Tensor


class HeadStatistics(NamedTuple):
    """Means over all valid queries, for L layers of H heads."""

    span: Tensor  # float64 [L, H], encoder frames: mean distance of what is attended to
    entropy: Tensor  # float64 [L, H], nats
    evenness: Tensor  # float64 [L, H]: entropy over that of equal weights, from 0 to 1
    itself: Tensor  # float64 [L, H]: weight on the query's own frame
    queries: int


@torch.no_grad()
def head_statistics(
    params: Params, state: State, audio: Tensor, lengths: Tensor, cfg: Config
) -> HeadStatistics:  # fmt: skip
    """Statistics of every head for ``audio [B, N]``, in evaluation mode, unmasked.

    Span ``sum_j a_ij |i - j|`` and entropy ``-sum_j a_ij log a_ij`` of the weights of query i, as Yang, Liu and Lee,
    Interspeech 2020, use them for speech. Holds the weights of one layer, ``[B, H, T, T]``. Raises ``ValueError`` for
    local attention, whose weights are banded.
    """
    if cfg.encoder.self_attention_model == "rel_pos_local_attn":
        raise ValueError("head_statistics: local attention has no [T, T] weights; its window bounds the span.")
    found: list[Tensor] = []

    def block(layer: Any, layer_state: Any, x: Tensor, context: BlockContext, spec: ConformerSpec, **rest: Any) -> Any:
        found.append(_statistics(block_weights(layer, x, context, spec), context.valid))
        return conformer_layer(layer, layer_state, x, context, spec, **rest)

    mel, frames = log_mel(audio, lengths, cfg.preprocessor)
    x, short = subsample_features(params["encoder"], mel, frames, cfg.encoder)
    parts = EncoderParts(EAGER.embed_input, block)
    encode_frames(params["encoder"], state["encoder"], x, short, cfg.encoder, parts=parts)
    span, entropy, evenness, itself = torch.stack(found).unbind(dim=1)
    return HeadStatistics(span, entropy, evenness, itself, int(valid_mask(short, x.shape[1]).sum()))


def block_weights(params: Any, x: Tensor, context: BlockContext, spec: ConformerSpec) -> Tensor:
    """Attention weights of a block, in evaluation mode, from its input: ``[B, T, D] -> [B, H, T, T]`` (query, key)."""
    x = x + 0.5 * feed_forward(
        params["feed_forward1"], layer_norm(params["norm_feed_forward1"], x), rate=0.0, key=None, train=False
    )
    return attention_weights(
        {**params["attention"], **context.biases}, layer_norm(params["norm_attention"], x), context.positions,
        context.valid, context.context, heads=spec.heads,
    )  # fmt: skip


def _statistics(weights: Tensor, valid: Tensor) -> Tensor:
    """Span, entropy, evenness, weight on itself, means over valid queries: ``[B, H, T, T]`` -> float64 ``[4, H]``."""
    weights = weights.double()
    frame = torch.arange(weights.shape[-1], device=weights.device)
    distance = (frame[:, None] - frame[None, :]).abs().double()
    entropy = torch.special.entr(weights).sum(dim=-1)
    most = valid.sum(dim=1).double().log().clamp(min=1e-12)[:, None, None]
    each = torch.stack(((weights * distance).sum(dim=-1), entropy, entropy / most, weights.diagonal(dim1=-2, dim2=-1)))
    inside = valid[None, :, None, :].to(each.dtype)  # [4, B, H, T] queries
    return (each * inside).sum(dim=(1, 3)) / inside.sum().clamp(min=1)

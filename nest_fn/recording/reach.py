"""How far a frame of an encoder's output depends on the encoder's input, for encoders of limited attention context."""

from __future__ import annotations

from typing import NamedTuple

from nest_fn.config import EncoderConfig
from nest_fn.encoder import LOCAL, conformer_spec, first_reduced_layer

_SUBSAMPLING = 3  # encoder frames that cover all strided convolutions before the blocks, of any kind, on either side
_NORMS = ("batch_norm", "layer_norm", "fused_batch_norm")  # others have statistics of all frames of an utterance


class Reach(NamedTuple):
    """Encoder frames before and after a frame on which it depends, and where windows may begin."""

    left: int
    right: int
    period: int  # windows begin at multiples of it


def encoder_reach(cfg: EncoderConfig) -> Reach | None:
    """The reach of the encoder's last block in evaluation; None if it is unlimited (reference 4.4 to 4.6).

    Every block adds the context of its attention and of its convolution, after a reduction of the frames as many times
    over. Attention in chunks reaches to the ends of chunks, whose grid begins at frame 0. Absolute positions, global
    tokens and norms over time tie a frame to the whole utterance.
    """
    left, right = cfg.att_context_size[0]
    tied = cfg.self_attention_model == "abs_pos" or cfg.global_tokens > 0
    if tied or left < 0 or right < 0 or cfg.conv_norm_type not in _NORMS:
        return None
    period = 1
    if cfg.att_context_style == "chunked_limited" and cfg.self_attention_model != LOCAL:
        period = right + 1
        left, right = left // period * period + period - 1, period - 1
    before, after = conformer_spec(cfg).conv_context
    factor = reduction_factor(cfg)
    slow = cfg.n_layers - 1 - first_reduced_layer(cfg) if cfg.reduction else 0  # blocks after the reduction
    blocks = cfg.n_layers - slow + slow * factor
    more = _SUBSAMPLING + factor - 1
    return Reach(blocks * (left + before) + more, blocks * (right + after) + more, period * factor)


def reduction_factor(cfg: EncoderConfig) -> int:
    """Encoder frames of which the reduction leaves one; 1 without it."""
    return cfg.reduction_factor if cfg.reduction else 1

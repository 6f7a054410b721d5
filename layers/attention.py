"""Multi-head self-attention, positions relative or absolute, over frames that a mask allows (reference 4.4, 4.5)."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
import torch.nn.functional as F

from . import random
from .dropout import dropout
from .lengths import zero_padding
from .linear import LinearParams, init_linear, linear
from .positions import shift
from .types import Key, Tensor

MASKED = -10000.0
"""Score of a key that may not be seen; finite, as in the reference, so that a row without keys stays finite."""


class AttentionParams(TypedDict, total=False):
    """Affine maps, and for relative positions: ``position`` (no bias), ``content_bias`` u and ``position_bias`` v.

    u and v are ``[H, d_k]``; they are absent where they are tied over the layers (the encoder then hands them in).
    ``global_*`` are the maps of global tokens, where these are separate (local attention only).
    """

    query: LinearParams
    key: LinearParams
    value: LinearParams
    output: LinearParams
    position: LinearParams
    content_bias: Tensor
    position_bias: Tensor
    global_query: LinearParams
    global_key: LinearParams
    global_value: LinearParams


def init_attention(
    key: Key, width: int, heads: int, *, bias: bool = True, relative: bool = True, tied: bool = False,
    separate_global: bool = False,
) -> AttentionParams:  # fmt: skip
    """torch.nn.Linear's defaults; u and v start at zero."""
    if width % heads:
        raise ValueError(f"attention: width {width} is not a multiple of {heads} heads; change one of them.")
    keys = random.split(key, 8)
    maps = [init_linear(keys[index], width, width, bias) for index in range(4)]
    params: AttentionParams = {"query": maps[0], "key": maps[1], "value": maps[2], "output": maps[3]}
    if relative:
        params["position"] = init_linear(keys[4], width, width, bias=False)
        if not tied:
            params |= init_position_biases(width, heads)
    if separate_global:
        params["global_query"] = init_linear(keys[5], width, width, bias)
        params["global_key"] = init_linear(keys[6], width, width, bias)
        params["global_value"] = init_linear(keys[7], width, width, bias)
    return params


def init_position_biases(width: int, heads: int) -> AttentionParams:
    """u and v of zeros, ``[H, d_k]``."""
    return {
        "content_bias": torch.zeros(heads, width // heads),
        "position_bias": torch.zeros(heads, width // heads),
    }


def split_heads(x: Tensor, heads: int) -> Tensor:
    """``[..., T, D] -> [..., H, T, d_k]``; a head is a contiguous run of features."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """``[..., H, T, d_k] -> [..., T, D]``."""
    return x.transpose(-2, -3).flatten(-2)


def attention(
    params: AttentionParams, x: Tensor, positions: Tensor | None, valid: Tensor, context: Tensor | None, *,
    heads: int, rate: float = 0.0, fused: bool = False, key: Key | None = None, train: bool = False,
) -> Tensor:  # fmt: skip
    """Every frame looks at every valid frame inside its context: ``[B, T, D] -> [B, T, D]``.

    ``positions`` ``[2T-1, D]`` are relative (query minus key, from T-1 down to -(T-1)), or None for plain attention.
    ``valid`` bool ``[B, T]``; ``context`` bool ``[T, T]`` or ``[B, T, T]`` (query, key), None for all. Queries in
    padding see nothing and give the output map's bias. ``fused`` takes PyTorch's fused kernel where no dropout is
    asked for; it supports no forward-mode derivatives.
    """
    check_attention("attention", x, positions, valid, 2 * x.shape[1] - 1)
    query = split_heads(linear(params["query"], x), heads)
    keys = split_heads(linear(params["key"], x), heads)
    values = split_heads(linear(params["value"], x), heads)
    scale = 1.0 / math.sqrt(query.shape[-1])
    by_position: Tensor | float = 0.0
    if positions is not None:
        relative = split_heads(linear(params["position"], positions), heads)
        position_query = (query + params["position_bias"][:, None]) * scale
        query = query + params["content_bias"][:, None]
        by_position = shift(position_query @ relative.transpose(-1, -2))
    allowed = valid[:, None, None, :] if context is None else valid[:, None, None, :] & _per_row(context)
    if fused and not (train and rate > 0.0):
        bias = torch.where(allowed, by_position, MASKED).to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias.expand(-1, heads, x.shape[1], -1))
    else:
        scores = (query * scale) @ keys.transpose(-1, -2) + by_position
        weights = torch.softmax(torch.where(allowed, scores, MASKED), dim=-1)
        mixed = dropout(weights, rate, key=key, train=train) @ values
    return linear(params["output"], zero_padding(merge_heads(mixed), valid))


def check_attention(what: str, x: Tensor, positions: Tensor | None, valid: Tensor, rows: int) -> None:
    """Raise ``ValueError`` unless the mask fits ``x [B, T, D]`` and there are ``rows`` positions."""
    if x.ndim != 3 or valid.shape != x.shape[:2]:
        raise ValueError(f"{what}: x {list(x.shape)} wants a mask of valid frames [B, T], got {list(valid.shape)}.")
    if positions is not None and positions.shape[0] != rows:
        raise ValueError(
            f"{what}: x {list(x.shape)} wants positions [{rows}, D], got {list(positions.shape)}; make them with "
            f"relative_positions."
        )


def _per_row(context: Tensor) -> Tensor:
    return context[:, None] if context.ndim == 3 else context


def context_mask(
    frames: int, left: int | Tensor, right: int | Tensor, style: str, device: torch.device
) -> Tensor | None:
    """Which keys a query may see: bool ``[T, T]``, or None where that is all. -1 means unlimited (reference 4.5).

    ``regular``: from ``left`` frames before to ``right`` frames after. ``chunked_limited``: all of the own chunk of
    ``right + 1`` frames and of ``left / (right + 1)`` chunks before. Bounds may be 0-d tensors, when they were drawn.
    """
    if isinstance(left, int) and isinstance(right, int) and left < 0 and right < 0:
        return None
    # Tensors from here on, so that one expression serves numbers and draws; they cost nothing once compiled.
    lefts, rights = torch.as_tensor(left, device=device), torch.as_tensor(right, device=device)
    frame = torch.arange(frames, device=device)
    query, key = frame[:, None], frame[None, :]
    regular = ((lefts < 0) | (key >= query - lefts)) & ((rights < 0) | (key <= query + rights))
    if style == "regular":
        return regular
    size = torch.where(rights < 0, 1, rights + 1)
    behind = torch.div(query, size, rounding_mode="floor") - torch.div(key, size, rounding_mode="floor")
    chunks = torch.div(lefts, size, rounding_mode="floor")
    chunked = (behind >= 0) & ((lefts < 0) | (behind <= chunks))
    # Without a bound on the right there are no chunks: the reference then limits the left alone.
    return torch.where(rights < 0, (lefts < 0) | (key >= query - lefts), chunked)

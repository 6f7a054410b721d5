"""Multi-head self-attention with relative or absolute positions and a mask over keys (reference 4.4, 4.5)."""

from __future__ import annotations

import math
from typing import TypedDict

import torch
import torch.nn.functional as F

from . import random
from .attention_fused import relative_attention
from .dropout import dropout, packed_decisions
from .lengths import zero_padding
from .linear import LinearParams, init_linear, linear
from .positions import shift
from .types import Key, Tensor

MASKED = -10000.0
"""Score of a masked key; finite, as in the reference, so that the softmax of a fully masked row is finite."""


class AttentionParams(TypedDict, total=False):
    """Linear projections, and for relative positions ``position`` (no bias), ``content_bias`` u, ``position_bias`` v.

    u and v are ``[H, d_k]``; they are absent if all layers share them (the encoder then passes them to each layer).
    ``global_*`` are the projections for global tokens, if these are separate (local attention only).
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
    """Initialise the projections as torch.nn.Linear does and u, v ``[H, d_k]`` with zeros (reference 4.8).

    Raises ``ValueError`` if ``width`` is not a multiple of ``heads``.
    """
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
    """Initialise u and v, both ``[H, d_k]``, with zeros."""
    return {
        "content_bias": torch.zeros(heads, width // heads),
        "position_bias": torch.zeros(heads, width // heads),
    }


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split features into heads: ``[..., T, D] -> [..., H, T, d_k]``; each head is a contiguous block of features."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(-2, -3)


def merge_heads(x: Tensor) -> Tensor:
    """Concatenate the heads: ``[..., H, T, d_k] -> [..., T, D]``, the inverse of ``split_heads``."""
    return x.transpose(-2, -3).flatten(-2)


def attention(
    params: AttentionParams, x: Tensor, positions: Tensor | None, valid: Tensor, context: Tensor | None, *,
    heads: int, rate: float = 0.0, fused: bool = False, key: Key | None = None, train: bool = False,
) -> Tensor:  # fmt: skip
    """Attend from every frame to all valid frames in its context: ``[B, T, D] -> [B, T, D]`` (reference 4.4).

    ``positions`` ``[2T-1, D]`` encode relative positions (query minus key, from T-1 down to -(T-1)); None is attention
    by content alone. ``valid`` is bool ``[B, T]``; ``context`` is bool ``[T, T]`` or ``[B, T, T]`` (query, key), None
    allows all keys. Padded queries attend to nothing, so their output is the bias of the output projection. ``fused``
    uses PyTorch's fused kernel unless attention dropout is active; that kernel has no forward-mode derivatives.
    Compiled on CUDA in half precision, attention to all frames by relative positions is one operator
    (``attention_fused``).
    """
    if positions is not None and context is None and _is_one_operator(x, heads):
        kept = packed_decisions((x.shape[0], heads, x.shape[1], x.shape[1]), rate, key=key, train=train)
        return linear(params["output"], _mix_in_one(params, x, positions, valid, kept, rate if train else 0.0, heads))
    query, keys, bias = _queries_keys_bias(params, x, positions, valid, context, heads)
    values = split_heads(linear(params["value"], x), heads)
    if fused and not (train and rate > 0.0):
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias.expand(-1, heads, x.shape[1], -1))
    else:
        mixed = dropout(_softmax_weights(query, keys, bias), rate, key=key, train=train) @ values
    return linear(params["output"], zero_padding(merge_heads(mixed), valid))


def _is_one_operator(x: Tensor, heads: int) -> bool:
    """Whether ``attention_fused`` applies: compiled on CUDA, no transform of functions, in half precision.

    Products of float32 are no work for tensor cores: cuBLAS makes them faster than Triton does.
    """
    return (
        torch.compiler.is_compiling()
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[-1] // heads <= 128  # wider tiles do not fit
        and not torch._C._are_functorch_transforms_active()
    )


def _mix_in_one(
    params: AttentionParams, x: Tensor, positions: Tensor, valid: Tensor, kept: Tensor | None, rate: float, heads: int
) -> Tensor:
    """Mixed values ``[B, T, D]`` of all heads by the operator; ``kept`` are the decisions of dropout."""
    check_attention("attention", x, positions, valid, 2 * x.shape[1] - 1)
    query, keys, values = (linear(params[name], x) for name in ("query", "key", "value"))
    biases = (params["content_bias"], params["position_bias"])
    return relative_attention(
        query, keys, values, linear(params["position"], positions), *biases, valid, kept, rate, MASKED
    )  # fmt: skip


def attention_weights(
    params: AttentionParams, x: Tensor, positions: Tensor | None, valid: Tensor, context: Tensor | None, *, heads: int
) -> Tensor:
    """The weights with which ``attention`` mixes the values: ``[B, T, D] -> [B, H, T, T]`` (query, key).

    Before dropout; over the keys they add up to 1, for padded queries too. Arguments and errors as of ``attention``.
    """
    return _softmax_weights(*_queries_keys_bias(params, x, positions, valid, context, heads))


def _queries_keys_bias(
    params: AttentionParams, x: Tensor, positions: Tensor | None, valid: Tensor, context: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys ``[B, H, T, d_k]``, and what is added to their scaled products: ``[B, H or 1, T or 1, T]``."""
    check_attention("attention", x, positions, valid, 2 * x.shape[1] - 1)
    query = split_heads(linear(params["query"], x), heads)
    keys = split_heads(linear(params["key"], x), heads)
    by_position: Tensor | float = 0.0
    if positions is not None:
        relative = split_heads(linear(params["position"], positions), heads)
        position_query = (query + params["position_bias"][:, None]) * _scale(query)
        query = query + params["content_bias"][:, None]
        by_position = shift(position_query @ relative.transpose(-1, -2))
    allowed = valid[:, None, None, :] if context is None else valid[:, None, None, :] & _broadcast_heads(context)
    # Added, not put in their place: weights are 0 all the same, and so is the gradient, without a pass of its own.
    return query, keys, by_position + torch.where(allowed, 0.0, MASKED).to(query.dtype)


def _scale(query: Tensor) -> float:
    return 1.0 / math.sqrt(query.shape[-1])


def _softmax_weights(query: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    return torch.softmax((query * _scale(query)) @ keys.transpose(-1, -2) + bias, dim=-1)


def check_attention(what: str, x: Tensor, positions: Tensor | None, valid: Tensor, rows: int) -> None:
    """Raise ``ValueError`` unless ``x`` is ``[B, T, D]``, ``valid`` ``[B, T]`` and ``positions`` ``[rows, D]``."""
    if x.ndim != 3 or valid.shape != x.shape[:2]:
        raise ValueError(f"{what}: x {list(x.shape)} wants a mask of valid frames [B, T], got {list(valid.shape)}.")
    if positions is not None and positions.shape[0] != rows:
        raise ValueError(
            f"{what}: x {list(x.shape)} wants positions [{rows}, D], got {list(positions.shape)}; make them with "
            f"relative_positions."
        )


def _broadcast_heads(context: Tensor) -> Tensor:
    return context[:, None] if context.ndim == 3 else context


def context_mask(
    frames: int, left: int | Tensor, right: int | Tensor, style: str, device: torch.device
) -> Tensor | None:
    """Mask of the keys that each query may attend to: bool ``[T, T]``, or None if all are allowed (reference 4.5).

    ``left`` and ``right`` are in frames; -1 means unlimited. ``regular`` allows ``left`` frames before the query to
    ``right`` frames after it. ``chunked_limited`` allows the query's own chunk of ``right + 1`` frames and the
    ``left / (right + 1)`` chunks before it. The bounds may be 0-d tensors, if they were drawn at random.
    """
    if isinstance(left, int) and isinstance(right, int) and left < 0 and right < 0:
        return None
    # Converted to tensors, so that one expression handles Python ints and drawn bounds; free in a compiled graph.
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
    # Without a right bound there are no chunks; the reference then applies the left bound only.
    return torch.where(rights < 0, (lefts < 0) | (key >= query - lefts), chunked)

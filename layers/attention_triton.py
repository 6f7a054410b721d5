"""Triton kernel of ``attention_fused``, forward, and what the backward kernels share with it.

A program owns a block of queries of one head and goes over the blocks of keys; its scores live in registers alone, and
what it keeps is the logarithm of each softmax's denominator. The score of query ``i`` and key ``j`` by position is a
product with row ``T-1-i+j`` of the relative positions. A pair of blocks needs two blocks of these rows, ``low`` and
``high``, and in row ``a`` of the products the columns from ``BLOCK-1-a`` on come from ``low``, those before from
``high``: so one rotation of each row by ``a + 1`` puts them where the keys are. Scores are in base 2. Imported on CUDA
alone; tests run the kernels in Triton's interpreter, ``make gpu-check`` compiles them.

Names of all kernels: ``WIDTH`` is d_k and ``TILE`` the power of 2 that holds it, ``KIND`` what products are made of,
``begin`` the first key of a block, ``first`` the first query; ``zero`` is 0, which a compiler cannot know: what depends
on it is made again in each turn of a loop, where it would hold registers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .types import Tensor

BLOCK = 64  # queries and keys of a tile
LOG2E = math.log2(math.e)
SIZES = ("frames", "heads", "row_bits", "batch")  # no kernel of its own for those that are multiples of 16


@triton.jit  # Triton reads annotations: there are none but its own
def rows_of_head(x, start, count, head, heads, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """``[BLOCK, TILE]`` of ``x [count, heads * WIDTH]``, rows from ``start``; zeros where there is nothing."""
    row, column = start + tl.arange(0, BLOCK)[:, None], tl.arange(0, TILE)[None, :]
    place = row * (heads * WIDTH) + head * WIDTH + column
    return tl.load(x + place, mask=(row >= 0) & (row < count) & (column < WIDTH), other=0.0)


@triton.jit
def store_rows(x, tile, start, count, head, heads, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]  # fmt: skip
    """The inverse of ``rows_of_head``: ``tile`` into its place in ``x``."""
    row, column = start + tl.arange(0, BLOCK)[:, None], tl.arange(0, TILE)[None, :]
    place = row * (heads * WIDTH) + head * WIDTH + column
    tl.store(x + place, tile.to(x.dtype.element_ty), mask=(row < count) & (column < WIDTH))


@triton.jit
def queries(  # type: ignore[no-untyped-def]
    x, content_bias, position_bias, first, frames, head, heads, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """What meets keys, and what meets positions: ``q + u`` and ``q + v``, ``[BLOCK, TILE]``."""
    query = rows_of_head(x, first, frames, head, heads, BLOCK, WIDTH, TILE).to(tl.float32)
    column = tl.arange(0, TILE)
    u = tl.load(content_bias + head * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    v = tl.load(position_bias + head * WIDTH + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    return (query + u[None, :]).to(KIND), (query + v[None, :]).to(KIND)


@triton.jit
def is_low(BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which products with positions come from ``low``: ``[BLOCK, BLOCK]``."""
    return tl.arange(0, BLOCK)[None, :] >= BLOCK - 1 - tl.arange(0, BLOCK)[:, None]


@triton.jit
def by_key(x, zero, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Products by position, as ``is_low`` chooses them -> scores by key."""
    turned = zero + BLOCK - 1 - tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    return tl.gather(x, turned & (BLOCK - 1), axis=1)


@triton.jit
def by_position(x, zero, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The inverse of ``by_key``."""
    turned = zero + 1 + tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    return tl.gather(x, turned & (BLOCK - 1), axis=1)


@triton.jit
def scores(  # type: ignore[no-untyped-def]
    content, keys, near, far, usable, begin, zero, frames, scale, masked, BLOCK: tl.constexpr, PRECISION: tl.constexpr
):
    """Scores ``[BLOCK, BLOCK]`` in base 2; ``near, far`` are the products of ``q + v`` with ``low`` and ``high``.

    ``usable``: the mask of this row of the batch. A masked key has ``masked`` added, a key that is not there -inf.
    """
    score = tl.dot(content, tl.trans(keys), input_precision=PRECISION)
    score += by_key(tl.where(is_low(BLOCK), near, far), zero, BLOCK)
    key = begin + tl.arange(0, BLOCK)
    allowed = tl.load(usable + key, mask=key < frames, other=0) != 0
    added = tl.where(allowed, 0.0, tl.where(key < frames, masked, float("-inf")))
    return score * scale + added[None, :]


@triton.jit
def is_kept(kept, base, first, begin, frames, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decisions of dropout ``[BLOCK, BLOCK]``: that of query ``i`` and key ``j`` is bit ``base + i T + j``.

    A row's decisions, at most 64, are in three numbers; shifted so that they begin with the first, they are in two.
    """
    query, key = first + tl.arange(0, BLOCK), tl.arange(0, BLOCK)[None, :]
    start = base + query.to(tl.int64) * frames + begin
    shift, place, count = start & 31, kept + (start >> 5), tl.minimum(frames - begin, BLOCK)
    inside = query < frames
    one = tl.load(place, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
    two = tl.load(place + 1, mask=inside & (shift + count > 32), other=0).to(tl.int64)
    three = tl.load(place + 2, mask=inside & (shift + count > 64), other=0).to(tl.int64)
    early = ((one | (two << 32)) >> shift).to(tl.int32)
    late = (((two & 0xFFFFFFFF) | (three << 32)) >> shift).to(tl.int32)
    return ((tl.where(key < 32, early[:, None], late[:, None]) >> (key & 31)) & 1) != 0


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(  # type: ignore[no-untyped-def]
    query, key, value, relative, content_bias, position_bias, valid, kept, out, norm, frames, heads, row_bits,
    scale, masked, raised, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``query, key, value [B, T, H d_k]``, ``relative [2T-1, H d_k]`` -> ``out`` alike, ``norm [B, H, T]`` float32."""
    blocks = tl.cdiv(frames, BLOCK)
    pair = tl.program_id(0) // blocks  # of a row of the batch and a head
    first, row, head = tl.program_id(0) % blocks * BLOCK, pair // heads, pair % heads
    whole = row.to(tl.int64) * frames * heads * WIDTH  # where this row of the batch begins
    base = row.to(tl.int64) * row_bits + head.to(tl.int64) * frames * frames
    usable = valid + row.to(tl.int64) * frames
    content, position = queries(
        query + whole, content_bias, position_bias, first, frames, head, heads, BLOCK, WIDTH, TILE, KIND
    )
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, TILE), tl.float32)
    start, last = frames - first - BLOCK, 2 * frames - 1  # of ``low``, and the number of positions
    low = rows_of_head(relative, start, last, head, heads, BLOCK, WIDTH, TILE).to(KIND)
    near = tl.dot(position, tl.trans(low), input_precision=PRECISION)
    for begin in range(0, frames, BLOCK):
        keys = rows_of_head(key + whole, begin, frames, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        high = rows_of_head(relative, start + begin + BLOCK, last, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        far = tl.dot(position, tl.trans(high), input_precision=PRECISION)
        score = scores(content, keys, near, far, usable, begin, begin >> 30, frames, scale, masked, BLOCK, PRECISION)
        near = far  # the next block's ``low`` is this one's ``high``
        larger = tl.maximum(largest, tl.max(score, axis=1))
        weight, shrink = tl.exp2(score - larger[:, None]), tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weight, axis=1)
        if DROPS:
            weight = tl.where(is_kept(kept, base, first, begin, frames, BLOCK), weight, 0.0)
        values = rows_of_head(value + whole, begin, frames, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(KIND), values, input_precision=PRECISION)
        largest = larger
    at = first + tl.arange(0, BLOCK)
    real = tl.load(usable + at, mask=at < frames, other=0) != 0
    mixed = tl.where(real[:, None], mixed * (raised / total)[:, None], 0.0)
    store_rows(out + whole, mixed, first, frames, head, heads, BLOCK, WIDTH, TILE)
    tl.store(norm + pair.to(tl.int64) * frames + at, largest + tl.log2(total), mask=at < frames)


def forward(
    query: Tensor, key: Tensor, value: Tensor, relative: Tensor, content_bias: Tensor, position_bias: Tensor,
    valid: Tensor, kept: Tensor | None, rate: float, masked: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch: -> what ``attention_fused.relative_attention`` returns, ``[B, T, D]``; norms ``[B, H, T]``, base 2."""
    (batch, frames, _), (heads, width) = query.shape, content_bias.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    norm = torch.empty((batch, heads, frames), dtype=torch.float32, device=query.device)
    given = [x.contiguous() for x in (query, key, value, relative, content_bias, position_bias, valid)]
    with torch.accelerator.device_index(query.device.index):  # Triton launches on the current device
        forward_kernel[(triton.cdiv(frames, BLOCK) * batch * heads,)](
            *given, kept, out, norm, *sizes(frames, heads, kept), *factors(width, rate, masked),
            **settings(query, width, kept),
        )  # fmt: skip
    return out, norm


def sizes(frames: int, heads: int, kept: Tensor | None) -> tuple[int, int, int]:
    """T, H, and the bits of ``kept`` (``[n]`` or ``[B, n]``) from one row of the batch to the next."""
    own = kept is not None and kept.ndim == 2  # a key for each row
    return frames, heads, 32 * kept.shape[1] if own else heads * frames * frames  # type: ignore[union-attr]


def factors(width: int, rate: float, masked: float) -> tuple[float, float, float]:
    """Of scores, to base 2; the score of a masked key; of weights that dropout keeps."""
    return LOG2E / math.sqrt(width), masked * LOG2E, 1.0 / (1.0 - rate)


def settings(x: Tensor, width: int, kept: Tensor | None) -> dict[str, Any]:
    """Constants of the kernels and how a program is laid out, as it spills few registers or none.

    Products take what ``x [B, T, D]`` is made of, and add in float32.
    """
    kinds = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return {
        "BLOCK": BLOCK, "WIDTH": width, "TILE": max(16, triton.next_power_of_2(width)), "KIND": kinds[x.dtype],
        "DROPS": kept is not None, "PRECISION": "ieee", "num_warps": 4 if width <= 64 else 8, "num_stages": 2,
    }  # fmt: skip

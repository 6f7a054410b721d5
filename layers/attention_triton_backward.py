"""Triton kernels of ``attention_fused``, backward: weights are made again from scores and the kept norms.

Three kernels, each of whose programs owns what it writes, so that every sum has one order: the gradients of a block of
queries, of a block of keys and values, and of the relative positions that lie on one diagonal of pairs of blocks.
``g`` is the gradient of the output, ``w`` a softmax's weight, ``d`` the decision of dropout by its factor: the gradient
of a score is ``w (d (g . value) - g . output)``. Names are those of ``attention_triton``.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from . import attention_triton
from .attention_triton import SIZES, by_position, is_kept, is_low, queries, rows_of_head, scores, store_rows
from .types import Tensor

PROGRAMS = 512  # of the kernel of positions; each has partial sums of its own


@triton.jit  # Triton reads annotations: there are none but its own
def output_gradients(  # type: ignore[no-untyped-def]
    grad, usable, first, frames, head, heads, BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr
):
    """Gradients of the outputs of a block of queries ``[BLOCK, TILE]``: those of padded frames are 0."""
    at = first + tl.arange(0, BLOCK)
    real = tl.load(usable + at, mask=at < frames, other=0) != 0
    of = rows_of_head(grad, first, frames, head, heads, BLOCK, WIDTH, TILE)
    return tl.where(real[:, None], of, tl.zeros_like(of))


@triton.jit
def queries_and_gradients(  # type: ignore[no-untyped-def]
    query, content_bias, position_bias, grad, usable, norm, shared_out, norms, first, frames, head, heads,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A block of queries as ``queries`` makes it, its outputs' gradients, and its norms and g . output ``[BLOCK]``.

    ``norms`` is where those of this row and head begin.
    """
    content, position = queries(
        query, content_bias, position_bias, first, frames, head, heads, BLOCK, WIDTH, TILE, KIND
    )
    of = output_gradients(grad, usable, first, frames, head, heads, BLOCK, WIDTH, TILE).to(KIND)
    at = first + tl.arange(0, BLOCK)
    log_norm = tl.load(norm + norms + at, mask=at < frames, other=float("inf"))
    return content, position, of, log_norm, tl.load(shared_out + norms + at, mask=at < frames, other=0.0)


@triton.jit
def score_gradients(  # type: ignore[no-untyped-def]
    content, position, of, log_norm, shared, keys, values, low, high, usable, kept, base, first, begin, zero, frames,
    scale, masked, raised, BLOCK: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights after dropout, but for its factor, and gradients of scores, ``[BLOCK, BLOCK]``.

    ``of`` are gradients of outputs, ``shared`` is g . output.
    """
    near = tl.dot(position, tl.trans(low), input_precision=PRECISION)
    far = tl.dot(position, tl.trans(high), input_precision=PRECISION)
    score = scores(content, keys, near, far, usable, begin, zero, frames, scale, masked, BLOCK, PRECISION)
    weight = tl.exp2(score - log_norm[:, None])
    to_weight = tl.dot(of, tl.trans(values), input_precision=PRECISION) * raised
    dropped = weight
    if DROPS:
        decided = is_kept(kept, base, first, begin, frames, BLOCK)
        dropped, to_weight = tl.where(decided, weight, 0.0), tl.where(decided, to_weight, 0.0)
    return dropped, weight * (to_weight - shared[:, None])


@triton.jit(do_not_specialize=SIZES)
def query_kernel(  # type: ignore[no-untyped-def]
    grad, out, norm, query, key, value, relative, content_bias, position_bias, valid, kept, to_query, shared_out,
    to_biases, frames, heads, row_bits, scale, masked, raised, root, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, KIND: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``to_query [B, T, H d_k]``; ``shared_out [B, H, T]``: g . output; ``to_biases [2, B, blocks, H d_k]``."""
    blocks, programs = tl.cdiv(frames, BLOCK), tl.num_programs(0)
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, row, head = block * BLOCK, pair // heads, pair % heads
    whole = row.to(tl.int64) * frames * heads * WIDTH
    base = row.to(tl.int64) * row_bits + head.to(tl.int64) * frames * frames
    usable = valid + row.to(tl.int64) * frames
    content, position = queries(
        query + whole, content_bias, position_bias, first, frames, head, heads, BLOCK, WIDTH, TILE, KIND
    )
    of = output_gradients(grad + whole, usable, first, frames, head, heads, BLOCK, WIDTH, TILE)
    made = rows_of_head(out + whole, first, frames, head, heads, BLOCK, WIDTH, TILE)
    shared = tl.sum(of.to(tl.float32) * made.to(tl.float32), axis=1)
    of = of.to(KIND)
    at, norms = first + tl.arange(0, BLOCK), pair.to(tl.int64) * frames + first + tl.arange(0, BLOCK)
    tl.store(shared_out + norms, shared, mask=at < frames)
    log_norm = tl.load(norm + norms, mask=at < frames, other=float("inf"))
    by_content = tl.zeros((BLOCK, TILE), tl.float32)
    by_place = tl.zeros((BLOCK, TILE), tl.float32)
    start, last = frames - first - BLOCK, 2 * frames - 1
    for begin in range(0, frames, BLOCK):
        keys = rows_of_head(key + whole, begin, frames, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        values = rows_of_head(value + whole, begin, frames, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        low = rows_of_head(relative, start + begin, last, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        high = rows_of_head(relative, start + begin + BLOCK, last, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        _, to_score = score_gradients(
            content, position, of, log_norm, shared, keys, values, low, high, usable, kept, base, first, begin,
            begin >> 30, frames, scale, masked, raised, BLOCK, DROPS, PRECISION,
        )  # fmt: skip
        by_content += tl.dot(to_score.to(KIND), keys, input_precision=PRECISION)
        placed = by_position(to_score, begin >> 30, BLOCK)
        by_place += tl.dot(tl.where(is_low(BLOCK), placed, 0.0).to(KIND), low, input_precision=PRECISION)
        by_place += tl.dot(tl.where(is_low(BLOCK), 0.0, placed).to(KIND), high, input_precision=PRECISION)
    store_rows(to_query + whole, (by_content + by_place) * root, first, frames, head, heads, BLOCK, WIDTH, TILE)
    column = tl.arange(0, TILE)
    sums = to_biases + (row * blocks + block).to(tl.int64) * heads * WIDTH + head * WIDTH + column
    tl.store(sums, tl.sum(by_content, axis=0) * root, mask=column < WIDTH)
    tl.store(sums + programs.to(tl.int64) * WIDTH, tl.sum(by_place, axis=0) * root, mask=column < WIDTH)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(  # type: ignore[no-untyped-def]
    grad, shared_out, norm, query, key, value, relative, content_bias, position_bias, valid, kept, to_key, to_value,
    frames, heads, row_bits, scale, masked, raised, root, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, KIND: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``to_key, to_value [B, T, H d_k]``."""
    blocks = tl.cdiv(frames, BLOCK)
    pair = tl.program_id(0) // blocks
    begin, row, head = tl.program_id(0) % blocks * BLOCK, pair // heads, pair % heads
    whole = row.to(tl.int64) * frames * heads * WIDTH
    base = row.to(tl.int64) * row_bits + head.to(tl.int64) * frames * frames
    usable = valid + row.to(tl.int64) * frames
    keys = rows_of_head(key + whole, begin, frames, head, heads, BLOCK, WIDTH, TILE).to(KIND)
    values = rows_of_head(value + whole, begin, frames, head, heads, BLOCK, WIDTH, TILE).to(KIND)
    of_keys = tl.zeros((BLOCK, TILE), tl.float32)
    of_values = tl.zeros((BLOCK, TILE), tl.float32)
    last = 2 * frames - 1
    for first in range(0, frames, BLOCK):
        content, position, of, log_norm, shared = queries_and_gradients(
            query + whole, content_bias, position_bias, grad + whole, usable, norm, shared_out,
            pair.to(tl.int64) * frames, first, frames, head, heads, BLOCK, WIDTH, TILE, KIND,
        )  # fmt: skip
        start = frames - first - BLOCK + begin
        low = rows_of_head(relative, start, last, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        high = rows_of_head(relative, start + BLOCK, last, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        dropped, to_score = score_gradients(
            content, position, of, log_norm, shared, keys, values, low, high, usable, kept, base, first, begin,
            first >> 30, frames, scale, masked, raised, BLOCK, DROPS, PRECISION,
        )  # fmt: skip
        of_values += tl.dot(tl.trans(dropped.to(KIND)), of, input_precision=PRECISION)
        of_keys += tl.dot(tl.trans(to_score.to(KIND)), content, input_precision=PRECISION)
    store_rows(to_key + whole, of_keys * root, begin, frames, head, heads, BLOCK, WIDTH, TILE)
    store_rows(to_value + whole, of_values * raised, begin, frames, head, heads, BLOCK, WIDTH, TILE)


@triton.jit(do_not_specialize=SIZES)
def position_kernel(  # type: ignore[no-untyped-def]
    grad, shared_out, norm, query, key, value, relative, content_bias, position_bias, valid, kept, partial, batch,
    frames, heads, row_bits, scale, masked, raised, root, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, KIND: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``partial [splits, diagonals, 2, BLOCK, H d_k]``: gradients of ``low`` and ``high`` over every splits-th row."""
    blocks, head, split, splits = tl.cdiv(frames, BLOCK), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    diagonal, last = tl.program_id(0) - (blocks - 1), 2 * frames - 1  # the block of keys minus that of queries
    start = frames - BLOCK + diagonal * BLOCK
    low = rows_of_head(relative, start, last, head, heads, BLOCK, WIDTH, TILE).to(KIND)
    high = rows_of_head(relative, start + BLOCK, last, head, heads, BLOCK, WIDTH, TILE).to(KIND)
    to_low = tl.zeros((BLOCK, TILE), tl.float32)
    to_high = tl.zeros((BLOCK, TILE), tl.float32)
    least, pairs = tl.maximum(-diagonal, 0), blocks - tl.abs(diagonal)
    for turn in range(0, tl.cdiv(batch - split, splits) * pairs):
        row, first = split + turn // pairs * splits, (least + turn % pairs) * BLOCK
        begin = first + diagonal * BLOCK
        whole = row.to(tl.int64) * frames * heads * WIDTH
        base = row.to(tl.int64) * row_bits + head.to(tl.int64) * frames * frames
        usable = valid + row.to(tl.int64) * frames
        content, position, of, log_norm, shared = queries_and_gradients(
            query + whole, content_bias, position_bias, grad + whole, usable, norm, shared_out,
            (row * heads + head).to(tl.int64) * frames, first, frames, head, heads, BLOCK, WIDTH, TILE, KIND,
        )  # fmt: skip
        keys = rows_of_head(key + whole, begin, frames, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        values = rows_of_head(value + whole, begin, frames, head, heads, BLOCK, WIDTH, TILE).to(KIND)
        _, to_score = score_gradients(
            content, position, of, log_norm, shared, keys, values, low, high, usable, kept, base, first, begin,
            turn >> 30, frames, scale, masked, raised, BLOCK, DROPS, PRECISION,
        )  # fmt: skip
        placed = by_position(to_score, turn >> 30, BLOCK)
        to_low += tl.dot(tl.trans(tl.where(is_low(BLOCK), placed, 0.0).to(KIND)), position, input_precision=PRECISION)
        to_high += tl.dot(tl.trans(tl.where(is_low(BLOCK), 0.0, placed).to(KIND)), position, input_precision=PRECISION)
    part = partial + (split * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 2 * BLOCK * heads * WIDTH
    store_rows(part, to_low * root, 0, BLOCK, head, heads, BLOCK, WIDTH, TILE)
    store_rows(part + BLOCK * heads * WIDTH, to_high * root, 0, BLOCK, head, heads, BLOCK, WIDTH, TILE)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def backward(
    grad: Tensor, out: Tensor, norm: Tensor, query: Tensor, key: Tensor, value: Tensor, relative: Tensor,
    content_bias: Tensor, position_bias: Tensor, valid: Tensor, kept: Tensor | None, rate: float, masked: float,
) -> Gradients:  # fmt: skip
    """Launch: gradients of query, key, value ``[B, T, D]``; float32: of relative ``[2T-1, D]``, u, v ``[H, d_k]``."""
    (batch, frames, _), (heads, width), block = query.shape, content_bias.shape, attention_triton.BLOCK
    blocks = triton.cdiv(frames, block)
    splits = max(1, min(batch, PROGRAMS // (heads * (2 * blocks - 1))))
    to_query, to_key, to_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    shared = torch.empty(norm.shape, dtype=torch.float32, device=query.device)
    to_biases = shared.new_empty((2, batch * blocks, heads, width))
    partial = shared.new_empty((splits, 2 * blocks - 1, 2, block, heads * width))
    given = [x.contiguous() for x in (query, key, value, relative, content_bias, position_bias, valid)]
    grad, root = grad.contiguous(), 1.0 / math.sqrt(width)
    last = (*attention_triton.sizes(frames, heads, kept), *attention_triton.factors(width, rate, masked), root)
    constants = attention_triton.settings(query, width, kept)
    with torch.accelerator.device_index(query.device.index):  # Triton launches on the current device
        query_kernel[(blocks * batch * heads,)](
            grad, out.contiguous(), norm, *given, kept, to_query, shared, to_biases, *last, **constants
        )
        key_kernel[(blocks * batch * heads,)](grad, shared, norm, *given, kept, to_key, to_value, *last, **constants)
        position_kernel[(2 * blocks - 1, heads, splits)](
            grad, shared, norm, *given, kept, partial, batch, *last, **constants
        )
    # Each bias has a sum of its own: outputs of an operator must not share memory.
    return to_query, to_key, to_value, _placed(partial, frames), to_biases[0].sum(0), to_biases[1].sum(0)


def _placed(partial: Tensor, frames: int) -> Tensor:
    """Sums over splits, and of neighbouring diagonals: ``[splits, diagonals, 2, BLOCK, D] -> [2T-1, D]``."""
    low, high = partial.sum(0).unbind(1)
    rows = torch.nn.functional.pad(low, (0, 0, 0, 0, 0, 1)) + torch.nn.functional.pad(high, (0, 0, 0, 0, 1, 0))
    before = rows.shape[0] * rows.shape[1] // 2 - frames
    return rows.flatten(0, 1)[before : before + 2 * frames - 1].contiguous()

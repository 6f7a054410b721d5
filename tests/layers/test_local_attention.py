"""Sliding-window attention, in time linear in the length, against dense attention under a mask, and loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from nest_fn.layers import random
from nest_fn.layers.attention import attention, context_mask, init_attention
from nest_fn.layers.linear import linear
from nest_fn.layers.local_attention import local_attention
from nest_fn.layers.positions import relative_positions

B, D, H = 2, 8, 2
WIDTH = D // H


def numbers(separate: bool = False) -> Any:
    params: Any = init_attention(random.key(2), D, H, separate_global=separate)
    params["content_bias"] = random.normal(random.key(3), (H, WIDTH))
    params["position_bias"] = random.normal(random.key(4), (H, WIDTH))
    return params


def example(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([frames, max(1, frames - 4)])
    return random.normal(random.key(1), (B, frames, D)), torch.arange(frames) < lengths[:, None]


def local(params: Any, x: torch.Tensor, valid: torch.Tensor, left: int, right: int, **options: Any) -> torch.Tensor:
    positions = relative_positions(left, right, D, x)
    return local_attention(params, x, positions, valid, heads=H, left=left, right=right, **options)


@pytest.mark.parametrize("frames", [1, 2, 5, 8, 17])
@pytest.mark.parametrize("left,right", [(1, 1), (3, 3), (8, 8), (30, 30), (4, 2), (2, 5), (1, 7), (7, 1)])
def test_local_is_dense_under_a_mask(left: int, right: int, frames: int) -> None:
    x, valid = example(frames)
    context = context_mask(frames, left, right, "regular", x.device)
    dense = attention(numbers(), x, relative_positions(frames - 1, frames - 1, D, x), valid, context, heads=H)
    torch.testing.assert_close(local(numbers(), x, valid, left, right, aligned=True), dense, atol=2e-6, rtol=1e-5)
    if left == right:
        torch.testing.assert_close(local(numbers(), x, valid, left, right), dense, atol=2e-6, rtol=1e-5)


def by_loops(
    params: Any, x: torch.Tensor, valid: torch.Tensor, left: int, right: int, picks: list[int], aligned: bool
) -> torch.Tensor:
    """One query and one key at a time. ``picks`` are global: content alone, without u, from and to everywhere."""
    wide = {k: {n: t.double() for n, t in v.items()} if isinstance(v, dict) else v.double() for k, v in params.items()}
    x, size = x.double(), max(left, right)
    q, k, v = (linear(wide[name], x) for name in ("query", "key", "value"))
    names = [f"global_{name}" if "global_query" in params else name for name in ("query", "key", "value")]
    gq, gk, gv = (linear(wide[name], x) for name in names)
    r = linear(wide["position"], relative_positions(left, right, D, x))
    made = torch.zeros_like(q)
    for b, h, i in itertools.product(range(B), range(H), range(x.shape[1])):
        if not valid[b, i]:
            continue
        part = slice(h * WIDTH, (h + 1) * WIDTH)
        scores, values = [], []
        if i in picks:
            for j in valid[b].nonzero()[:, 0].tolist():
                scores.append(gq[b, i, part] @ gk[b, j, part])
                values.append(gv[b, j, part])
        else:
            for j in picks:
                if valid[b, j]:
                    scores.append(q[b, i, part] @ gk[b, j, part])
                    values.append(gv[b, j, part])
            for j in range(max(0, i - left), min(x.shape[1], i + right + 1)):
                if not valid[b, j] or j in picks:
                    continue
                score = (q[b, i, part] + wide["content_bias"][h]) @ k[b, j, part]
                row = left - (i - j)  # of the position table, left .. -right
                if not aligned:
                    # Q47: the window has 2 size + 1 places; the first `left` hold positions from its beginning, the
                    # other right + 1 stand at its end, and nothing in between.
                    place = size - (i - j)
                    row = place if place < left else place - (2 * size - left - right)
                    row = row if place < left or row >= left else -1
                if row >= 0:
                    score = score + (q[b, i, part] + wide["position_bias"][h]) @ r[row, part]
                scores.append(score)
                values.append(v[b, j, part])
        weights = torch.softmax(torch.stack(scores) / math.sqrt(WIDTH), dim=0)
        made[b, i, part] = (weights[:, None] * torch.stack(values)).sum(0)
    return linear(wide["output"], made).float()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("left,right", [(3, 3), (4, 2), (2, 5)])
@pytest.mark.parametrize("tokens,spacing", [(0, 1), (1, 1), (2, 1), (2, 3), (3, 4), (5, 5)])
@pytest.mark.parametrize("separate", [False, True])
def test_local_is_the_loop(
    left: int, right: int, tokens: int, spacing: int, separate: bool, aligned: bool
) -> None:  # fmt: skip
    x, valid = example(13)
    params = numbers(separate)
    picks = [pick for pick in range(0, tokens * spacing, spacing) if pick < 13]
    y = local(params, x, valid, left, right, aligned=aligned, global_tokens=tokens, global_spacing=spacing)
    torch.testing.assert_close(y, by_loops(params, x, valid, left, right, picks, aligned), atol=3e-6, rtol=1e-5)


def test_lopsided_windows_differ_from_aligned_ones() -> None:
    """Q47 matters where left and right differ, and only there."""
    x, valid = example(13)
    assert not torch.allclose(
        local(numbers(), x, valid, 4, 2), local(numbers(), x, valid, 4, 2, aligned=True), atol=1e-3
    )
    assert torch.equal(local(numbers(), x, valid, 3, 3), local(numbers(), x, valid, 3, 3, aligned=True))


def test_memory_is_linear_in_the_length() -> None:
    """No tensor of the computation has frames x frames elements."""
    frames, largest = 2000, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, leaf.numel() if isinstance(leaf, torch.Tensor) else 0)
            return out

    x, valid = example(frames)
    with Watch():
        local(numbers(), x, valid, 4, 4, global_tokens=1)
    assert 0 < largest < frames * frames / 10

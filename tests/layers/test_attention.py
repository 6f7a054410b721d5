"""Attention against the formulas (reference 4.4, 4.5), written out as loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from nest_fn.layers import random
from nest_fn.layers.attention import attention, context_mask, init_attention, merge_heads, split_heads
from nest_fn.layers.linear import linear
from nest_fn.layers.positions import relative_positions

B, T, D, H = 2, 7, 8, 2
WIDTH = D // H
VALID = torch.arange(T) < torch.tensor([7, 4])[:, None]
X = random.normal(random.key(1), (B, T, D))
CPU = torch.device("cpu")


def numbers(relative: bool = True) -> Any:
    """Parameters with u and v off zero."""
    params: Any = init_attention(random.key(2), D, H, relative=relative)
    if relative:
        params["content_bias"] = random.normal(random.key(3), (H, WIDTH))
        params["position_bias"] = random.normal(random.key(4), (H, WIDTH))
    return params


def by_loops(params: Any, x: torch.Tensor, valid: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    """One row, head, query and key at a time, in float64."""
    wide = {k: {n: t.double() for n, t in v.items()} if isinstance(v, dict) else v.double() for k, v in params.items()}
    x = x.double()
    q, k, v = (linear(wide[name], x) for name in ("query", "key", "value"))
    made = torch.zeros_like(q)
    encodings = relative_positions(T - 1, T - 1, D, x)
    r = linear(wide["position"], encodings) if "position" in params else None
    for b, h, i in itertools.product(range(B), range(H), range(T)):
        if not valid[b, i]:
            continue
        part = slice(h * WIDTH, (h + 1) * WIDTH)
        scores = {}
        for j in range(T):
            if not valid[b, j] or not (context is None or context[i, j]):
                continue
            if r is None:
                score = q[b, i, part] @ k[b, j, part]
            else:
                position = r[T - 1 - i + j, part]  # that of i - j
                score = (q[b, i, part] + wide["content_bias"][h]) @ k[b, j, part]
                score = score + (q[b, i, part] + wide["position_bias"][h]) @ position
            scores[j] = score / math.sqrt(WIDTH)
        weights = torch.softmax(torch.stack(list(scores.values())), dim=0)
        for weight, j in zip(weights, scores, strict=True):
            made[b, i, part] += weight * v[b, j, part]
    return linear(wide["output"], made).float()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(
    "context", [None, (3, 1, "regular"), (2, -1, "regular"), (-1, 0, "regular"), (2, 1, "chunked_limited")], ids=str
)
def test_attention_is_the_formula(context: tuple[int, int, str] | None, relative: bool, fused: bool) -> None:
    params = numbers(relative)
    positions = relative_positions(T - 1, T - 1, D, X) if relative else None
    mask = None if context is None else context_mask(T, *context, CPU)
    y = attention(params, X, positions, VALID, mask, heads=H, fused=fused)
    torch.testing.assert_close(y, by_loops(params, X, VALID, mask), atol=2e-6, rtol=1e-5)


def test_plain_attention_is_torch() -> None:
    params = numbers(relative=False)
    theirs = nn.MultiheadAttention(D, H, batch_first=True)
    parts = [params[name] for name in ("query", "key", "value")]
    theirs.in_proj_weight.data = torch.cat([part["weight"] for part in parts])
    theirs.in_proj_bias.data = torch.cat([part["bias"] for part in parts])
    theirs.out_proj.load_state_dict(params["output"])
    wanted, _ = theirs(X, X, X, key_padding_mask=~VALID, need_weights=False)
    ours = attention(params, X, None, VALID, None, heads=H)
    torch.testing.assert_close(ours[VALID], wanted[VALID], atol=1e-6, rtol=1e-5)


def test_a_query_in_padding_gives_the_output_bias() -> None:
    params = numbers()
    y = attention(params, X, relative_positions(T - 1, T - 1, D, X), VALID, None, heads=H)
    torch.testing.assert_close(y[~VALID], params["output"]["bias"].expand(3, D))


def test_a_context_for_each_row() -> None:
    params, around = numbers(), torch.stack([torch.ones(T, T).tril().bool(), torch.ones(T, T).triu().bool()])
    positions = relative_positions(T - 1, T - 1, D, X)
    both = attention(params, X, positions, VALID, around, heads=H)
    for row in range(B):
        alone = attention(params, X[row : row + 1], positions, VALID[row : row + 1], around[row], heads=H)
        torch.testing.assert_close(both[row : row + 1], alone, atol=1e-6, rtol=1e-5)


def test_heads_are_contiguous_runs_of_features() -> None:
    split = split_heads(X, H)
    assert torch.equal(split[0, 1, 3], X[0, 3, WIDTH:])
    assert torch.equal(merge_heads(split), X)


def test_width_must_be_a_multiple_of_the_heads() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of 4 heads"):
        init_attention(random.key(0), 10, 4)


def sees(i: int, j: int, left: int, right: int, style: str) -> bool:
    """Reference 4.5, one query and one key."""
    if style == "regular" or right < 0:
        return (left < 0 or j >= i - left) and (right < 0 or j <= i + right)
    chunk = right + 1
    behind = i // chunk - j // chunk
    return behind >= 0 and (left < 0 or behind <= left // chunk)


SIDES = [(-1, -1), (0, 0), (3, 0), (0, 2), (4, 1), (6, 2), (-1, 2), (5, -1), (-1, 0), (30, 30)]


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("style", ["regular", "chunked_limited"])
@pytest.mark.parametrize("left,right", SIDES)
def test_context_mask_by_brute_force(left: int, right: int, style: str, drawn: bool) -> None:
    frames = 11
    sides = (torch.tensor(left), torch.tensor(right)) if drawn else (left, right)
    mask = context_mask(frames, *sides, style, CPU)
    if left < 0 and right < 0 and not drawn:
        assert mask is None
        return
    assert mask is not None
    wanted = [[sees(i, j, left, right, style) for j in range(frames)] for i in range(frames)]
    assert mask.tolist() == wanted

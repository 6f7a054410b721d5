"""Attention weights against those that the layer applies, statistics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from nest_fn import key
from nest_fn.analysis import attention as heads
from nest_fn.layers import random
from nest_fn.layers.attention import attention, attention_weights, init_attention
from nest_fn.layers.linear import linear
from nest_fn.layers.positions import relative_positions
from tests.analysis.models import small_batch, small_model, to_double


def test_weights_are_those_that_the_layer_applies() -> None:
    params = to_double(init_attention(key(1), 8, 2))
    x = random.normal(key(2), (2, 5, 8), torch.float64)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    positions = relative_positions(4, 4, 8, x)
    weights = attention_weights(params, x, positions, valid, None, heads=2)
    values = linear(params["value"], x).unflatten(2, (2, 4)).transpose(1, 2)
    mixed = (weights @ values).transpose(1, 2).flatten(2)
    wanted = attention(params, x, positions, valid, None, heads=2)
    torch.testing.assert_close(linear(params["output"], mixed)[valid], wanted[valid])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 5, dtype=torch.float64))


def test_even_and_single_weights() -> None:
    valid = torch.tensor([[True] * 4])
    even = torch.full((1, 1, 4, 4), 0.25)
    span, entropy, evenness, itself = heads._statistics(even, valid)[:, 0].tolist()
    assert span == pytest.approx((0 + 1 + 2 + 3 + 1 + 0 + 1 + 2) * 2 / 16)
    assert entropy == pytest.approx(math.log(4))
    assert evenness == pytest.approx(1.0)
    assert itself == pytest.approx(0.25)
    diagonal = heads._statistics(torch.eye(4)[None, None], valid)[:, 0].tolist()
    assert diagonal == pytest.approx([0.0, 0.0, 0.0, 1.0])
    padded = heads._statistics(torch.eye(4)[None, None].flip(2), torch.tensor([[True, False, False, False]]))
    assert float(padded[0, 0]) == 3.0


@pytest.mark.parametrize(
    "overrides", [(), ("encoder.self_attention_model=abs_pos", "encoder.conv_norm_type=layer_norm")]
)
def test_statistics_of_a_model_have_their_bounds_and_ignore_padding(overrides: tuple[str, ...]) -> None:
    params, state, cfg = small_model(*overrides)
    batch = small_batch(2)
    found = heads.head_statistics(params, state, batch["audio"], batch["audio_len"], cfg)
    assert found.span.shape == (cfg.encoder.n_layers, cfg.encoder.n_heads)
    assert float(found.evenness.max()) <= 1.0
    assert float(found.span.min()) > 0
    alone = [
        heads.head_statistics(params, state, batch["audio"][row : row + 1, :n], batch["audio_len"][row : row + 1], cfg)
        for row, n in enumerate(batch["audio_len"].tolist())
    ]
    total = sum(one.span * one.queries for one in alone) / sum(one.queries for one in alone)
    torch.testing.assert_close(found.span, total, rtol=1e-6, atol=1e-9)


def test_local_attention_is_refused() -> None:
    params, state, cfg = small_model(
        "encoder.self_attention_model=rel_pos_local_attn", "encoder.att_context_size=[2,2]"
    )
    batch = small_batch(1)
    with pytest.raises(ValueError, match="local attention"):
        heads.head_statistics(params, state, batch["audio"], batch["audio_len"], cfg)

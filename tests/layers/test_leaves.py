"""Affine maps, convolutions, norms and dropout against torch.nn, over a product of options."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from nest_fn.layers import initializers, random
from nest_fn.layers.conv import conv, init_conv
from nest_fn.layers.dropout import depth_rates, dropout, stochastic_depth
from nest_fn.layers.feed_forward import feed_forward, init_feed_forward
from nest_fn.layers.linear import init_linear, linear
from nest_fn.layers.norm import (
    batch_norm,
    group_norm,
    init_batch_norm_state,
    init_norm,
    instance_norm,
    layer_norm,
    scale_shift,
)

KEY = random.key(0)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return random.normal(random.key(seed), shape)


def load(module: nn.Module, tree: Any) -> nn.Module:
    """The module with these numbers."""
    module.load_state_dict(dict(tree))
    return module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 4, 6), (0, 6)])
def test_linear(bias: bool, shape: tuple[int, ...]) -> None:
    params = init_linear(KEY, 6, 5, bias)
    assert torch.equal(linear(params, noise(*shape)), load(nn.Linear(6, 5, bias), params)(noise(*shape)))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride,padding", [(1, 0), (2, 1), (3, 2)])
@pytest.mark.parametrize("rank", [1, 2])
def test_conv(rank: int, stride: int, padding: int, groups: int, bias: bool) -> None:
    params = init_conv(KEY, 4, 8, (3,) * rank, groups, bias)
    kind = nn.Conv1d if rank == 1 else nn.Conv2d
    theirs = load(kind(4, 8, 3, stride, padding, groups=groups, bias=bias), params)
    x = noise(2, 4, *(9, 7)[:rank])
    torch.testing.assert_close(conv(params, x, stride, padding, groups), theirs(x))


def test_layer_norm() -> None:
    params = {"weight": noise(6, seed=2), "bias": noise(6, seed=3)}
    assert torch.equal(layer_norm(params, noise(2, 5, 6)), load(nn.LayerNorm(6), params)(noise(2, 5, 6)))  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_group_norm(groups: int) -> None:
    params = {"weight": noise(6, seed=2), "bias": noise(6, seed=3)}
    theirs = load(nn.GroupNorm(groups, 6), params)
    assert torch.equal(group_norm(params, noise(2, 6, 5), groups), theirs(noise(2, 6, 5)))  # type: ignore[arg-type]


def test_instance_norm() -> None:
    torch.testing.assert_close(instance_norm(noise(2, 6, 5)), nn.InstanceNorm1d(6)(noise(2, 6, 5)))


def test_scale_shift_is_batch_norm_with_neutral_statistics() -> None:
    params = {"weight": noise(6, seed=2), "bias": noise(6, seed=3)}
    theirs = nn.BatchNorm1d(6, eps=1e-12).eval()
    theirs.load_state_dict({**params, **init_batch_norm_state(6)})
    torch.testing.assert_close(scale_shift(params, noise(2, 6, 5)), theirs(noise(2, 6, 5)))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 6, 2), (4, 6, 1)])
def test_batch_norm_over_several_steps(shape: tuple[int, ...]) -> None:
    """Outputs, gradients and running statistics of four training steps, then eval."""
    params: Any = {"weight": noise(6, seed=2), "bias": noise(6, seed=3)}
    theirs = nn.BatchNorm1d(6)
    theirs.load_state_dict({**params, **init_batch_norm_state(6)})
    state = init_batch_norm_state(6)
    for step in range(4):
        x = (2 * noise(*shape, seed=10 + step) + step).requires_grad_()
        y, state = batch_norm(params, state, x, train=True)
        wanted = theirs(x)
        torch.testing.assert_close(y, wanted)
        weight = noise(*shape, seed=20 + step)
        (ours,) = torch.autograd.grad((y * weight).sum(), x)
        torch.testing.assert_close(ours, torch.autograd.grad((wanted * weight).sum(), x)[0], atol=1e-5, rtol=1e-4)
        for name, leaf in theirs.named_buffers():
            torch.testing.assert_close(state[name], leaf)  # type: ignore[literal-required]
    y, after = batch_norm(params, state, noise(*shape))
    torch.testing.assert_close(y, theirs.eval()(noise(*shape)))
    assert after is state


def test_masked_batch_norm_is_batch_norm_of_the_valid_frames() -> None:
    params: Any = {"weight": noise(6, seed=2), "bias": noise(6, seed=3)}
    x, state = noise(3, 6, 8), init_batch_norm_state(6)
    valid = torch.arange(8) < torch.tensor([8, 3, 5])[:, None]
    frames = x.transpose(1, 2)[valid].T[None]  # [1, 6, 16]
    y, new = batch_norm(params, state, x, valid, train=True)
    wanted, wanted_state = batch_norm(params, state, frames, train=True)
    torch.testing.assert_close(y.transpose(1, 2)[valid].T[None], wanted)
    for name, leaf in wanted_state.items():
        torch.testing.assert_close(new[name], leaf)  # type: ignore[literal-required]


def test_masked_batch_norm_without_a_valid_frame_is_finite() -> None:
    y, state = batch_norm(init_norm(2), init_batch_norm_state(2), noise(1, 2, 4), torch.zeros(1, 4).bool(), train=True)
    assert y.isfinite().all()
    assert all(leaf.isfinite().all() for leaf in state.values())  # type: ignore[attr-defined]


def test_batch_norm_keeps_its_statistics_in_float32_under_bfloat16() -> None:
    params = {name: leaf.bfloat16() for name, leaf in init_norm(6).items()}  # type: ignore[attr-defined]
    _, state = batch_norm(params, init_batch_norm_state(6), noise(2, 6, 5).bfloat16(), train=True)  # type: ignore[arg-type]
    assert state["running_mean"].dtype == torch.float32


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_drops_and_scales(rate: float) -> None:
    x = torch.ones(100_000)
    y = dropout(x, rate, key=KEY, train=True)
    kept = y != 0
    assert float(y[kept].min()) == float(y[kept].max()) == pytest.approx(1 / (1 - rate))
    assert abs(float(kept.double().mean()) - (1 - rate)) < 4 * math.sqrt(rate * (1 - rate) / 1e5)
    assert torch.equal(dropout(x, rate, key=KEY), x)
    assert torch.equal(dropout(x, 0.0, train=True), x)


def test_dropout_with_keys_of_rows() -> None:
    keys, x = random.split(KEY, 3), torch.ones(3, 50)
    many = dropout(x, 0.4, key=keys, train=True)
    assert torch.equal(many[1], dropout(x[1], 0.4, key=keys[1], train=True))


def test_stochastic_depth_takes_the_layer_or_passes_it_by() -> None:
    x, y = torch.ones(3), torch.full((3,), 2.0)
    outs = torch.stack([stochastic_depth(x, y, 0.25, key=k, train=True) for k in random.split(KEY, 2000)])
    dropped = (outs == 1.0).all(1)
    torch.testing.assert_close(outs[~dropped], torch.full_like(outs[~dropped], 1 + 1 / 0.75))
    assert abs(float(dropped.double().mean()) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    assert stochastic_depth(x, y, 0.25) is y


def test_depth_rates() -> None:
    """Six layers, 0.3, the first exempt: reference 4.7."""
    assert depth_rates(6, 0.3, "linear", 1) == pytest.approx((0.0, 0.06, 0.12, 0.18, 0.24, 0.3))
    assert depth_rates(4, 0.3, "uniform", 2) == (0.0, 0.0, 0.3, 0.3)
    assert depth_rates(3, 0.0, "linear", 1) == (0.0, 0.0, 0.0)


def test_feed_forward() -> None:
    params = init_feed_forward(KEY, 6, 10)
    theirs = nn.Sequential(nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 6))
    load(theirs[0], params["linear1"])
    load(theirs[2], params["linear2"])
    torch.testing.assert_close(feed_forward(params, noise(2, 3, 6)), theirs(noise(2, 3, 6)))


@pytest.mark.parametrize(
    "name,theirs",
    [("xavier_uniform", nn.init.xavier_uniform_), ("xavier_normal", nn.init.xavier_normal_)],
)
@pytest.mark.parametrize("shape", [(64, 200), (32, 20, 5)])
def test_initializers_have_the_spread_of_torch(name: str, theirs: Any, shape: tuple[int, ...]) -> None:
    ours, reference = getattr(initializers, name)(KEY, shape), theirs(torch.empty(shape))
    assert float(ours.std()) == pytest.approx(float(reference.std()), rel=0.05)
    if name.endswith("uniform"):
        assert float(ours.abs().max()) == pytest.approx(float(reference.abs().max()), rel=0.02)


@pytest.mark.parametrize("module", [nn.Linear(300, 40), nn.Conv1d(30, 40, 5), nn.Conv2d(8, 60, 3, groups=4)])
def test_torch_default(module: Any) -> None:
    fan_in = math.prod(module.weight.shape[1:])
    for leaf in (module.weight.detach(), module.bias.detach()):
        ours = initializers.torch_default(KEY, leaf.shape, fan_in)
        assert ours.shape == leaf.shape
        assert float(ours.abs().max()) <= 1 / math.sqrt(fan_in)
        assert float(leaf.abs().max()) <= 1 / math.sqrt(fan_in)
        assert float(ours.std()) == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.3)

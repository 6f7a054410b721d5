"""Convolutions, and the subsampling made of them, on a CPU in bfloat16."""

from __future__ import annotations

import pytest
import torch

from nest_fn.layers import random
from nest_fn.layers.conv import conv, init_conv
from nest_fn.layers.subsampling import CONVOLUTIONAL, SubsamplingSpec, init_subsampling, subsample
from nest_fn.layers.tree import fill, flatten


@pytest.mark.parametrize("space", [(40,), (20, 12)])
def test_depthwise_in_bfloat16_is_float32_rounded(space: tuple[int, ...]) -> None:
    """On a CPU; input and gradients too."""
    key = random.key(5)
    params = init_conv(key, 8, 8, (3,) * len(space), groups=8)
    half = {name: leaf.bfloat16().requires_grad_() for name, leaf in params.items()}
    wide = {name: leaf.detach().float().requires_grad_() for name, leaf in half.items()}
    x = random.normal(key, (2, 8, *space)).bfloat16()
    y, z = conv(half, x, groups=8, padding=1), conv(wide, x.float(), groups=8, padding=1)
    assert y.dtype == torch.bfloat16 and torch.equal(y, z.bfloat16())
    grad = random.normal(random.key(6), tuple(y.shape)).bfloat16()
    ours = torch.autograd.grad(y, list(half.values()), grad)
    theirs = torch.autograd.grad(z, list(wide.values()), grad.float())
    assert all(torch.equal(one, other.bfloat16()) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("kind", CONVOLUTIONAL)
def test_subsampling_in_bfloat16_is_near_float32(kind: str, factor: int) -> None:
    """All kinds and depths, with gradients of the parameters' type."""
    spec = SubsamplingSpec(kind, factor, 16, 8, 4)
    wide = init_subsampling(random.key(factor), spec)
    leaves = {path: leaf.bfloat16().requires_grad_() for path, leaf in flatten(wide).items()}
    x, lengths = random.normal(random.key(1), (2, 48, 16)), torch.tensor([48, 20])
    y, _ = subsample(fill(wide, leaves), x.bfloat16(), lengths, spec)
    z, _ = subsample(wide, x, lengths, spec)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), z, rtol=0.0, atol=16 * torch.finfo(torch.bfloat16).eps * float(z.abs().max()))
    grads = torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
    assert all(grad.dtype == torch.bfloat16 and bool(grad.isfinite().all()) for grad in grads)

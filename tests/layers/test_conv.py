"""Convolutions on a CPU in bfloat16."""

from __future__ import annotations

import pytest
import torch

from nest_fn.layers import random
from nest_fn.layers.conv import conv, init_conv


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

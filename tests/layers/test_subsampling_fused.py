"""The operator for two convolutions beside the layers that it stands for, in Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

INTERPRETED = """
import torch
from nest_fn.layers import random, subsampling, subsampling_fused, subsampling_triton
from nest_fn.layers.subsampling import SubsamplingSpec, init_subsampling, subsample
from nest_fn.layers.tree import fill, flatten

subsampling_fused._forward.register_kernel("cpu")(
    lambda x, lengths, first, second, once, wide, narrow, pad: subsampling_triton.forward(
        x, lengths, first, second, (once, wide, narrow), pad
    )
)
subsampling_fused._backward.register_kernel("cpu")(subsampling_triton.backward)
subsampling_triton.PROGRAMS = 3  # fewer than there are tiles, so that a program makes several

def run(params, x, lengths, spec, fused):
    subsampling._is_fused = lambda x, spec: fused
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in flatten(params).items()}
    y, new = subsample(fill(params, leaves), x, lengths, spec)
    loss = (y.float() * random.normal(random.key(9), y.shape)).sum()
    return y, new, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))

def close(a, b, eps):
    return float((a.float() - b.float()).abs().max()) <= eps * float(b.float().abs().max())

for number, (causal, masked, channels, shape, factor, dtype) in enumerate((
    (False, True, 24, (2, 27, 17), 4, torch.float32),
    (True, True, 70, (1, 16, 20), 8, torch.float32),
    (False, False, 16, (3, 30, 8), 8, torch.float32),
    (False, True, 16, (2, 24, 16), 8, torch.bfloat16),
)):
    spec = SubsamplingSpec("dw_striding", factor, shape[2], 8, channels, causal, masked)
    params = init_subsampling(random.key(number), spec)
    params = fill(params, {path: leaf.to(dtype) for path, leaf in flatten(params).items()})
    x = random.normal(random.key(7), shape).to(dtype)
    lengths = torch.tensor([shape[1], shape[1] - 9, 5][: shape[0]])
    (y, new, grads), (z, other, wanted) = (run(params, x, lengths, spec, fused) for fused in (True, False))
    # Sums of some hundred terms; in bfloat16 the layers round between the two convolutions, the operator does not.
    eps = 64 * torch.finfo(dtype).eps if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert torch.equal(new, other) and y.dtype == z.dtype == dtype and close(y, z, eps), number
    for path in wanted:
        assert grads[path].dtype == dtype and close(grads[path], wanted[path], eps), (number, path)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with PyTorch for Linux alone")
def test_outputs_and_gradients_are_those_of_the_layers() -> None:
    """Causal and not, masked and not, channels and positions that fill no tile, float32 and bfloat16."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "equal", done.stderr

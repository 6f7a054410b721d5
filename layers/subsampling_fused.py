"""The first two convolutions of ``dw_striding`` as one operator for compiled training on CUDA.

Between them lies the largest tensor of the encoder, 1 MB for each second of audio in bfloat16, which is written, read,
masked and kept, and has a gradient of the same size. The operator makes each of its elements again where it is needed,
from nine features, and keeps none: 10 of the 60 MB that a step of NEST-Small moves for a second of audio.
"""

from __future__ import annotations

from typing import Any

import torch

from .types import Tensor

TAPS = 16  # rows of weights, for products of matrices: nine taps, the bias, zeros


def convolve_twice(
    first: Any, second: Any, x: Tensor, lengths: Tensor, shape: tuple[int, int, int], pad: int
) -> Tensor:
    """Both 3x3 convolutions with stride 2, the second depthwise: ``[B, F, M] -> [B, T, M', C]``.

    ``first`` and ``second`` are their parameters. Between them is a ReLU, and frames from ``lengths [B]`` on are 0.
    ``shape`` is (M after the first, T, M'), ``pad`` the zeros before an axis. There is no gradient for ``x``.
    """
    made: Tensor = _forward(x, lengths, _packed(first), _packed(second), *shape, pad)
    return made


def _packed(params: Any) -> Tensor:
    """Weight ``[C, 1, 3, 3]`` and bias ``[C]`` as ``[16, C]``."""
    rows = torch.cat((params["weight"].flatten(1).T, params["bias"][None]))
    return torch.nn.functional.pad(rows, (0, 0, 0, TAPS - rows.shape[0]))


@torch.library.custom_op("nest_fn::convolve_twice", mutates_args=(), device_types="cuda")
def _forward(
    x: torch.Tensor, lengths: torch.Tensor, first: torch.Tensor, second: torch.Tensor, once: int, wide: int,
    narrow: int, pad: int,
) -> torch.Tensor:  # fmt: skip
    from . import subsampling_triton

    return subsampling_triton.forward(x, lengths, first, second, (once, wide, narrow), pad)


@_forward.register_fake
def _(
    x: torch.Tensor, lengths: torch.Tensor, first: torch.Tensor, second: torch.Tensor, once: int, wide: int,
    narrow: int, pad: int,
) -> torch.Tensor:  # fmt: skip
    return first.new_empty((x.shape[0], wide, narrow, first.shape[1]))


@torch.library.custom_op("nest_fn::convolve_twice_backward", mutates_args=(), device_types="cuda")
def _backward(
    grad: torch.Tensor, x: torch.Tensor, lengths: torch.Tensor, first: torch.Tensor, second: torch.Tensor, once: int,
    pad: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    from . import subsampling_triton

    return subsampling_triton.backward(grad, x, lengths, first, second, once, pad)


@_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, lengths: torch.Tensor, first: torch.Tensor, second: torch.Tensor, once: int,
    pad: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return first.new_empty(first.shape, dtype=torch.float32), first.new_empty(first.shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, lengths, first, second, once, _, _, pad = inputs
    ctx.save_for_backward(x, lengths, first, second)
    ctx.once, ctx.pad = once, pad


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_first, to_second = _backward(grad, *ctx.saved_tensors, ctx.once, ctx.pad)
    kept = ctx.saved_tensors[2].dtype
    return None, None, to_first.to(kept), to_second.to(kept), None, None, None, None


_forward.register_autograd(_gradients, setup_context=_keep)

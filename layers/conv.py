"""Convolutions over time ``[B, D, T]`` and over images ``[B, D, height, width]``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict, cast

import torch
import torch.nn.functional as F
from torch import nn

from . import random
from .initializers import torch_default
from .module import call, template
from .types import Key, Tensor


class ConvParams(TypedDict, total=False):
    """``weight [out, in / groups, *kernel]`` and, if the layer has one, ``bias [out]``."""

    weight: Tensor
    bias: Tensor


class _Conv1d(nn.Conv1d):
    """A template with stride, padding and groups as arguments, so that one serves all 1-d convolutions."""

    def forward(self, x: Tensor, stride: int, padding: int, groups: int) -> Tensor:  # type: ignore[override]
        return F.conv1d(x, self.weight, self.bias, stride, padding, 1, groups)


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor, stride: int, padding: int, groups: int) -> Tensor:  # type: ignore[override]
        return F.conv2d(x, self.weight, self.bias, stride, padding, 1, groups)


_TEMPLATES = {
    (3, True): template(_Conv1d(1, 1, 1)),
    (3, False): template(_Conv1d(1, 1, 1, bias=False)),
    (4, True): template(_Conv2d(1, 1, 1)),
    (4, False): template(_Conv2d(1, 1, 1, bias=False)),
}


def init_conv(
    key: Key, in_channels: int, out_channels: int, kernel: Sequence[int], groups: int = 1, bias: bool = True
) -> ConvParams:
    """Initialise ``weight [out, in / groups, *kernel]`` and ``bias [out]`` as torch.nn.Conv1d and Conv2d do.

    ``kernel`` holds one size for a 1-d convolution and two for a 2-d one.
    """
    weight_key, bias_key = random.split(key, 2)
    shape = (out_channels, in_channels // groups, *kernel)
    fan_in = math.prod(shape[1:])
    params: ConvParams = {"weight": torch_default(weight_key, shape, fan_in)}
    if bias:
        params["bias"] = torch_default(bias_key, (out_channels,), fan_in)
    return params


def conv(params: ConvParams, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """Convolve in 1-d or 2-d: ``[B, in, *space] -> [B, out, *space]`` with ``weight [out, in / groups, *kernel]``.

    Raises ``ValueError`` if the channels or the number of axes do not match the weight.
    """
    weight = params["weight"]
    if x.ndim != weight.ndim or x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"conv: x is {list(x.shape)}, weight {list(weight.shape)} with {groups} groups wants "
            f"{weight.ndim} axes and {weight.shape[1] * groups} channels."
        )
    layer = _TEMPLATES[weight.ndim, "bias" in params]
    if groups == 1 or not bfloat16_on_cpu(weight):
        return cast(Tensor, call(layer, params, x, stride, padding, groups))  # type: ignore[arg-type]
    wide = {name: leaf.float() for name, leaf in params.items()}  # type: ignore[attr-defined]
    return cast(Tensor, call(layer, wide, x.float(), stride, padding, groups)).to(weight.dtype)


def bfloat16_on_cpu(weight: Tensor) -> bool:
    """Whether a depthwise convolution with weight ``[out, in, *kernel]`` is computed in float32, and its input may be.

    oneDNN computes the gradient of such a convolution in bfloat16 16 times as slowly as in float32.
    """
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"

"""The Conformer's convolution module (arXiv 2005.08100, section 2.2; reference 4.6)."""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F

from . import random
from .conv import ConvParams, conv, init_conv
from .linear import LinearParams, init_linear, linear
from .norm import (
    BatchNormState,
    NormParams,
    batch_norm,
    group_norm,
    init_batch_norm_state,
    init_norm,
    instance_norm,
    layer_norm,
    scale_shift,
)
from .types import Gather, Key, Tensor


class ConvModuleParams(TypedDict, total=False):
    """1x1 convolutions are stored as linear layers, ``pointwise1 [2D, D]`` and ``pointwise2 [D, D]``.

    ``norm`` is absent for instance norm, which has no parameters.
    """

    pointwise1: LinearParams
    depthwise: ConvParams
    norm: NormParams
    pointwise2: LinearParams


class ConvModuleState(TypedDict, total=False):
    """Running statistics; empty unless the norm is batch norm."""

    norm: BatchNormState


def init_conv_module(
    key: Key, width: int, kernel: int, *, bias: bool = True, norm: str = "batch_norm"
) -> tuple[ConvModuleParams, ConvModuleState]:
    """Initialise as torch.nn does (reference 4.8); ``kernel`` is in frames, ``norm`` is as in ``conv_module``."""
    first, depthwise, second = random.split(key, 3)
    params: ConvModuleParams = {
        "pointwise1": init_linear(first, width, 2 * width, bias),
        "depthwise": init_conv(depthwise, width, width, (kernel,), groups=width, bias=bias),
        "pointwise2": init_linear(second, width, width, bias),
    }
    if norm != "instance_norm":
        params["norm"] = init_norm(width)
    return params, {"norm": init_batch_norm_state(width)} if norm == "batch_norm" else {}


def conv_module(
    params: ConvModuleParams, state: ConvModuleState, x: Tensor, valid: Tensor, *, context: tuple[int, int],
    norm: str = "batch_norm", masked_norm: bool = False, gather: Gather | None = None, train: bool = False,
) -> tuple[Tensor, ConvModuleState]:  # fmt: skip
    """Convolution module: ``[B, T, D] -> [B, T, D]`` and the new state (reference 4.6).

    Pointwise convolution, GLU, depthwise convolution over ``context = (left, right)`` frames, norm, SiLU, pointwise
    convolution. Frames that are not ``valid`` (bool ``[B, T]``) are zeroed before the depthwise convolution.

    ``norm``: batch_norm, layer_norm, instance_norm, fused_batch_norm (scale and shift only) or group_normN (N groups).
    ``masked_norm`` excludes padded frames from the statistics of batch norm; the reference includes them (Q27).
    ``gather`` all-gathers these statistics, so that they are those of all processes. Raises ``ValueError`` for an
    unknown ``norm``.
    """
    hidden = F.glu(linear(params["pointwise1"], x), dim=-1)
    hidden = torch.where(valid[..., None], hidden, 0.0)
    # [B, T, D] -> [B, D, T]; contiguous memory, because the depthwise kernel is slow without it.
    hidden = F.pad(hidden.transpose(1, 2), context).contiguous()
    hidden = conv(params["depthwise"], hidden, groups=hidden.shape[1])
    hidden, state = _norm(params, state, hidden, valid if masked_norm else None, norm, gather, train)
    return linear(params["pointwise2"], F.silu(hidden).transpose(1, 2)), state


def _norm(
    params: ConvModuleParams,
    state: ConvModuleState,
    x: Tensor,
    valid: Tensor | None,
    norm: str,
    gather: Gather | None,
    train: bool,
) -> tuple[Tensor, ConvModuleState]:
    """Apply the chosen norm: ``[B, D, T] -> [B, D, T]``."""
    if norm == "batch_norm":
        y, statistics = batch_norm(params["norm"], state["norm"], x, valid, gather=gather, train=train)
        return y, {"norm": statistics}
    if norm == "layer_norm":
        return layer_norm(params["norm"], x.transpose(1, 2)).transpose(1, 2), state
    if norm == "instance_norm":
        return instance_norm(x), state
    if norm == "fused_batch_norm":
        return scale_shift(params["norm"], x), state
    if norm.startswith("group_norm"):
        return group_norm(params["norm"], x, int(norm.removeprefix("group_norm"))), state
    raise ValueError(
        f"conv_module: no norm is called '{norm}'; use batch_norm, layer_norm, instance_norm, group_normN."
    )

"""Normalisation layers. Batch norm is the only stateful one: it returns its updated running statistics."""

from __future__ import annotations

from typing import TypedDict, cast

import torch
import torch.nn.functional as F
from torch import nn

from .module import call, template
from .types import Gather, Tensor

EPS = 1e-5
MOMENTUM = 0.1


class NormParams(TypedDict):
    """Scale ``weight [D]`` and shift ``bias [D]``."""

    weight: Tensor
    bias: Tensor


class BatchNormState(TypedDict):
    """``running_mean [D]``, ``running_var [D]`` and the number of training batches, int64 ``num_batches_tracked``."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


class _LayerNorm(nn.LayerNorm):
    """A template that reads its width from its weight, so that one serves all widths."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, EPS)


class _GroupNorm(nn.GroupNorm):
    def forward(self, x: Tensor, groups: int) -> Tensor:  # type: ignore[override]
        return F.group_norm(x, groups, self.weight, self.bias, EPS)


_LAYER_NORM = template(_LayerNorm(1))
_GROUP_NORM = template(_GroupNorm(1, 1))


def init_norm(width: int) -> NormParams:
    """Initialise scale ``[D]`` with 1 and shift ``[D]`` with 0; the same for all norms here."""
    return {"weight": torch.ones(width), "bias": torch.zeros(width)}


def init_batch_norm_state(width: int) -> BatchNormState:
    """Initialise the running mean ``[D]`` with 0, the running variance ``[D]`` with 1 and the count with 0."""
    return {
        "running_mean": torch.zeros(width),
        "running_var": torch.ones(width),
        "num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }


def _check_channels(what: str, params: NormParams, x: Tensor) -> None:
    width = params["weight"].shape[0]
    if x.ndim != 3 or x.shape[1] != width:
        raise ValueError(f"{what}: x is {list(x.shape)}, want [B, {width}, T] as the weight [{width}] says.")


def layer_norm(params: NormParams, x: Tensor) -> Tensor:
    """Normalise over the last axis: ``[..., D] -> [..., D]``. Raises ``ValueError`` if ``D`` is not the weight's."""
    if x.shape[-1] != params["weight"].shape[-1]:
        raise ValueError(f"layer_norm: x ends in {x.shape[-1]} features, weight wants {params['weight'].shape[-1]}.")
    return cast(Tensor, call(_LAYER_NORM, params, x))  # type: ignore[arg-type]


def group_norm(params: NormParams, x: Tensor, groups: int) -> Tensor:
    """Normalise each group of channels over channels and time: ``[B, D, T] -> [B, D, T]``.

    Raises ``ValueError`` if ``D`` does not match the weight or is not a multiple of ``groups``.
    """
    _check_channels("group_norm", params, x)
    if x.shape[1] % groups:
        raise ValueError(f"group_norm: {x.shape[1]} channels are no multiple of {groups} groups; change one of them.")
    return cast(Tensor, call(_GROUP_NORM, params, x, groups))  # type: ignore[arg-type]


def instance_norm(x: Tensor) -> Tensor:
    """Normalise each channel of each row over time, without parameters: ``[B, D, T] -> [B, D, T]``."""
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPS)


def batch_norm(
    params: NormParams, state: BatchNormState, x: Tensor, valid: Tensor | None = None, *,
    gather: Gather | None = None, train: bool = False,
) -> tuple[Tensor, BatchNormState]:  # fmt: skip
    """Batch norm: ``[B, D, T] -> [B, D, T]`` and the new state (reference 4.6).

    In training, the statistics of the batch are used, and the running statistics are updated with momentum 0.1; in
    evaluation, the running statistics are used. ``valid`` (bool ``[B, T]``) excludes padded frames from the statistics;
    without it they are included, as in the reference (Q27). ``gather`` all-gathers the statistics over processes.
    """
    _check_channels("batch_norm", params, x)
    if not train:
        mean, variance = state["running_mean"], state["running_var"]
        # The kernel takes half-precision x with parameters in the precision of the statistics, and no other mixture.
        weight, bias = params["weight"], params["bias"]
        if x.dtype == torch.bfloat16:
            weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
        return F.batch_norm(x, mean, variance, weight, bias, eps=EPS), state
    if valid is None and gather is None:
        # The kernel does not return the batch statistics, so they are computed separately, for the running ones.
        mean, variance, count = _statistics(x)
        y = F.batch_norm(x, None, None, params["weight"], params["bias"], training=True, eps=EPS)
    else:
        mean, variance, count = _moments(x, valid) if gather is None else _pooled(*_moments(x, valid), gather)
        scale = params["weight"] * torch.rsqrt(variance + EPS)
        y = (x * scale[:, None] + (params["bias"] - mean * scale)[:, None]).to(x.dtype)
    mean, variance, count = mean.detach(), variance.detach(), count.detach()
    unbiased = variance * (count / (count - 1).clamp(min=1))
    new: BatchNormState = {
        "running_mean": torch.lerp(state["running_mean"], mean.to(state["running_mean"].dtype), MOMENTUM),
        "running_var": torch.lerp(state["running_var"], unbiased.to(state["running_var"].dtype), MOMENTUM),
        "num_batches_tracked": state["num_batches_tracked"] + 1,
    }
    return y, new


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    variance, mean = torch.var_mean(x.detach(), dim=(0, 2), correction=0)
    return mean, variance, torch.full((), x.shape[0] * x.shape[2], dtype=x.dtype, device=x.device)


def _moments(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[D]``, biased variance ``[D]`` and the number of frames ``[]``, at least in float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if valid is None:
        variance, mean = torch.var_mean(x, dim=(0, 2), correction=0)
        return mean, variance, torch.full((), x.shape[0] * x.shape[2], dtype=x.dtype, device=x.device)
    weight = valid.to(x.dtype)[:, None, :]
    count = weight.sum()
    mean = (x * weight).sum(dim=(0, 2)) / count.clamp(min=1)
    variance = ((x - mean[:, None]).square() * weight).sum(dim=(0, 2)) / count.clamp(min=1)
    return mean, variance, count


def _pooled(mean: Tensor, variance: Tensor, count: Tensor, gather: Gather) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the moments of all processes with one all-gather, without cancellation (Chan et al. 1979)."""
    shared = gather(torch.cat((mean, variance, count[None])))  # [W, 2D + 1]
    means, variances, counts = shared.split((mean.shape[0], mean.shape[0], 1), dim=1)
    total = counts.sum()
    fraction = counts / total.clamp(min=1)
    mean = (means * fraction).sum(dim=0)
    return mean, ((variances + (means - mean).square()) * fraction).sum(dim=0), total


def scale_shift(params: NormParams, x: Tensor) -> Tensor:
    """Scale and shift channels, as a batch norm does after its statistics are fused: ``[B, D, T] -> [B, D, T]``."""
    _check_channels("scale_shift", params, x)
    return x * params["weight"][:, None] + params["bias"][:, None]

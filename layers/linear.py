"""The linear layer, ``x W^T + b``."""

from __future__ import annotations

from typing import TypedDict, cast

from torch import nn

from . import random
from .initializers import torch_default
from .module import call, template
from .types import Key, Tensor

# nn.Linear's forward reads its tensors only, so one template serves every width.
_WITH_BIAS = template(nn.Linear(1, 1))
_WITHOUT_BIAS = template(nn.Linear(1, 1, bias=False))


class LinearParams(TypedDict, total=False):
    """``weight [out, in]`` and, if the layer has one, ``bias [out]``."""

    weight: Tensor
    bias: Tensor


def init_linear(key: Key, in_features: int, out_features: int, bias: bool = True) -> LinearParams:
    """Initialise ``weight [out, in]`` and ``bias [out]`` as torch.nn.Linear does."""
    weight_key, bias_key = random.split(key, 2)
    params: LinearParams = {"weight": torch_default(weight_key, (out_features, in_features), in_features)}
    if bias:
        params["bias"] = torch_default(bias_key, (out_features,), in_features)
    return params


def linear(params: LinearParams, x: Tensor) -> Tensor:
    """Apply ``x W^T + b``: ``[..., in] -> [..., out]``. Raises ``ValueError`` if ``in`` does not match the weight."""
    weight = params["weight"]
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"linear: x ends in {x.shape[-1]} features, weight {list(weight.shape)} wants {weight.shape[-1]}."
        )
    return cast(Tensor, call(_WITH_BIAS if "bias" in params else _WITHOUT_BIAS, params, x))  # type: ignore[arg-type]

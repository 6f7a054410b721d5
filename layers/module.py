"""How leaves are run: ``torch.func.functional_call`` on templates that hold names and a rule, but no numbers.

A template is a torch.nn module on the meta device, built once when its file is imported (an ``nn.Module`` cannot be
built inside a traced function). ``functional_call`` runs its ``forward`` on the parameters given, so that names,
checks for missing and unexpected keys, and kernels are PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.func import functional_call

from .tree import tree_map
from .types import Params, State, Tensor

M = TypeVar("M", bound=nn.Module)


def template(module: M) -> M:
    """The module as a template: on the meta device, in eval mode, without gradients."""
    return module.to(device="meta").eval().requires_grad_(False)


def call(layer: nn.Module, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Run a template on ``params``; missing and unexpected names raise ``RuntimeError`` (``strict=True``)."""
    return functional_call(layer, dict(params), args, kwargs, strict=True)


def from_module(module: nn.Module) -> tuple[Params, State, Callable[..., tuple[Any, State]]]:
    """Any ``nn.Module`` as ``(params, state, apply)`` with ``apply(params, state, *args) -> (output, new state)``.

    ``functional_call`` writes into the buffers it is given (batch norm's running mean), so the state is cloned first
    and the clone is returned: arguments stay untouched.
    """
    params: Params = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    state: State = {name: leaf.detach().clone() for name, leaf in module.named_buffers()}

    def apply(params: Params, state: State, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        buffers = tree_map(torch.clone, state)
        return functional_call(module, {**params, **buffers}, args, kwargs, strict=True), buffers

    return params, state, apply

"""Elementary layers call torch.nn modules through ``torch.func.functional_call``; the modules hold no parameters.

A template is a torch.nn module on the meta device, built once on import, because an ``nn.Module`` cannot be built
inside a traced function. ``functional_call`` runs its ``forward`` with the given parameters, so that their names, the
checks for missing and unexpected keys, and the kernels are PyTorch's own.
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
    """Turn a module into a template: move it to the meta device, set eval mode, disable gradients."""
    return module.to(device="meta").eval().requires_grad_(False)


def call(layer: nn.Module, params: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """Run a template's ``forward`` with ``params``. Raises ``RuntimeError`` for missing and unexpected names."""
    return functional_call(layer, dict(params), args, kwargs, strict=True)


def from_module(module: nn.Module) -> tuple[Params, State, Callable[..., tuple[Any, State]]]:
    """Convert any ``nn.Module`` to ``(params, state, apply)`` with ``apply(params, state, *args) -> (output, state)``.

    ``functional_call`` writes into the buffers it is given (such as batch norm's running mean). ``apply`` therefore
    clones the state and returns the clone; its arguments are not modified.
    """
    params: Params = {name: leaf.detach().clone() for name, leaf in module.named_parameters()}
    state: State = {name: leaf.detach().clone() for name, leaf in module.named_buffers()}

    def apply(params: Params, state: State, *args: Any, **kwargs: Any) -> tuple[Any, State]:
        buffers = tree_map(torch.clone, state)
        return functional_call(module, {**params, **buffers}, args, kwargs, strict=True), buffers

    return params, state, apply

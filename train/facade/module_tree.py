"""Trees of tensors as an ``nn.Module``, whose parameters and buffers are named by the trees' dotted paths.

``register_tree`` registers the leaves of the two trees in a module, ``collect_tree`` reads a tree back. Neither copies
tensors, and tensors that ``torch.func.functional_call`` swaps in are the ones that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nest_fn.layers.tree import tree_map
from nest_fn.layers.types import Params, State, Tensor


class Branch(nn.Module):
    """An inner node of a tree: holds leaves and further nodes, and computes nothing."""


class FixedDtypeBranch(Branch):
    """A branch whose leaves keep their dtype: targets must not depend on the precision of the model (``.half()``)."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedDtypeBranch:
        def keep(leaf: Tensor) -> Tensor:
            moved = fn(leaf)
            return moved if moved.dtype == leaf.dtype else leaf.to(moved.device)

        super()._apply(keep, recurse)
        return self


EXACT = ("quantizer",)
"""Branches that keep their dtype, by name."""


def register_tree(module: nn.Module, params: Params, state: State) -> None:
    """Register the leaves of ``params`` as parameters, of ``state`` as buffers, under their paths."""
    _grow(module, params, lambda node, name, leaf: node.register_parameter(name, nn.Parameter(leaf.detach())))
    _grow(module, state, lambda node, name, leaf: node.register_buffer(name, leaf.detach()))


def skeleton(tree: Any) -> Any:
    """A tree's structure without its tensors, for ``collect_tree``."""
    return tree_map(lambda leaf: None, tree)


def collect_tree(node: Any, structure: Any) -> Any:
    """The tree with that structure whose leaves are the module's own tensors."""
    if isinstance(structure, dict):
        return {name: collect_tree(getattr(node, name), below) for name, below in structure.items()}
    if isinstance(structure, list):
        return [collect_tree(getattr(node, str(index)), below) for index, below in enumerate(structure)]
    return node


def _grow(node: nn.Module, tree: Any, register: Callable[[nn.Module, str, Tensor], None]) -> None:
    items = tree.items() if isinstance(tree, Mapping) else ((str(index), child) for index, child in enumerate(tree))
    for name, child in items:
        if isinstance(child, Tensor):
            register(node, name, child)
            continue
        if name not in dict(node.named_children()):
            node.add_module(name, FixedDtypeBranch() if name in EXACT else Branch())
        _grow(node.get_submodule(name), child, register)

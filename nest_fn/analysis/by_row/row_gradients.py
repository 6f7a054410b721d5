"""The gradient of one parameter for each row, and its norm, as a product that need not be carried out.

The squared norm of a product over ``n`` frames follows from two ``n x n`` matrices without the gradient itself, where
that is cheaper (Li et al., arXiv 2110.05679).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.grad import conv1d_weight, conv2d_weight

from nest_fn.layers.types import Tensor

_AT_ONCE = 1 << 24  # elements of rows' gradients of one parameter that a norm holds at once: 64 MiB of float32


class RowGradient(Protocol):
    """The gradient of one parameter for each row, not yet computed."""

    def full(self) -> Tensor:
        """Gradients ``[B, *shape]``."""

    def squared_norm(self) -> Tensor:
        """Squared norms ``[B]``."""


class Held(NamedTuple):
    """Gradients ``[B, *shape]`` that are there already."""

    gradient: Tensor

    def full(self) -> Tensor:
        """Gradients ``[B, *shape]``."""
        return self.gradient

    def squared_norm(self) -> Tensor:
        """Squared norms ``[B]``."""
        return self.gradient.flatten(1).square().sum(dim=1)


class Product(NamedTuple):
    """``gradient[b] = left[b]^T right[b]``: ``left [B, n, p]``, ``right [B, n, q]``, as ``shape`` behind the rows."""

    left: Tensor
    right: Tensor
    shape: torch.Size

    def full(self) -> Tensor:
        """Gradients ``[B, *shape]``."""
        return torch.bmm(self.left.transpose(1, 2), self.right).reshape(-1, *self.shape)

    def squared_norm(self) -> Tensor:
        """``sum_st (left_s . left_t) (right_s . right_t)``, or from the gradient if that is less work: ``[B]``."""
        (_, n, p), q = self.left.shape, self.right.shape[2]
        if n * (p + q) <= p * q:
            grams = [side @ side.transpose(1, 2) for side in (self.left, self.right)]
            return (grams[0] * grams[1]).sum(dim=(1, 2))
        size = max(1, _AT_ONCE // (p * q))
        pieces = zip(self.left.split(size), self.right.split(size), strict=True)
        return torch.cat([Held(torch.bmm(a.transpose(1, 2), b)).squared_norm() for a, b in pieces])


class Convolved(NamedTuple):
    """The weight of a convolution: input ``[B, in, *space]``, gradient of the result ``[B, out, *space']``."""

    x: Tensor
    grad: Tensor
    shape: torch.Size
    settings: dict[str, Any]  # stride, padding, dilation, groups

    def _rows(self) -> Iterator[Tensor]:
        """Row by row, because PyTorch's kernel sums up over rows, and patches for all of them would be many times x."""
        weight_gradient = _CONV_WEIGHT[len(self.shape)]
        for x, grad in zip(self.x.split(1), self.grad.split(1), strict=True):
            yield weight_gradient(x, self.shape, grad, **self.settings)

    def full(self) -> Tensor:
        """Gradients ``[B, *shape]``."""
        return torch.stack(list(self._rows()))

    def squared_norm(self) -> Tensor:
        """Squared norms ``[B]``."""
        return torch.stack([row.square().sum() for row in self._rows()])


_CONV_WEIGHT = {3: conv1d_weight, 4: conv2d_weight}

"""Gradients of single utterances: their norms, directions, likeness and influence.

The gradient of row i is that of the *sum* of its loss in nats. The gradient of a batch's loss is the sum over its rows
divided by the batch's number of masked tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.func import grad, vmap

from nest_fn.config import Config
from nest_fn.layers.tree import fill, flatten
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.model import Batch, loss_sum

from .by_row.row_gradients import RowGradient
from .by_row.rows import check_independent, chunks, row_count, row_losses
from .by_row.taps import Sink, backward_by_row


def per_example_gradients(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key | None, train: bool = False,
    chunk: int | None = None, method: str = "taps",
) -> Params:  # fmt: skip
    """The gradient of every row: the tree of ``params`` with leaves ``[B, *shape]``, for ``B`` rows.

    Holds ``4 B P`` bytes for P parameters in float32, and the activations of ``chunk`` rows. ``method``: ``taps`` is
    one backward pass for a chunk (``taps.py``); ``vmap`` is ``torch.func.vmap`` over ``torch.func.grad``. ``key`` draws
    masks and, with ``train=True``, dropout, as in the whole batch. Raises ``ValueError`` for another ``method``, and
    for batch norm with ``train=True``.
    """
    check_independent("per_example_gradients", cfg, train)
    if method not in ("taps", "vmap"):
        raise ValueError(f"per_example_gradients: no method is called {method!r}; use taps or vmap.")
    found = {path: leaf.new_zeros(row_count(batch), *leaf.shape) for path, leaf in flatten(params).items()}
    place = 0
    for part in chunks(batch, chunk):
        rows = slice(place, place := place + row_count(part))
        if method == "vmap":
            made = flatten(_vmapped(params, state, part, cfg, key, train))
            for path, leaf in made.items():
                found[path][rows] = leaf
        else:

            def keep(path: str, row: RowGradient, rows: slice = rows) -> None:
                found[path][rows] = row.full()

            backward_rows(params, state, part, cfg, key, train, keep)
    return fill(params, found)


def _vmapped(params: Params, state: State, part: Batch, cfg: Config, key: Key | None, train: bool) -> Any:
    def summed(p: Params, row: Batch) -> Tensor:
        return loss_sum(p, state, row, cfg, key=key, train=train)[0]

    rows = {name: leaf[:, None] for name, leaf in part.items()}  # as many batches of one row
    return vmap(grad(summed), in_dims=(None, 0))(params, rows)


def backward_rows(
    params: Params, state: State, part: Batch, cfg: Config, key: Key | None, train: bool, sink: Sink
) -> tuple[Tensor, Tensor]:
    """Give the gradients of a chunk's rows to ``sink``; returns their losses and numbers of tokens, ``[B]`` each."""
    counts: list[Tensor] = []

    def losses(leaves: Mapping[str, Tensor]) -> Tensor:
        sums, tokens = row_losses(fill(params, leaves), state, part, cfg, key=key, train=train)
        counts.append(tokens)
        return sums

    sums = backward_by_row(losses, flatten(params), row_count(part), sink)
    return sums, counts[0]


def _read_all(
    params: Params, state: State, part: Batch, cfg: Config, key: Key | None, train: bool,
    read: Callable[[RowGradient], Tensor],
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """What ``read`` makes of every parameter's gradients, by path, and the rows' losses and numbers of tokens."""
    found: dict[str, Tensor] = {}

    def sink(path: str, row: RowGradient) -> None:
        found[path] = read(row)

    return found, backward_rows(params, state, part, cfg, key, train, sink)


class GradientNorms(NamedTuple):
    """Norms of the gradients of rows, and what they are to be divided by."""

    squared: dict[str, Tensor]  # by path of the parameter, [B]: of the gradient of the row's loss sum
    loss: Tensor  # [B], nats, sum over the row's masked tokens
    tokens: Tensor  # [B], masked tokens x codebooks

    @property
    def norm(self) -> Tensor:
        """Norm of each row's gradient over all parameters: ``[B]``."""
        return torch.stack(list(self.squared.values())).sum(dim=0).sqrt()


def per_example_norms(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key | None, train: bool = False,
    chunk: int | None = None,
) -> GradientNorms:  # fmt: skip
    """Norms of the gradients of all rows, by parameter, without holding the gradients: ``[B]`` for each path.

    Each parameter's gradients exist while its norm is taken, and where it is cheaper not even then.
    Memory is that of one backward pass over ``chunk`` rows. Raises ``ValueError`` for batch norm with ``train=True``.
    """
    check_independent("per_example_norms", cfg, train)
    parts = []
    for part in chunks(batch, chunk):
        found, sums = _read_all(params, state, part, cfg, key, train, lambda row: row.squared_norm())
        zeros = {path: leaf.new_zeros(row_count(part)) for path, leaf in flatten(params).items()}
        parts.append(GradientNorms(zeros | found, *sums))
    squared = {path: torch.cat([part.squared[path] for part in parts]) for path in parts[0].squared}
    return GradientNorms(squared, torch.cat([part.loss for part in parts]), torch.cat([part.tokens for part in parts]))


def gradient_dots(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key | None, train: bool = False
) -> dict[str, Tensor]:  # fmt: skip
    """Inner products of the gradients of every two rows, by parameter: ``[B, B]`` for each path.

    Their sum over the paths gives cosines between utterances (``cosines``). Holds the gradients of one parameter at a
    time. Raises ``ValueError`` for batch norm with ``train=True``.
    """
    check_independent("gradient_dots", cfg, train)

    def read(row: RowGradient) -> Tensor:
        flat = row.full().flatten(1)
        return flat @ flat.t()

    return _read_all(params, state, next(chunks(batch)), cfg, key, train, read)[0]


def cosines(dots: Tensor) -> Tensor:
    """Cosines from inner products: ``[..., B, B] -> [..., B, B]``; 0 where a vector is 0."""
    norms = dots.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    product = norms[..., :, None] * norms[..., None, :]
    return torch.where(product > 0, dots / product.clamp(min=torch.finfo(dots.dtype).tiny), 0.0)


def influence(
    params: Params, state: State, train_batch: Batch, test_batch: Batch, cfg: Config, *, key: Key | None,
    rate: float = 1.0, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Influence of each training row on the loss of each test row, by gradient dot products: ``[N, M]``.

    ``rate * <g_train, g_test>``, the first-order decrease of the test loss by a step of size ``rate`` on the training
    row; TracIn sums it over checkpoints with their learning rates (Pruthi et al., NeurIPS 2020, equation 4). The
    gradients of the M test rows are held, and those of ``chunk`` training rows for one parameter at a time.
    """
    held = flatten(per_example_gradients(params, state, test_batch, cfg, key=key, chunk=chunk))
    pieces = []
    for part in chunks(train_batch, chunk):
        total = next(iter(held.values())).new_zeros(row_count(part), row_count(test_batch))

        def sink(path: str, row: RowGradient, total: Tensor = total) -> None:
            total += row.full().flatten(1) @ held[path].flatten(1).t()

        backward_rows(params, state, part, cfg, key, False, sink)
        pieces.append(total * rate)
    return torch.cat(pieces)


def by_module(squared: Mapping[str, Tensor], depth: int = 3) -> dict[str, Tensor]:
    """Sums of squared norms over the first ``depth`` names of the paths: ``[B]`` each, as ``encoder.layers.0``."""
    found: dict[str, Tensor] = {}
    for path, value in squared.items():
        name = ".".join(path.split(".")[:depth])
        found[name] = found[name] + value if name in found else value
    return found


def layer_cosines(gradients: Sequence[Params]) -> Tensor:
    """Cosines between the gradients of layers of one shape: L trees of equal structure -> ``[L, L]``."""
    flat = torch.stack([torch.cat([leaf.reshape(-1) for leaf in flatten(tree).values()]) for tree in gradients])
    return cosines(flat @ flat.t())

"""Curvature of the loss: products with Hessian, Gauss-Newton and Fisher matrix, eigenvalues, spectral density.

All of the mean loss per masked token in nats, in evaluation mode (no dropout, running statistics): a function of the
parameters alone, and a sum over rows, so that it is computed in chunks. No matrix is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.func import grad, jvp, vjp

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import fill, flatten, tree_map
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.model import Batch, forward, loss_sum

from .by_row.row_gradients import RowGradient
from .by_row.rows import BY_ROW, chunks, counted_tokens, plain, row_count, row_losses
from .by_row.taps import backward_by_row
from .trees import add_scaled, from_vector, norm, scaled, to_vector

Product = Callable[[Tensor], Tensor]
"""A product of a symmetric matrix with a vector, ``[P] -> [P]``."""


def mean_loss(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key, chunk: int | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mean loss in nats and number of masked tokens x codebooks, both ``[]``, from chunks of rows."""
    sums = [row_losses(params, state, part, cfg, key=key) for part in chunks(batch, chunk)]
    count = torch.cat([tokens for _, tokens in sums]).sum()
    return torch.cat([values for values, _ in sums]).sum() / count.clamp(min=1), count


def gradient(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key, chunk: int | None = None
) -> Params:  # fmt: skip
    """Gradient of the mean loss, a tree like ``params``."""
    return _over_chunks(lambda f: grad(f)(params), params, state, batch, cfg, key, chunk)


def hessian_vector(
    params: Params, state: State, batch: Batch, cfg: Config, vector: Params, *, key: Key, chunk: int | None = None
) -> Params:  # fmt: skip
    """``H v`` for the Hessian H of the mean loss: forward mode over reverse mode (Pearlmutter 1994)."""
    return _over_chunks(lambda f: jvp(grad(f), (params,), (vector,))[1], params, state, batch, cfg, key, chunk)


def _over_chunks(
    transform: Callable[[Callable[[Params], Tensor]], Params], params: Params, state: State, batch: Batch, cfg: Config,
    key: Key, chunk: int | None,
) -> Params:  # fmt: skip
    """The sum over chunks of a linear transform of the loss sum, divided by the number of tokens."""
    cfg = plain(cfg)
    total, count = tree_map(torch.zeros_like, params), 0
    for part in chunks(batch, chunk):

        def summed(p: Params, part: Batch = part) -> Tensor:
            return loss_sum(p, state, part, cfg, key=key, train=False)[0]

        total = tree_map(torch.add, total, transform(summed))
        with torch.no_grad():
            count += int(row_losses(params, state, part, cfg, key=key)[1].sum())
    return scaled(total, 1.0 / max(count, 1))


def gauss_newton_vector(
    params: Params, state: State, batch: Batch, cfg: Config, vector: Params, *, key: Key, chunk: int | None = None
) -> Params:  # fmt: skip
    """``G v`` with ``G = mean_t J_t^T (diag(p_t) - p_t p_t^T) J_t``, J the Jacobian of the logits (Schraudolph 2002).

    For the softmax this is the Fisher matrix of the model's predictions; it has no negative eigenvalue.
    """
    cfg = plain(cfg)
    total, count = tree_map(torch.zeros_like, params), 0
    for part in chunks(batch, chunk):

        def scores(p: Params, part: Batch = part) -> tuple[Tensor, Tensor]:
            output, _ = forward(p, state, part, cfg, key=key, train=False)
            found = output.log_probs if output.log_probs.ndim == 4 else output.log_probs[..., None]
            counted = counted_tokens(
                output.masks[:, 0] > 0.5, output.encoded_len, found.shape[1], part.get("weight"), cfg
            )
            return found, counted

        pulled: Any = vjp(scores, params, has_aux=True)
        log_probs, pull, counted = pulled
        pushed: Any = jvp(lambda p: scores(p)[0], (params,), (vector,))
        along = pushed[1]
        # The log-softmax differs from the logits by a constant over the classes, which both sides cancel.
        p = log_probs.exp()
        weighted = p * (along - (p * along).sum(dim=2, keepdim=True))
        weighted = torch.where(counted[:, :, None, None], weighted, 0.0)
        total = tree_map(torch.add, total, pull(weighted)[0])
        count += int(counted.sum()) * log_probs.shape[3]
    return scaled(total, 1.0 / max(count, 1))


def as_product(params: Params, product: Callable[[Params], Params]) -> Product:
    """A product with trees as one with vectors ``[P]``: of ``lambda v: hessian_vector(..., v, ...)``, for example."""
    return lambda vector: to_vector(product(from_vector(vector, params)))


class Tridiagonal(NamedTuple):
    """The matrix that Lanczos makes: ``Q^T A Q``, with Q the orthonormal ``basis``."""

    diagonal: Tensor  # float64 [m]
    beside: Tensor  # float64 [m], the last element the norm of the residual
    basis: Tensor  # [m, P]


def lanczos(product: Product, start: Tensor, steps: int) -> Tridiagonal:
    """``steps`` of Lanczos from ``start [P]``, orthogonalised against all vectors before (Golub and Van Loan, 10.3).

    Holds ``steps`` vectors. Ends early where the space is exhausted. Raises ``ValueError`` for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"lanczos: steps is {steps}; want 1 or more.")
    vectors = [start / torch.linalg.vector_norm(start)]
    diagonal, beside = [], []
    for _ in range(min(steps, start.shape[0])):
        w = product(vectors[-1])
        diagonal.append(torch.sum(w * vectors[-1], dtype=torch.float64))
        for _ in range(2):  # twice is enough (Parlett, The symmetric eigenvalue problem, 6.9)
            basis = torch.stack(vectors)
            w = w - basis.t() @ (basis @ w)
        beside.append(torch.linalg.vector_norm(w, dtype=torch.float64))
        if float(beside[-1]) <= torch.finfo(w.dtype).eps * float(torch.stack(diagonal).abs().max()):
            break
        vectors.append(w / beside[-1].to(w.dtype))
    size = len(diagonal)
    return Tridiagonal(torch.stack(diagonal), torch.stack(beside), torch.stack(vectors[:size]))


def _eigen(tri: Tridiagonal) -> tuple[Tensor, Tensor]:
    """Ritz values ``[m]``, increasing, and their vectors in the basis, ``[m, m]``."""
    off = tri.beside[:-1]
    values, vectors = torch.linalg.eigh(torch.diag(tri.diagonal) + torch.diag(off, 1) + torch.diag(off, -1))
    return values, vectors


class Eigenvalues(NamedTuple):
    """The largest eigenvalues, and how far they may be from true ones."""

    values: Tensor  # float64 [n], decreasing
    bounds: Tensor  # float64 [n]: an eigenvalue lies this near
    vectors: Tensor  # [n, P]


def top_eigenvalues(product: Product, size: int, *, key: Key, steps: int = 20, count: int = 5) -> Eigenvalues:
    """The ``count`` largest eigenvalues of a symmetric ``[P, P]`` matrix, P = ``size``, by Lanczos from a drawn start.

    The largest of the Hessian is the *sharpness*. ``bounds`` are the norms of ``A x - lambda x``. Holds ``steps``
    vectors of P.
    """
    tri = lanczos(product, random.normal(key, (size,)), steps)
    values, vectors = _eigen(tri)
    order = torch.arange(len(values) - 1, max(len(values) - 1 - count, -1), -1)
    bounds = (tri.beside[-1] * vectors[-1]).abs()
    ritz = vectors[:, order].t().to(tri.basis.dtype) @ tri.basis
    return Eigenvalues(values[order], bounds[order], ritz)


class Spectrum(NamedTuple):
    """A spectral density as weighted points; the weights of each start add up to 1."""

    nodes: Tensor  # float64 [S, m], eigenvalues; unused places have weight 0
    weights: Tensor  # float64 [S, m]

    def density(self, grid: Tensor, width: float) -> Tensor:
        """The mean over starts, each point a Gaussian of standard deviation ``width``: ``[G] -> [G]``."""
        z = (grid[:, None, None] - self.nodes) / width
        bells = torch.exp(-0.5 * z.square()) / (width * (2 * torch.pi) ** 0.5)
        return (bells * self.weights).sum(dim=(1, 2)) / self.nodes.shape[0]


def spectral_density(product: Product, size: int, *, key: Key, steps: int = 20, starts: int = 4) -> Spectrum:
    """Stochastic Lanczos quadrature of a symmetric ``[P, P]`` matrix (Ghorbani et al., ICML 2019, algorithm 1).

    Each start's nodes are its Ritz values, the weights the squared first elements of their vectors: exact for
    ``v^T f(A) v`` with polynomials f up to degree 2 m - 1. Holds ``steps`` vectors of P = ``size``.
    """
    nodes, weights = torch.zeros(2, starts, steps, dtype=torch.float64).unbind(0)
    for index, one in enumerate(random.split(key, starts)):
        values, vectors = _eigen(lanczos(product, random.normal(one, (size,)), steps))
        nodes[index, : len(values)] = values.cpu()
        weights[index, : len(values)] = vectors[0].square().cpu()
    return Spectrum(nodes, weights)


def ascent_sharpness(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key, radius: float = 0.05, chunk: int | None = None
) -> Tensor:  # fmt: skip
    """``L(w + r g/|g|) - L(w)`` in nats, ``[]``: the rise by a step of length ``radius`` uphill.

    Foret et al., "Sharpness-aware minimization", ICLR 2021, equation 2.
    """
    uphill = gradient(params, state, batch, cfg, key=key, chunk=chunk)
    moved = add_scaled(params, uphill, radius / norm(uphill).clamp(min=1e-30))
    with torch.no_grad():
        before, after = (mean_loss(p, state, batch, cfg, key=key, chunk=chunk)[0] for p in (params, moved))
    return after - before


def fisher_diagonal(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key, labels: str = "model",
    chunk: int | None = None,
) -> Params:  # fmt: skip
    """Diagonal of the Fisher matrix per masked token, a tree like ``params``: ``sum_i g_i^2 / tokens`` over rows.

    ``labels="model"`` draws the targets from the model's predictions, which is unbiased for the Fisher matrix, as
    tokens are drawn independently; ``data`` takes the true ones, the *empirical* Fisher, a different matrix (Kunstner
    et al., NeurIPS 2019). Raises ``ValueError`` for another ``labels``.
    """
    if labels not in ("model", "data"):
        raise ValueError(f"fisher_diagonal: no labels are called {labels!r}; use model or data.")
    loss_key, label_key = (key, None) if labels == "data" else random.split(key, 2).unbind(0)
    total, count = dict(flatten(tree_map(torch.zeros_like, params))), 0
    for part in chunks(batch, chunk):
        parts = BY_ROW
        if label_key is not None:
            tokens = sample_tokens(params, state, part, cfg, loss_key, label_key)
            parts = BY_ROW._replace(quantize=lambda *_, tokens=tokens: tokens)

        def sink(path: str, row: RowGradient) -> None:
            total[path] = total[path] + row.full().square().sum(dim=0)

        def losses(leaves: Any, part: Batch = part, parts: Any = parts) -> Tensor:
            nonlocal count
            sums, tokens = row_losses(fill(params, leaves), state, part, cfg, key=loss_key, parts=parts)
            count += int(tokens.sum())
            return sums

        backward_by_row(losses, flatten(params), row_count(part), sink)
    return scaled(fill(params, total), 1.0 / max(count, 1))


@torch.no_grad()
def sample_tokens(params: Params, state: State, batch: Batch, cfg: Config, key: Key, label_key: Key) -> Tensor:
    """Tokens drawn from the model's predictions of every frame under the mask of ``key``: int64 ``[B, T, K]``.

    By adding Gumbel noise, of which each row of the batch draws its own from ``label_key``.
    """
    output, _ = forward(params, state, batch, cfg, key=key, train=False)
    scores = output.log_probs if output.log_probs.ndim == 4 else output.log_probs[..., None]
    uniform = random.uniform(random.fold_in(label_key, batch["row"]), scores.shape, torch.float64)
    return (scores - torch.log(-torch.log(uniform + 2.0**-25))).argmax(dim=2)

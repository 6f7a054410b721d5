"""Gradient noise scales: the batch size from which larger batches are hardly worth their cost (arXiv 1812.06162).

``B_simple = tr(S) / |G|^2`` takes every direction as equally curved; ``B_noise = tr(H S) / (G^T H G)`` weights noise
and gradient by the Hessian H. G is the true gradient, S the covariance of the gradient of one example.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.func import grad

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import tree_map
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.model import Batch

from .by_row.row_gradients import RowGradient
from .by_row.rows import check_independent, chunks, row_count, row_losses
from .curvature import Product, as_product, hessian_vector
from .gradients import backward_rows
from .trees import scaled, to_vector


class NoiseScale(NamedTuple):
    """Gradient noise scale (McCandlish et al., arXiv 1812.06162): a batch of about this size is worth its cost."""

    variance: float  # tr(S), S the covariance of the gradient of one example
    squared_norm: float  # |G|^2 of the true gradient
    simple: float  # examples: tr(S) / |G|^2, equation 2.9; nan if |G|^2 is not estimated above 0


def noise_scale_of_batches(small: float, big: float, small_size: int, big_size: int) -> NoiseScale:
    """From the expected squared gradient norms at two batch sizes (McCandlish et al., appendix A.1).

    ``|G|^2 = (B s_B - b s_b) / (B - b)`` and ``tr(S) = (s_b - s_B) / (1/b - 1/B)``, both unbiased, for squared norms
    ``small`` s_b and ``big`` s_B. Average both over many batches before dividing. Raises ``ValueError`` unless
    ``0 < small_size < big_size``.
    """
    if not 0 < small_size < big_size:
        raise ValueError(f"noise_scale_of_batches: sizes are {small_size} and {big_size}; want 0 < small < big.")
    squared = (big_size * big - small_size * small) / (big_size - small_size)
    variance = (small - big) / (1 / small_size - 1 / big_size)
    return NoiseScale(variance, squared, variance / squared if squared > 0 else float("nan"))


def noise_scale_of_examples(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key | None, train: bool = False,
    chunk: int | None = None,
) -> NoiseScale:  # fmt: skip
    """From the gradients of single rows, unbiased for ``tr(S)`` and ``|G|^2``; for a batch of ``B`` rows, 2 or more.

    ``tr(S) = (sum |g_i|^2 - B |g|^2) / (B - 1)`` and ``|G|^2 = |g|^2 - tr(S) / B``, with ``g`` the mean of the ``g_i``.
    A row's gradient counts as it does in training: the sum over its tokens, divided by the mean number of tokens of a
    row. Holds one gradient and the activations of ``chunk`` rows. Raises ``ValueError`` for a single row, if nothing is
    masked, and for batch norm with ``train=True``.
    """
    check_independent("noise_scale_of_examples", cfg, train)
    rows = row_count(batch)
    total: dict[str, Tensor] = {}
    squares, tokens = [], []

    def sink(path: str, row: RowGradient) -> None:
        full = row.full()
        total[path] = total[path] + full.sum(dim=0) if path in total else full.sum(dim=0)
        squares.append(full.square().sum(dtype=torch.float64))

    for part in chunks(batch, chunk):
        tokens.append(backward_rows(params, state, part, cfg, key, train, sink)[1].sum())
    count = float(torch.stack(tokens).sum())
    if rows < 2 or count == 0:
        raise ValueError(f"noise_scale_of_examples: {rows} rows, {count:g} masked tokens; want 2 rows with some.")
    scale = rows / count  # one over the mean number of tokens of a row
    mean_square = float(torch.stack(squares).sum()) / rows * scale**2
    whole = float(sum(leaf.square().sum(dtype=torch.float64) for leaf in total.values())) / count**2
    return noise_scale_of_batches(mean_square, whole, 1, rows)


class CurvedNoiseScale(NamedTuple):
    """Noise scale weighted by curvature (McCandlish et al., arXiv 1812.06162, equation 2.8)."""

    noise: float  # tr(H S)
    signal: float  # G^T H G
    batch: float  # examples: tr(H S) / (G^T H G), B_noise; nan unless both are estimated above 0


def curved_noise_scale(
    combined: Callable[[Tensor], Tensor], rows: int, product: Product, *, key: Key | None = None,
    probes: int | None = None,
) -> CurvedNoiseScale:  # fmt: skip
    """``tr(H S)`` and ``G^T H G`` from sums of the gradients of ``rows`` examples and products with H.

    ``combined`` gives ``sum_i w_i g_i``, ``[B] -> [P]``; ``product`` is ``H v``, ``[P] -> [P]``. With ``g`` the mean of
    the ``g_i``, ``tr(H S) = sum_i (g_i - g)^T H (g_i - g) / (B - 1)`` and ``G^T H G = g^T H g - tr(H S) / B``: unbiased
    for a given H. The sum over i takes B products, or ``probes`` with ``v = sum_i s_i (g_i - g)`` for signs ``s`` drawn
    from ``key [2]``, whose mean of ``v^T H v`` is that sum (Hutchinson 1990). Raises ``ValueError`` for a single row.
    """
    if rows < 2 or (probes is not None and (probes < 1 or key is None)):
        raise ValueError(
            f"curved_noise_scale: {rows} rows, {probes} probes; want 2 rows, and a key if there are probes."
        )
    mean = combined(torch.full((rows,), 1.0 / rows, dtype=torch.float64))
    if probes is None:
        weights, repeats = torch.eye(rows, dtype=torch.float64), 1
    else:
        drawn = random.uniform(key, (probes, rows), torch.float64) < 0.5  # type: ignore[arg-type]
        weights, repeats = torch.where(drawn, 1.0, -1.0).double().cpu(), probes
    total = 0.0
    for one in weights:
        v = combined(one) - float(one.sum()) * mean
        total += float(torch.sum(v * product(v), dtype=torch.float64))
    noise = total / repeats / (rows - 1)
    signal = float(torch.sum(mean * product(mean), dtype=torch.float64)) - noise / rows
    return CurvedNoiseScale(noise, signal, noise / signal if noise > 0 and signal > 0 else float("nan"))


def curved_noise_scale_of_examples(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key, probes: int | None = 8,
    chunk: int | None = None,
) -> CurvedNoiseScale:  # fmt: skip
    """``curved_noise_scale`` of a batch of ``B`` rows, in evaluation mode, with the Hessian of its own mean loss.

    A row's gradient counts as in ``noise_scale_of_examples``. Every probe costs a gradient and a product with the
    Hessian, about three gradients; ``probes=None`` takes every row by itself. That H comes of the same rows biases it
    by the order of 1 / B. ``key`` draws masks and signs. Raises ``ValueError`` for a single row, and if nothing is
    masked.
    """
    rows = row_count(batch)
    with torch.no_grad():
        counts = [row_losses(params, state, part, cfg, key=key)[1].sum() for part in chunks(batch, chunk)]
    count = float(torch.stack(counts).sum())
    if count == 0:
        raise ValueError("curved_noise_scale_of_examples: no token is masked; want some.")

    def combined(weights: Tensor) -> Tensor:
        total, place = tree_map(torch.zeros_like, params), 0
        for part in chunks(batch, chunk):
            used = weights[place : place + row_count(part)]
            place += row_count(part)

            def weighted(p: Params, part: Batch = part, used: Tensor = used) -> Tensor:
                sums = row_losses(p, state, part, cfg, key=key)[0]
                return (sums * used.to(sums)).sum()

            total = tree_map(torch.add, total, grad(weighted)(params))
        return to_vector(scaled(total, rows / count))

    def hessian(v: Params) -> Params:
        return hessian_vector(params, state, batch, cfg, v, key=key, chunk=chunk)

    signs = random.fold_in(key, 1)
    return curved_noise_scale(combined, rows, as_product(params, hessian), key=signs, probes=probes)

"""What the layers hold: linear CKA within and across models, effective rank, isotropy, correlation with log-mel.

All take frames as rows, ``[n, D]``. ``layer_frames`` makes them: the valid frames of a batch, without padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nest_fn.config import Config
from nest_fn.frontend import log_mel
from nest_fn.hidden_states import features
from nest_fn.layers import random
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.types import Key, Params, State, Tensor


@torch.no_grad()
def layer_frames(
    params: Params, state: State, audio: Tensor, lengths: Tensor, cfg: Config, layers: Sequence[int] | None = None
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Outputs of the blocks ``layers`` (None: all) for ``audio [B, N]``, each ``[n, D]``, and the frame's row ``[n]``.

    In evaluation mode, unmasked. All have the same frames in the same order: those that are not padding.
    """
    made, frames = features(params, state, audio, lengths, cfg, layers)
    valid = valid_mask(frames, made[0].shape[1])
    return [x[valid] for x in made], valid.nonzero()[:, 0]


@torch.no_grad()
def mel_frames(audio: Tensor, lengths: Tensor, frames: Tensor, width: int, cfg: Config) -> Tensor:
    """Log-mel of the same frames: ``[n, s M]``, the s feature frames under each encoder frame side by side.

    ``frames [B]`` are the lengths in encoder frames, ``width`` their axis T; what is missing at the end counts as 0.
    """
    mel, _ = log_mel(audio, lengths, cfg.preprocessor)
    factor = max(cfg.encoder.subsampling_factor, 1)
    mel = F.pad(mel, (0, max(0, width * factor - mel.shape[2])))[:, :, : width * factor]
    stacked = mel.transpose(1, 2).unflatten(1, (width, factor)).flatten(2)
    return stacked[valid_mask(frames, width)]


def minibatches(frames: Sequence[Tensor], size: int, key: Key) -> Iterator[list[Tensor]]:
    """Frames ``[n, D]`` of several layers in minibatches of ``size`` frames, in one drawn order; a rest is left out."""
    order = random.permutation(key, frames[0].shape[0]).to(frames[0].device)
    for start in range(0, len(order) - size + 1, size):
        yield [x[order[start : start + size]] for x in frames]


def unbiased_hsic(k: Tensor, other: Tensor) -> Tensor:
    """Unbiased Hilbert-Schmidt independence criterion of two kernel matrices, ``[..., n, n] -> [...]``, n > 3.

    ``[tr(K L) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)] / (n (n-3))`` with the diagonals of K and L set to 0 (Song
    et al., JMLR 2012, equation 5). Raises ``ValueError`` for fewer than 4 frames.
    """
    n = k.shape[-1]
    if n < 4:
        raise ValueError(f"unbiased_hsic: {n} frames; want 4 or more.")
    off = 1.0 - torch.eye(n, dtype=k.dtype, device=k.device)
    k, other = k * off, other * off
    trace = (k * other).sum(dim=(-2, -1))
    sums = k.sum(dim=-1), other.sum(dim=-1)
    product = sums[0].sum(dim=-1) * sums[1].sum(dim=-1) / ((n - 1) * (n - 2))
    cross = (sums[0] * sums[1]).sum(dim=-1) * 2 / (n - 2)
    return (trace + product - cross) / (n * (n - 3))


def minibatch_cka(pairs: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
    """Linear CKA of all layers of one model with all of another: float64 ``[L, M]``, at most about 1.

    ``pairs`` are minibatches of the same frames of both models: layers ``[n, D]``. ``mean HSIC(K, L) / sqrt(mean
    HSIC(K, K) mean HSIC(L, L))`` over minibatches, with the unbiased HSIC, so that it does not depend on their size
    (Nguyen, Raghu and Kornblith, ICLR 2021, equation 4). Holds the kernels of one minibatch. Raises ``ValueError``
    without a minibatch.
    """
    total: list[Tensor] = []
    for xs, ys in pairs:
        k, m = (torch.stack([x.double() @ x.double().t() for x in side]) for side in (xs, ys))
        found = [
            torch.stack([unbiased_hsic(one, m) for one in k]), unbiased_hsic(k, k), unbiased_hsic(m, m)
        ]  # fmt: skip
        total = found if not total else [a + b for a, b in zip(total, found, strict=True)]
    if not total:
        raise ValueError("minibatch_cka: there is no minibatch; take smaller ones, or more audio.")
    cross, first, second = total
    return cross / (first[:, None] * second[None, :]).clamp(min=1e-300).sqrt()


def rank_me(x: Tensor) -> Tensor:
    """Effective rank of frames ``[n, D]``, a scalar ``[]`` from 1 to D: the exponential of the entropy of the singular
    values, as fractions of their sum (RankMe, Garrido et al., ICML 2023, equation 1).
    """
    values = torch.linalg.svdvals(x.double())
    p = values / values.sum().clamp(min=1e-300) + torch.finfo(torch.float32).eps
    return torch.exp(-(p * p.log()).sum())


class Isotropy(NamedTuple):
    """How evenly frames spread over directions."""

    mean_cosine: float  # of two different frames; 0 if directions are even (Ethayarajh, EMNLP 2019)
    partition: float  # from 0 to 1, 1 if even: min Z(c) / max Z(c) over eigenvectors c (Mu and Viswanath, ICLR 2018)


def isotropy(x: Tensor) -> Isotropy:
    """Isotropy of frames ``[n, D]``, 2 or more.

    The mean cosine is ``(|sum u|^2 - n) / (n (n - 1))`` with u the frames of length 1; ``Z(c) = sum exp(c . x)`` is
    over frames scaled to a mean square length of 1, so that the unit of the features does not count. Raises
    ``ValueError`` for fewer.
    """
    n = x.shape[0]
    if n < 2:
        raise ValueError(f"isotropy: {n} frames; want 2 or more.")
    x = x.double()
    direction = F.normalize(x, dim=1)
    cosine = (direction.sum(dim=0).square().sum() - n) / (n * (n - 1))
    x = x / x.square().sum(dim=1).mean().clamp(min=1e-300).sqrt()
    _, vectors = torch.linalg.eigh(x.t() @ x)
    z = torch.logsumexp(torch.cat((x @ vectors, -(x @ vectors)), dim=1), dim=0)
    return Isotropy(float(cosine), float(torch.exp(z.min() - z.max())))


class Moments(NamedTuple):
    """Sums over frames ``z = (x, y)`` side by side, from which covariances follow; additive over batches."""

    frames: int
    total: Tensor  # float64 [p + q]
    outer: Tensor  # float64 [p + q, p + q]
    first: int  # p, the width of x

    def add(self, other: Moments) -> Moments:
        """The sums of both."""
        return Moments(self.frames + other.frames, self.total + other.total, self.outer + other.outer, self.first)


def moments(x: Tensor, y: Tensor) -> Moments:
    """Sums over frames of ``x [n, p]`` and ``y [n, q]``."""
    z = torch.cat((x.double(), y.double()), dim=1)
    return Moments(z.shape[0], z.sum(dim=0), z.t() @ z, x.shape[1])


class Correlations(NamedTuple):
    """Canonical correlations of two sets of features."""

    values: Tensor  # float64 [min(p, q)], decreasing
    mean: float
    weighted: float  # mean weighted by how much of x each direction accounts for (PWCCA, Morcos et al., NeurIPS 2018)


def canonical_correlations(sums: Moments, ridge: float = 1e-6) -> Correlations:
    """Canonical correlation analysis from ``moments`` (Hotelling 1936); ``ridge``, times the mean variance, is added.

    The singular values of ``Cxx^-1/2 Cxy Cyy^-1/2``, float64 ``[min(p, q)]``. For speech models against log-mel: Pasad
    et al., ASRU 2021. Raises ``ValueError`` for fewer than 2 frames.
    """
    if sums.frames < 2:
        raise ValueError(f"canonical_correlations: {sums.frames} frames; want 2 or more, best many times the width.")
    mean = sums.total / sums.frames
    covariance = (sums.outer / sums.frames - mean[:, None] * mean[None, :]) * (sums.frames / (sums.frames - 1))
    p = sums.first
    cxx, cyy, cxy = covariance[:p, :p], covariance[p:, p:], covariance[:p, p:]
    left, right = _inverse_root(cxx, ridge), _inverse_root(cyy, ridge)
    u, values, _ = torch.linalg.svd(left @ cxy @ right, full_matrices=False)
    values = values.clamp(max=1.0)
    weights = (u.t() @ left @ cxx).abs().sum(dim=1)
    return Correlations(values, float(values.mean()), float((weights * values).sum() / weights.sum().clamp(min=1e-300)))


def _inverse_root(matrix: Tensor, ridge: float) -> Tensor:
    """``(C + r I)^-1/2`` of a covariance, r relative to its mean variance."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = ridge * float(matrix.diagonal().mean().clamp(min=1e-300))
    return vectors @ torch.diag((values.clamp(min=0) + floor).rsqrt()) @ vectors.t()

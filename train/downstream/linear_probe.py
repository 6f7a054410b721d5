"""Linear probes: the accuracy of a linear classifier on frozen features, for speakers that it was not trained on.

Multinomial logistic regression on standardised features, fitted by L-BFGS: the problem is convex, so the result needs
no seed and no schedule. The penalty is chosen on held-out *training* speakers; statistics and weights are then computed
from all training speakers. Test speakers are used for the final accuracy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import torch
from torch.nn import functional as F

from nest_fn.layers.types import Tensor

from .minimise import minimise

PENALTIES = (0.03, 0.01, 0.003, 0.001)
"""Candidate L2 penalties, strongest first: half of one times the squared norm is added to the mean cross-entropy."""

UNKNOWN = -1
"""The label of a frame that no phone covers; leave such frames out when fitting."""

_FLAT = 1e-5  # a feature with a standard deviation below this counts as constant and is not scaled up


class ProbeParams(TypedDict):
    """A fitted probe: ``logits = ((x - mean) / scale) @ weight.T + bias``."""

    mean: Tensor  # [D]
    scale: Tensor  # [D]
    weight: Tensor  # [C, D]
    bias: Tensor  # [C]


def frame_labels(
    phones: Sequence[tuple[str, float, float]],
    frames: int,
    names: Sequence[str],
    seconds_per_frame: float = 0.08,
) -> Tensor:
    """The phone that covers most of each frame, as its index in ``names``: int64 ``[frames]``.

    Phones are (name, start s, end s); frame ``t`` is ``[t, t + 1) * seconds_per_frame``. Parts of one phone add up; on
    a tie the first of ``names`` wins; a frame that nothing covers gets ``UNKNOWN``. Raises ``ValueError`` for a phone
    that is not in ``names``.
    """
    place = {name: i for i, name in enumerate(names)}
    unknown = sorted({name for name, _, _ in phones} - place.keys())
    if unknown:
        raise ValueError(f"frame_labels: phones {unknown} are not among the {len(names)} names of the classes")
    cover = torch.zeros(frames, len(names), dtype=torch.float64)
    if not phones or not frames:
        return torch.full((frames,), UNKNOWN)
    start = torch.tensor([a for _, a, _ in phones], dtype=torch.float64)
    end = torch.tensor([b for _, _, b in phones], dtype=torch.float64)
    left = torch.arange(frames, dtype=torch.float64)[:, None] * seconds_per_frame
    shared = (torch.minimum(end, left + seconds_per_frame) - torch.maximum(start, left)).clamp(min=0)
    cover.index_add_(1, torch.tensor([place[name] for name, _, _ in phones]), shared)
    # Rounded, so that ties do not depend on the last bits of the sums.
    longest, label = cover.mul(1e6).round().max(dim=1)
    return torch.where(longest > 0, label, UNKNOWN)


def stack_frames(features: Tensor, factor: int = 8) -> Tensor:
    """Concatenate ``factor`` frames, as the quantizer does: ``[B, M, F] -> [B, F // factor, factor * M]``."""
    batch, bins, frames = features.shape
    kept = frames // factor * factor
    return features[:, :, :kept].transpose(1, 2).reshape(batch, kept // factor, factor * bins)


def mean_pool(x: Tensor, lengths: Tensor) -> Tensor:
    """The mean over valid frames, for labels of whole utterances: ``[B, T, D], [B] -> [B, D]``."""
    valid = (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).unsqueeze(-1)
    return torch.where(valid, x, 0.0).sum(1) / lengths.clamp(min=1)[:, None].to(x.dtype)


def logits(params: ProbeParams, x: Tensor) -> Tensor:
    """Scores of the classes: ``[N, D] -> [N, C]``."""
    return F.linear((x - params["mean"]) / params["scale"], params["weight"], params["bias"])


def accuracy(params: ProbeParams, x: Tensor, y: Tensor) -> float:
    """Fraction of rows whose best class is the label: x ``[N, D]``, y int64 ``[N]``."""
    return float((logits(params, x).argmax(1) == y).double().mean())


def _standards(x: Tensor) -> tuple[Tensor, Tensor]:
    deviation = x.std(0, correction=0)
    return x.mean(0), torch.where(deviation > _FLAT, deviation, torch.ones_like(deviation))


def _fit(x: Tensor, y: Tensor, classes: int, penalty: float, start: Tensor | None, iterations: int) -> Tensor:
    """Weights and bias ``[C, D + 1]`` for standardised x ``[N, D]``; the bias is not penalised."""

    def objective(point: Tensor) -> Tensor:
        scores = F.linear(x, point[:, :-1], point[:, -1])
        return F.cross_entropy(scores, y) + 0.5 * penalty * point[:, :-1].square().sum()

    return minimise(objective, x.new_zeros(classes, x.shape[1] + 1) if start is None else start, iterations)


def _params(mean: Tensor, scale: Tensor, point: Tensor) -> ProbeParams:
    return {"mean": mean, "scale": scale, "weight": point[:, :-1].clone(), "bias": point[:, -1].clone()}


class Choice(NamedTuple):
    """The layer and penalty chosen on the held-out training speakers."""

    layer: int  # index among the candidates
    penalty: float
    accuracy: float  # on the held-out speakers, of a probe fitted without them


def choose(
    candidates: Sequence[Tensor],
    y: Tensor,
    classes: int,
    groups: Tensor,
    penalties: Sequence[float] = PENALTIES,
    iterations: int = 60,
) -> Choice:
    """The layer and penalty with the best accuracy on a quarter of the groups (speakers), fitted on the others.

    candidates ``[N, D]`` each (for example the layers of an encoder), y int64 ``[N]``, groups int64 ``[N]``. Every
    fourth group in increasing order is held out; of equal accuracies the first layer and the larger penalty win.
    Raises ``ValueError`` with fewer than two groups.
    """
    speakers = torch.unique(groups)
    if len(speakers) < 2:
        raise ValueError(f"probe: {len(speakers)} group of rows leaves none to choose on; want 2 or more")
    held = torch.isin(groups, speakers[1::4])
    best = Choice(0, max(penalties), -1.0)
    for layer, x in enumerate(candidates):
        mean, scale = _standards(x[~held])
        known, point = (x[~held] - mean) / scale, None
        for penalty in sorted(penalties, reverse=True):  # each fit starts from the solution for the larger penalty
            point = _fit(known, y[~held], classes, penalty, point, iterations)
            score = accuracy(_params(mean, scale, point), x[held], y[held])
            best = Choice(layer, penalty, score) if score > best.accuracy else best
    return best


def fit_linear_probe(
    x: Tensor,
    y: Tensor,
    classes: int,
    *,
    groups: Tensor | None = None,
    penalty: float | None = None,
    iterations: int = 150,
) -> ProbeParams:
    """Fit on the training rows: x ``[N, D]`` float, y int64 ``[N]`` in ``[0, classes)``, groups int64 ``[N]`` speakers.

    Without ``penalty`` it is chosen over ``groups`` (``choose``). Raises ``ValueError`` on wrong shapes, on labels out
    of range, and if neither is given.
    """
    if x.ndim != 2 or y.shape != x.shape[:1] or (groups is not None and groups.shape != y.shape):
        shapes = [list(x.shape), list(y.shape), None if groups is None else list(groups.shape)]
        raise ValueError(f"fit_linear_probe: want x [N, D], y [N], groups [N] or None; got {shapes}")
    if y.numel() == 0 or int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"fit_linear_probe: want one or more labels in [0, {classes}); leave out unlabelled rows")
    if penalty is None:
        if groups is None:
            raise ValueError("fit_linear_probe: give groups= (the speaker of each row), or penalty=")
        penalty = choose([x], y, classes, groups).penalty
    mean, scale = _standards(x)
    point = _fit((x - mean) / scale, y, classes, penalty, None, iterations)
    return _params(mean, scale, point)

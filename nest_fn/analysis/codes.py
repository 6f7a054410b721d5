"""The codes: their use and its drift, what they have to do with phones, and where the model predicts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nest_fn.config import Config
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.losses import score_tokens
from nest_fn.model import Batch, forward


class Predictions(NamedTuple):
    """Targets and predictions of a batch under one mask."""

    targets: Tensor  # int64 [B, T, K]
    predicted: Tensor  # int64 [B, T, K]
    losses: Tensor  # [B, T, K], nats
    masked: Tensor  # bool [B, T], tokens that enter the loss
    valid: Tensor  # bool [B, T], not padding


@torch.no_grad()
def predictions(params: Params, state: State, batch: Batch, cfg: Config, *, key: Key) -> Predictions:
    """Targets and most probable tokens in evaluation mode under the mask that ``key [2]`` draws: ``[B, T, K]`` each."""
    output, _ = forward(params, state, batch, cfg, key=key, train=False)
    found = score_tokens(*output, cfg.loss, batch.get("weight"))
    best = output.log_probs.argmax(dim=2)
    return Predictions(
        found.tokens, best if best.ndim == 3 else best[..., None], found.losses, found.masked, found.valid
    )


class Usage(NamedTuple):
    """How the codes of each book are used."""

    perplexity: Tensor  # float64 [K], exp of the entropy: from 1 to C
    used: Tensor  # float64 [K], fraction of codes that occur
    largest: Tensor  # float64 [K], fraction of the most frequent code


def usage(counts: Tensor) -> Usage:
    """Use of codes from their counts ``[K, C]``, as ``losses.token_histogram`` makes them."""
    p = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return Usage(torch.special.entr(p).sum(dim=1).exp(), (counts > 0).double().mean(dim=1), p.amax(dim=1))


def drift(counts: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats from one time's use of codes to the next one's: ``[S, K, C] -> [S-1, K]``.

    Between 0 and log 2 (Lin 1991). For the predictions of checkpoints; the targets of a frozen quantizer do not drift.
    """
    p = counts.double() / counts.sum(dim=2, keepdim=True).clamp(min=1)
    middle = (p[1:] + p[:-1]) / 2
    entropy = torch.special.entr(p).sum(dim=2)
    return (torch.special.entr(middle).sum(dim=2) - (entropy[1:] + entropy[:-1]) / 2).clamp(min=0)


def contingency(labels: Tensor, codes: Tensor, classes: int, size: int) -> Tensor:
    """How often each label meets each code: int64 ``[n], [n] -> [classes, size]``; labels below 0 are left out."""
    known = labels >= 0
    pairs = labels[known] * size + codes[known]
    return torch.bincount(pairs, minlength=classes * size).reshape(classes, size)


class Purity(NamedTuple):
    """What codes and frame labels say of each other (HuBERT, Hsu et al. 2021, section IV-C)."""

    phone: float  # accuracy if each code names its most frequent label
    cluster: float  # accuracy if each label names its most frequent code
    pnmi: float  # I(label; code) / H(label): the fraction of the label's uncertainty that the code removes


def purity(table: Tensor) -> Purity:
    """Purity of codes from ``contingency [L, C]``. Raises ``ValueError`` if the table is empty."""
    if int(table.sum()) == 0:
        raise ValueError("purity: no frame has a label.")
    p = table.double() / table.sum()
    of_label, of_code = p.sum(dim=1), p.sum(dim=0)
    entropies = [float(torch.special.entr(x).sum()) for x in (of_label, of_code, p)]
    shared = entropies[0] + entropies[1] - entropies[2]
    known = shared / entropies[0] if entropies[0] > 0 else 1.0
    return Purity(float(p.amax(dim=0).sum()), float(p.amax(dim=1).sum()), known)


def confusions(targets: Tensor, predicted: Tensor, most: int = 20) -> list[tuple[int, int, int]]:
    """The most frequent wrong predictions, in this order: int64 ``[n], [n]`` -> (target, predicted, count)."""
    wrong = targets != predicted
    pairs, counts = torch.unique(torch.stack((targets[wrong], predicted[wrong])), dim=1, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:most]
    rows = zip(pairs[0, order].tolist(), pairs[1, order].tolist(), counts[order].tolist(), strict=True)
    return list(rows)


class Blocks(NamedTuple):
    """Where each masked token stands in its block; 0 elsewhere."""

    position: Tensor  # int64 [B, T], 0 for the first token of a block
    length: Tensor  # int64 [B, T], tokens of the block
    distance: Tensor  # int64 [B, T], tokens to the nearest one that is seen; 1 at the rim


def masked_blocks(masked: Tensor) -> Blocks:
    """Places of masked tokens in their runs: bool ``[B, T]`` -> ``Blocks`` of ``[B, T]``.

    The ends of a row count as seen.
    """
    time = torch.arange(1, masked.shape[1] + 1, device=masked.device).expand(masked.shape)
    before = torch.where(masked, 0, time).cummax(dim=1).values  # the last seen token, numbered from 1; 0: none
    turned = torch.where(masked.flip(1), 0, time)
    after = masked.shape[1] + 1 - turned.cummax(dim=1).values.flip(1)
    position, length = time - before - 1, after - before - 1
    distance = torch.minimum(time - before, after - time)
    zero = torch.zeros_like(time)
    return Blocks(*(torch.where(masked, x, zero) for x in (position, length, distance)))


class Binned(NamedTuple):
    """Accuracy and loss by bins of another quantity."""

    edges: tuple[float, ...]  # E of them: bin i holds values from edges[i] to below edges[i + 1]
    tokens: Tensor  # int64 [E - 1], how many
    accuracy: Tensor  # float64 [E - 1], nan for an empty bin
    loss: Tensor  # float64 [E - 1], nats, nan for an empty bin


def by_bins(values: Tensor, correct: Tensor, losses: Tensor, edges: Sequence[float]) -> Binned:
    """Accuracy and mean loss by bins of ``values``, all ``[n]``: positions in a block, SNR in dB, seconds.

    Values outside the edges are left out. Raises ``ValueError`` for edges that do not increase.
    """
    bounds = torch.tensor([float(edge) for edge in edges], dtype=torch.float64)
    if len(bounds) < 2 or not bool((bounds.diff() > 0).all()):
        raise ValueError(f"by_bins: edges are {list(edges)}; want 2 or more that increase.")
    place = torch.bucketize(values.double().cpu(), bounds, right=True) - 1
    inside = (place >= 0) & (place < len(bounds) - 1)
    place, size = place[inside], len(bounds) - 1
    count = torch.bincount(place, minlength=size)
    sums = [
        torch.zeros(size, dtype=torch.float64).index_add(0, place, x.double().cpu()[inside]) for x in (correct, losses)
    ]
    return Binned(tuple(map(float, edges)), count, *(x / count for x in sums))

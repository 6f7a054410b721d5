"""What the loss owes to chance: to masks, to dropout, to noise, to the parameters' seed; and ensembles of models.

Many models are one *stack*: a tree whose leaves have an axis of models in front, over which ``vmap`` runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch.func import vmap

from nest_fn.config import Config
from nest_fn.frontend import log_mel
from nest_fn.layers.tree import tree_map
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.model import Batch, forward, loss_sum
from nest_fn.parts import EAGER, Keys, draw_keys

from .by_row.rows import name_rows, plain

FACTORS = ("parameters", "noise", "mask", "dropout")


def stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one tree, with an axis of trees in front of every leaf: ``[...] -> [P, ...]``."""
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


@torch.no_grad()
def loss_grid(
    params: Params, state: State, batches: Batch, cfg: Config, *, masks: Key, dropouts: Key, train: bool = True,
    chunk: int = 4,
) -> Tensor:  # fmt: skip
    """The mean loss in nats for all models, noises, masks and dropouts together: ``[P, S, M, D]``.

    ``params`` and ``state`` are stacks of P models; ``batches`` has an axis of S noises in front of every tensor, as
    ``audio [S, B, N]``; ``masks`` are keys ``[M, 2]``, ``dropouts`` keys ``[D, 2]``. Features are computed once for
    each noise, without dither; ``vmap`` runs over the others, with P M ``chunk`` copies of the activations in memory.
    """
    cfg = plain(cfg)

    def one(p: Params, s: State, batch: Batch, mask: Key, dropout: Key) -> Tensor:
        parts = EAGER._replace(keys=lambda _, rows: _two_keys(mask, dropout, rows))
        total, (metrics, _) = loss_sum(p, s, batch, cfg, key=mask, train=train, parts=parts)
        return total / metrics["masked_tokens"].clamp(min=1)

    by_dropout = vmap(one, in_dims=(None, None, None, None, 0), chunk_size=chunk)
    by_mask = vmap(by_dropout, in_dims=(None, None, None, 0, None))
    by_model = vmap(by_mask, in_dims=(0, 0, None, None, None))
    count = next(iter(batches.values())).shape[0]
    noises = [with_features({name: leaf[index] for name, leaf in batches.items()}, cfg) for index in range(count)]
    return torch.stack([by_model(params, state, batch, masks, dropouts) for batch in noises], dim=1)


def with_features(batch: Batch, cfg: Config) -> dict[str, Tensor]:
    """The batch with log-mel features ``[B, M, F]`` in place of its signals ``[B, N]``, without dither, rows named."""
    found = name_rows(batch)
    for name in ("audio", "noisy_audio"):
        if name in found:
            mel, frames = log_mel(found.pop(name), found.pop(f"{name}_len"), cfg.preprocessor)
            stem = name.removesuffix("audio")
            found |= {f"{stem}features": mel, f"{stem}features_len": frames}
    return found


def _two_keys(mask: Key, dropout: Key, rows: Tensor) -> Keys:
    """The keys of a forward pass whose dropout is drawn from another key than its mask and dither."""
    return draw_keys(mask, rows)._replace(dropout=draw_keys(dropout, rows).dropout)


class Variance(NamedTuple):
    """The variance of a loss by its causes, in squared nats."""

    components: dict[str, float]  # of each factor alone; with it, one may be slightly below 0
    rest: float  # of all factors together: interactions
    mean: float  # nats


def variance_components(values: Tensor, names: Sequence[str] = FACTORS) -> Variance:
    """Variance components of a full crossed design with one value in each cell, ``[P, S, M, D]`` or any other axes.

    Analysis of variance with random factors: of factor i with ``n_i`` levels of ``N`` cells the mean square is
    ``MS_i = N / n_i * sum (mean_i - mean)^2 / (n_i - 1)``, and its component ``(MS_i - MS_rest) n_i / N`` (Searle,
    Casella and McCulloch, Variance components, chapter 4). Unbiased where factors do not interact. A factor of one
    level has no component. Raises ``ValueError`` if the names do not fit the axes.
    """
    if values.ndim != len(names):
        raise ValueError(f"variance_components: {values.ndim} axes, {len(names)} names; give one name an axis.")
    values = values.double()
    size, mean = prod(values.shape), values.mean()
    squares, freedom = {}, {}
    for axis, name in enumerate(names):
        levels = values.mean(dim=[other for other in range(values.ndim) if other != axis])
        squares[name] = float((levels - mean).square().sum()) * size / len(levels)
        freedom[name] = len(levels) - 1
    left = size - 1 - sum(freedom.values())
    rest = (float((values - mean).square().sum()) - sum(squares.values())) / left if left > 0 else 0.0
    components = {
        name: (squares[name] / freedom[name] - rest) * (freedom[name] + 1) / size for name in names if freedom[name] > 0
    }
    return Variance(components, rest, float(mean))


class Ensemble(NamedTuple):
    """Predictions of many models together."""

    log_probs: Tensor  # [B, T, C, K], nats, of the mean probability
    disagreement: Tensor  # [B, T, K], nats: entropy of the mean less the mean entropy
    encoded_len: Tensor  # [B]


@torch.no_grad()
def ensemble(
    params: Params, state: State, batch: Batch, cfg: Config, *, key: Key | None = None, chunk: int | None = None
) -> Ensemble:  # fmt: skip
    """Mean of the predicted probabilities of P models, stacked in ``params`` and ``state``, and how they disagree.

    The disagreement is the mutual information of token and model (Lakshminarayanan et al., NeurIPS 2017; Gal et al.,
    ICML 2017), ``[B, T, K]``. Unmasked without ``key``. ``chunk`` models are computed at once.
    """
    cfg, batch = plain(cfg), name_rows(batch)

    def one(p: Params, s: State) -> tuple[Tensor, Tensor]:
        output, _ = forward(p, s, batch, cfg, key=key, apply_mask=key is not None)
        scores = output.log_probs if output.log_probs.ndim == 4 else output.log_probs[..., None]
        return scores, output.encoded_len

    scores, lengths = vmap(one, chunk_size=chunk)(params, state)
    together = torch.logsumexp(scores, dim=0) - torch.log(torch.tensor(float(scores.shape[0])))
    alone = entropy(scores, dim=3).mean(dim=0)
    return Ensemble(together, entropy(together, dim=2) - alone, lengths[0])


def entropy(log_probs: Tensor, dim: int) -> Tensor:
    """Entropy in nats over the axis ``dim``: ``[..., C, ...] -> [..., ...]``."""
    return -(log_probs.exp() * log_probs).sum(dim=dim)

"""The loss between checkpoints: along a line, on a plane, with batch statistics computed anew at every point."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from nest_fn.config import Config
from nest_fn.layers.norm import MOMENTUM
from nest_fn.layers.tree import fill, flatten, tree_map
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.model import Batch, loss_sum

from .curvature import mean_loss
from .trees import add_scaled, dot, norm, scaled

_MEAN, _VARIANCE = ".running_mean", ".running_var"
_QUIET = (
    "encoder.dropout=0", "encoder.dropout_att=0", "encoder.dropout_pre_encoder=0", "encoder.dropout_emb=0",
    "encoder.stochastic_depth_drop_prob=0", "preprocessor.dither=0", "preprocessor.nb_augmentation_prob=0",
)  # fmt: skip


def interpolate(a: Any, b: Any, t: float) -> Any:
    """``(1 - t) a + t b`` of two trees, leaf by leaf; whole numbers are those of ``a``."""
    return tree_map(lambda x, y: torch.lerp(x, y, t) if x.is_floating_point() else x, a, b)


@torch.no_grad()
def recompute_statistics(
    params: Params, state: State, batches: Iterable[Batch], cfg: Config, *, key: Key
) -> State:  # fmt: skip
    """The state with running statistics of batch norm that are the mean over ``batches``, without dropout.

    Between two models the running statistics of neither hold (Izmailov et al., UAI 2018, section 3.2). Every batch is
    seen in training mode, so that a layer's statistics follow from those of the batch below. The state as it is, if the
    model has no batch norm.
    """
    cfg = cfg.override(*_QUIET)
    names = [path for path in flatten(state) if path.endswith((_MEAN, _VARIANCE))]
    if not names:
        return state
    before, total, count = flatten(state), {name: torch.zeros_like(flatten(state)[name]) for name in names}, 0
    for batch in batches:
        _, (_, new) = loss_sum(params, state, batch, cfg, key=key, train=True)
        after = flatten(new)
        for name in names:  # what the batch added: new = (1 - m) old + m batch
            total[name] = total[name] + (after[name] - (1 - MOMENTUM) * before[name]) / MOMENTUM
        count += 1
    return fill(state, before | {name: value / max(count, 1) for name, value in total.items()})


class Curve(NamedTuple):
    """Losses along a line between two models."""

    at: tuple[float, ...]  # 0 is the first model, 1 the second
    loss: Tensor  # float64 [S], nats

    @property
    def barrier(self) -> float:
        """The largest rise above the straight line between the ends' losses, in nats; needs points at 0 and 1.

        Frankle et al., ICML 2020, *error barrier*, as Entezari et al., ICLR 2022, equation 1. Raises ``ValueError``
        without the ends.
        """
        if 0.0 not in self.at or 1.0 not in self.at:
            raise ValueError(f"barrier: the line has points {list(self.at)}; want 0 and 1 among them.")
        t = torch.tensor(self.at, dtype=torch.float64)
        ends = [self.loss[self.at.index(end)] for end in (0.0, 1.0)]
        return float((self.loss - (1 - t) * ends[0] - t * ends[1]).max())


def loss_along_line(
    a: tuple[Params, State], b: tuple[Params, State], batch: Batch, cfg: Config, points: Sequence[float], *, key: Key,
    statistics: Sequence[Batch] | None = None, chunk: int | None = None,
) -> Curve:  # fmt: skip
    """Mean loss in nats of ``(1 - t) a + t b`` at every t of ``points``, in evaluation mode.

    Batch statistics are recomputed from ``statistics`` (None: from ``batch`` itself) at every point, the ends too. The
    quantizer, and with it the targets, must be that of both. Raises ``ValueError`` if it is not.
    """
    check_targets(a[1], b[1])
    found = []
    for t in points:
        point = interpolate(a[0], b[0], t)
        found.append(_loss_at(point, a[1], batch, cfg, key, statistics, chunk))
    return Curve(tuple(map(float, points)), torch.stack(found))


def check_targets(a: State, b: State) -> None:
    """Raise ``ValueError`` unless two models have one quantizer: else their losses are of different targets."""
    for path, leaf in flatten(a["quantizer"]).items():
        other = flatten(b["quantizer"])[path]
        if leaf.shape != other.shape or not torch.equal(leaf, other):
            raise ValueError(
                f"paths: the models differ in quantizer.{path}, so their targets do; take runs of one seed."
            )


@torch.no_grad()
def _loss_at(
    params: Params, state: State, batch: Batch, cfg: Config, key: Key, statistics: Sequence[Batch] | None,
    chunk: int | None,
) -> Tensor:  # fmt: skip
    fitting = recompute_statistics(params, state, [batch] if statistics is None else statistics, cfg, key=key)
    return mean_loss(params, fitting, batch, cfg, key=key, chunk=chunk)[0].double()


class Plane(NamedTuple):
    """The plane through three models: origin and two orthonormal directions, and where the models lie on it."""

    origin: Params
    first: Params
    second: Params
    places: tuple[tuple[float, float], ...]  # of the three models

    def at(self, x: float, y: float) -> Params:
        """The parameters at a place."""
        return add_scaled(add_scaled(self.origin, self.first, x), self.second, y)


def plane_through(a: Params, b: Params, c: Params) -> Plane:
    """The plane through three models, by Gram and Schmidt (Garipov et al., NeurIPS 2018, appendix A).

    Raises ``ValueError`` if they lie on one line.
    """
    one, two = add_scaled(b, a, -1.0), add_scaled(c, a, -1.0)
    length = norm(one)
    first = scaled(one, 1.0 / length.clamp(min=1e-30))
    along = dot(two, first)
    rest = add_scaled(two, first, -along)
    height = norm(rest)
    if float(length) == 0 or float(height) <= 1e-6 * float(norm(two)):
        raise ValueError("plane_through: the three models lie on one line; take others, or loss_along_line.")
    places = ((0.0, 0.0), (float(length), 0.0), (float(along), float(height)))
    return Plane(a, first, scaled(rest, 1.0 / height), places)


def loss_on_plane(
    plane: Plane, state: State, batch: Batch, cfg: Config, x: Sequence[float], y: Sequence[float], *, key: Key,
    statistics: Sequence[Batch] | None = None, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Mean loss in nats at all places ``x`` by ``y`` of a plane: float64 ``[Y, X]``; statistics as on a line."""
    return torch.stack(
        [torch.stack([_loss_at(plane.at(u, v), state, batch, cfg, key, statistics, chunk) for u in x]) for v in y]
    )

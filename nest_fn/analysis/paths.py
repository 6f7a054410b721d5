"""The loss between checkpoints: along a line or a trained curve, on a plane, with batch statistics computed anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.func import grad_and_value

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.norm import MOMENTUM
from nest_fn.layers.tree import fill, flatten, tree_map
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.model import Batch, loss_sum

from .by_row.rows import plain
from .curvature import mean_loss
from .trees import add_scaled, dot, norm, normal_like, scaled

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


def bezier(a: Any, middle: Any, b: Any, t: float) -> Any:
    """``(1 - t)^2 a + 2 t (1 - t) middle + t^2 b``, leaf by leaf: the quadratic Bezier curve from ``a`` to ``b``."""
    weights = (1 - t) ** 2, 2 * t * (1 - t), t**2
    return tree_map(lambda x, y, z: weights[0] * x + weights[1] * y + weights[2] * z, a, middle, b)


class Trained(NamedTuple):
    """The middle of a trained curve, and how it got there."""

    middle: Any  # a tree like the ends
    loss: Tensor  # float64 [steps], at the point that each step drew


def train_curve(
    a: Any, b: Any, loss: Callable[[Any, int], Tensor], *, key: Key, steps: int, lr: float, spread: float = 0.01
) -> Trained:  # fmt: skip
    """The middle of the quadratic Bezier curve from ``a`` to ``b`` with the least mean loss over t in 0..1.

    Every step draws t evenly, by ``key [2]``, and moves the middle by Adam (Kingma and Ba 2015) along ``2 t (1 - t)``
    times the gradient of ``loss(parameters, step) -> []`` at that point; the rate falls from ``lr`` to 0 in a line
    (Garipov et al., NeurIPS 2018, equation 2 and section 3.3, with Adam for SGD). It starts in the middle of the line,
    moved by ``spread`` times the distance of the ends in a drawn direction, for a line may be a ridge. Raises
    ``ValueError`` for fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"train_curve: steps is {steps}; want 1 or more.")
    start, places = random.split(key, 2).unbind(0)
    aside = normal_like(start, a)
    middle = add_scaled(interpolate(a, b, 0.5), aside, spread * norm(add_scaled(b, a, -1.0)) / norm(aside))
    mean, square = (tree_map(torch.zeros_like, middle) for _ in range(2))
    found = []
    for step in range(steps):
        t = float(random.uniform(random.fold_in(places, step), (), torch.float64))
        slope, value = grad_and_value(lambda m, t=t, step=step: loss(bezier(a, m, b, t), step))(middle)
        mean = tree_map(lambda m, g: 0.9 * m + 0.1 * g, mean, slope)
        square = tree_map(lambda v, g: 0.98 * v + 0.02 * g.square(), square, slope)
        rate, done = lr * (1 - step / steps), step + 1
        one, two = 1 - 0.9**done, 1 - 0.98**done
        move = tree_map(lambda m, v, one=one, two=two: (m / one) / ((v / two).sqrt() + 1e-12), mean, square)
        middle = add_scaled(middle, move, -rate)
        found.append(value.detach().double())
    return Trained(middle, torch.stack(found))


def connect(
    a: tuple[Params, State], b: tuple[Params, State], batches: Sequence[Batch], cfg: Config, *, key: Key, steps: int,
    lr: float,
) -> Trained:  # fmt: skip
    """``train_curve`` between two models: a function of the ends, ``batches``, ``key [2]``, ``steps`` and ``lr``.

    Step n uses batch n, round and round, with masks of its own, batch statistics of the batch and no dropout. Raises
    ``ValueError`` if the models have different quantizers, and without batches.
    """
    check_targets(a[1], b[1])
    if not batches:
        raise ValueError("connect: there is no batch; give one or more.")
    cfg, (mask_key, curve_key) = plain(cfg).override(*_QUIET), random.split(key, 2).unbind(0)

    def loss(params: Params, step: int) -> Tensor:
        drawn = random.fold_in(mask_key, step)
        total, (metrics, _) = loss_sum(params, a[1], batches[step % len(batches)], cfg, key=drawn, train=True)
        return total / metrics["masked_tokens"].clamp(min=1)

    return train_curve(a[0], b[0], loss, key=curve_key, steps=steps, lr=lr)


def loss_along_curve(
    a: tuple[Params, State], middle: Params, b: tuple[Params, State], batch: Batch, cfg: Config,
    points: Sequence[float], *, key: Key, statistics: Sequence[Batch] | None = None, chunk: int | None = None,
) -> Curve:  # fmt: skip
    """As ``loss_along_line``, along the Bezier curve with this ``middle``; its ``barrier`` is that of the curve."""
    check_targets(a[1], b[1])
    found = [
        _loss_at(bezier(a[0], middle, b[0], t), a[1], batch, cfg, key, statistics, chunk) for t in points
    ]  # fmt: skip
    return Curve(tuple(map(float, points)), torch.stack(found))


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

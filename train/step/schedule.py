"""Learning rates: ``step -> rate``, where ``step`` counts the optimizer updates done so far (reference 6.4)."""

from __future__ import annotations

import math
from collections.abc import Callable

from nest_fn.config import Config

Schedule = Callable[[int], float]


def noam(factor: float, width: int, warmup: int, min_lr: float = 0.0) -> Schedule:
    """Rises linearly for ``warmup`` steps, then falls with the root of the step, never below ``min_lr``.

    ``factor * width^-0.5 * min(step^-0.5, step * warmup^-1.5)`` with ``step = max(1, k)``, so that the first two
    updates use the same rate; ``min_lr`` does not hold during warm-up (the reference's NoamAnnealing).
    """

    def rate(k: int) -> float:
        step = max(1, k)
        rising = step * warmup**-1.5 if warmup > 0 else math.inf
        value = factor * width**-0.5 * min(step**-0.5, rising)
        return max(value, min_lr) if step > warmup else value

    return rate


def cosine(peak: float, warmup: int, max_steps: int, min_lr: float = 0.0, constant: int = 0) -> Schedule:
    """Rises linearly, then falls along half a cosine to ``min_lr`` at ``max_steps`` (the reference's CosineAnnealing).

    With ``constant > 0`` the rate starts from 0 and reaches ``min_lr`` that many steps earlier (its Megatron form).
    """
    decay = max_steps - warmup - constant
    if decay < 0:
        raise ValueError(
            f"cosine: warm-up and constant part take {warmup + constant} of {max_steps} steps; "
            "raise max_steps or lower warmup_steps."
        )

    def rate(k: int) -> float:
        if warmup > 0 and constant > 0 and k <= warmup:
            return peak * k / warmup
        if warmup > 0 and constant == 0 and k < warmup:
            return peak * (k + 1) / (warmup + 1)
        done = min(1.0, (k - warmup) / decay) if decay > 0 else 1.0
        return min_lr + (peak - min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))

    return rate


def make_schedule(cfg: Config) -> Schedule:
    """The schedule that ``optim.sched`` describes; without one, ``optim.lr`` throughout."""
    sched, peak = cfg.optim.sched, cfg.optim.lr
    if sched is None or sched.name == "constant":
        return lambda k: peak
    max_steps = sched.max_steps if sched.max_steps is not None else cfg.trainer.max_steps
    if sched.name == "cosine":
        return cosine(peak, sched.warmup, max_steps, sched.min_lr, sched.constant_steps)
    return noam(peak, sched.d_model or cfg.encoder.d_model, sched.warmup, sched.min_lr)

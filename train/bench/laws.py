"""How the time of a step grows with length, rows, layers and width, beside its own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.train.step.step import init_train_state, training_loss

from .sides import Machine, closing, ours
from .workload import Case, Shape, made_up_batch

PRESET = "nest_small"
_TEN = Shape(4, 10.0)


class Law(NamedTuple):
    """What changes, its values, and the case of each value."""

    name: str
    values: tuple[float, ...]
    cases: tuple[Case, ...]


def laws() -> tuple[Law, ...]:
    """Length at constant audio-seconds, rows, layers, width: two sizes of NEST-Small around its own."""
    lengths, rows, layers, widths = (5.0, 15.0, 60.0, 120.0), (1, 2, 4, 8), (2, 4, 8, 16), (88, 176, 352)
    small = ("encoder.n_layers=4",)
    return (
        Law("length", lengths, tuple(Case(PRESET, Shape(round(120 / one), one), small) for one in lengths)),
        Law("rows", rows, tuple(Case(PRESET, Shape(one, 10.0), small) for one in rows)),
        Law("layers", layers, tuple(Case(PRESET, _TEN, (f"encoder.n_layers={one}",)) for one in layers)),
        Law("width", widths, tuple(Case(PRESET, _TEN, (*small, f"encoder.d_model={one}")) for one in widths)),
    )


def measure(law: Law, machine: Machine, rounds: int) -> dict[str, Any]:
    """Least seconds and FLOP of a step at each value, and the slopes of their logarithms."""
    sides = {str(number): ours(case, machine) for number, case in enumerate(law.cases)}
    with closing(sides):
        asked = list(zip(sides.values(), law.cases, strict=True))
        for side, case in asked:
            side.steps(case.shape, 1)
        turns = [[min(side.steps(case.shape, 2)["seconds"]) for side, case in asked] for _ in range(rounds)]
    seconds = [min(column) for column in zip(*turns, strict=True)]
    flops = [step_flops(case.config(), case.shape) for case in law.cases]
    return {
        "values": list(law.values), "seconds": seconds, "flops": flops,
        "slope": slope(law.values, seconds), "slope_of_flops": slope(law.values, flops),
    }  # fmt: skip


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent of ``y`` as a power of ``x``, by least squares on logarithms."""
    logx, logy = [math.log(one) for one in x], [math.log(one) for one in y]
    mean, base = sum(logx) / len(logx), sum(logy) / len(logy)
    squares = sum((a - mean) ** 2 for a in logx)
    return sum((a - mean) * (b - base) for a, b in zip(logx, logy, strict=True)) / squares


def step_flops(cfg: Config, shape: Shape) -> float:
    """FLOP of a step: matrix products and convolutions of its forward pass, three times.

    PyTorch's counter counts too much for gradients of grouped convolutions, hence the factor.
    """
    counter = FlopCounterMode(display=False)
    key = random.key(0)
    ts, batch = init_train_state(key, cfg), made_up_batch(cfg, shape)
    with counter, torch.no_grad():
        training_loss(cfg)(ts.params, ts.state, batch, key)
    return 3.0 * counter.get_total_flops()


def told(law: Law, found: dict[str, Any]) -> Iterator[str]:
    """Lines of a report."""
    pairs = ", ".join(
        f"{value:g}: {taken * 1e3:.0f} ms" for value, taken in zip(law.values, found["seconds"], strict=True)
    )
    yield f"step against {law.name}: {pairs}"
    yield f"  grows with the power {found['slope']:.2f}, its arithmetic with {found['slope_of_flops']:.2f}"

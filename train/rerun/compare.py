"""Tensors and lines of metrics compared to the last bit, and how far they are from each other where they differ."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from math import inf, isfinite
from typing import Any, NamedTuple

import torch

from nest_fn.layers.types import Tensor

_DIGEST = re.compile(r"[0-9a-f]{64}")
ROUNDING = 1e-3
"""Relative differences up to this can grow from rounding within some hundred steps; larger ones have another cause."""


class TensorDifference(NamedTuple):
    """One tensor that is not the same to the last bit."""

    path: str
    text: str  # how it differs
    relative: float  # largest difference over largest magnitude; inf where they cannot be subtracted


def tensor_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[TensorDifference]:
    """Leaves that differ, in the order of ``then``, then those that only ``now`` has."""
    for path, before in then.items():
        if path not in now:
            yield TensorDifference(path, f"{_kind(before)}, and nothing", inf)
        elif (found := _difference(path, before, now[path])) is not None:
            yield found
    for path, after in now.items():
        if path not in then:
            yield TensorDifference(path, f"nothing, and {_kind(after)}", inf)


def _difference(path: str, before: Any, after: Any) -> TensorDifference | None:
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return None if before == after else TensorDifference(path, f"{before!r}, and {after!r}", inf)
    if before.dtype != after.dtype or before.shape != after.shape:
        return TensorDifference(path, f"{_kind(before)}, and {_kind(after)}", inf)
    first, second = before.detach().cpu(), after.detach().cpu()
    other = _bytes(first) != _bytes(second)
    if not other.any():
        return None
    count = int(other.reshape(first.numel(), -1).any(dim=1).sum())
    distance = float((first.double() - second.double()).abs().nan_to_num(nan=inf).max())
    size = float(torch.maximum(first.double().abs().max(), second.double().abs().max()))
    relative = distance / size if size > 0 and isfinite(size) else (0.0 if distance == 0 else inf)
    many = f"{count:,} of {first.numel():,} elements"
    return TensorDifference(path, f"{many} by at most {distance:.3g} (largest magnitude {size:.3g})", relative)


def relative_distance(then: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    """The largest ``|a - b| / |a|`` over the parts of two checkpoints, with norms over all of a part's tensors.

    Parts are the parameters, the state, each kind of the optimizer's moments. Single tensors do not show whether a
    difference is of rounding: the gradient of a bias before a batch norm is nothing else. Infinite where tensors are
    missing or of other shapes, or where a value is not finite in one alone.
    """
    squares: dict[str, list[float]] = {}
    for path in {**then, **now}:
        before, after = then.get(path), now.get(path)
        if not isinstance(before, Tensor) or not isinstance(after, Tensor) or before.shape != after.shape:
            return inf
        a, b = before.detach().cpu().double(), after.detach().cpu().double()
        same = (a == b) | (a.isnan() & b.isnan())
        part = squares.setdefault(".".join(path.split(".")[: 2 if path.startswith("optimizer.") else 1]), [0.0, 0.0])
        part[0] += float(torch.where(same, 0.0, a - b).nan_to_num(nan=inf).square().sum())
        part[1] += float(a.nan_to_num(0.0, 0.0, 0.0).square().sum())
    return max((_ratio(*part) for part in squares.values()), default=0.0)


def _ratio(difference: float, size: float) -> float:
    """The root of a quotient of squares; infinite for a difference to nothing."""
    if difference == 0:
        return 0.0
    return (difference / size) ** 0.5 if size > 0 else inf


def _bytes(leaf: Tensor) -> Tensor:
    return leaf.contiguous().reshape(-1).view(torch.uint8)


def _kind(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"


class LineDifference(NamedTuple):
    """One line of metrics that is not the same."""

    text: str  # the values that differ, the first ones
    relative: float  # the largest relative difference among them


def line_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> LineDifference | None:
    """How two lines of metrics differ, their times apart; None if they do not. NaN equals NaN."""
    names = [
        name for name in {**then, **now} if name != "time" and json.dumps(then.get(name)) != json.dumps(now.get(name))
    ]
    if not names:
        return None
    told = [f"{name} {then.get(name)!r} and {now.get(name)!r}" for name in names]
    more = f" and {len(told) - 3} more" if len(told) > 3 else ""
    return LineDifference(", ".join(told[:3]) + more, max(_relative(then.get(name), now.get(name)) for name in names))


def _relative(first: Any, second: Any) -> float:
    if not isinstance(first, int | float) or not isinstance(second, int | float):
        return inf
    size = max(abs(first), abs(second))
    return abs(first - second) / size if isfinite(size) and size > 0 else inf


def changed_entries(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key: before -> after`` for each entry of two flat mappings that differs, digests by their first digits."""
    other = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return [f"{key}: {_short(then.get(key))} -> {_short(now.get(key))}" for key in other]


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) and _DIGEST.fullmatch(value) else value

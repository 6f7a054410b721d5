"""Clocks, and what the machine can do at best: its matrix product and its copy, measured in the same run."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nest_fn.layers import random

T = TypeVar("T")
_REPEATS = 5
_COPIED = 1 << 26  # bytes on a CPU, far more than its caches hold; 16 times as many on a GPU


def timed(f: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """The result of a call and its seconds: of all threads on a CPU, of the clock on a GPU, whose work it waits for."""
    now = time.perf_counter if device.type == "cuda" else time.process_time
    wait(device)
    begun = now()
    result = f()
    wait(device)
    return result, now() - begun


def least_and_median(f: Callable[[], Any], repeats: int, device: torch.device) -> tuple[float, float]:
    """Seconds over ``repeats`` calls, after one that does not count."""
    f()
    seconds = [timed(f, device)[1] for _ in range(repeats)]
    return min(seconds), statistics.median(seconds)


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_rate(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large square matrix product; on a CPU a core-second's."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = random.normal(random.key(0), (2, size, size)).to(device, dtype).unbind(0)
    return 2.0 * size**3 / least_and_median(lambda: a @ b, _REPEATS, device)[0]


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy of a large tensor; on a CPU a core-second's."""
    count = _COPIED * (16 if device.type == "cuda" else 1)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * count / least_and_median(lambda: target.copy_(source), _REPEATS, device)[0]


def peak_memory(device: torch.device) -> int:
    """The most that this process has held, in bytes: of the device's memory, on a CPU resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

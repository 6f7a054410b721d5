"""Digests of every tensor at some updates, in ``digests.jsonl``: by them ``verify`` and ``diff`` name a tensor.

    {"step": 20, "tensors": ["batch.audio", ...], "digests": "5f0c..."}

16 hexadecimal digits of a SHA-256 for each tensor, in the order of the names. Lines after the first leave the names out
if they are the same. A record reads every tensor once and takes 16 bytes for each, whatever its size.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nest_fn.checkpoint.folder import digest_of
from nest_fn.files.appending import append_whole
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Key, Tensor

from .checkpoints import trees_of
from .progress import Progress

ORDER = ("batch", "key", "state", "metrics", "optimizer", "params", "ema")
"""An update's tensors in the order in which they follow from each other.

A batch and the key of its step; batch statistics and the frozen quantizer; the update's loss, counts and gradient norm;
means of the gradients; parameters; their average. The gradient itself is not kept by a step: where it differs first, so
does ``optimizer.mean``.
"""
_DIGITS = 16
_THREADS = 4  # tensors whose digests are computed at a time

Digests = dict[str, str]


def tensors_of(
    progress: Progress, batch: Mapping[str, Tensor], key: Key, metrics: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Every tensor of an update by its path, in the order of ``ORDER``: ``progress`` is that after it.

    ``batch`` is what was read for it, empty where that is not the whole batch; ``key`` is its random key ``[2]``;
    ``metrics`` are its own.
    """
    trees = {"batch": dict(batch), "key": key, "metrics": dict(metrics)} | trees_of(progress)
    return flatten({name: trees[name] for name in ORDER})


def digests_of(tensors: Mapping[str, Tensor]) -> Digests:
    """The digest of each tensor: of its dtype, shape and bytes."""
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda leaf: digest_of({"": leaf}, {})[:_DIGITS], tensors.values())
        return dict(zip(tensors, found, strict=True))


def append_digests(path: Path, step: int, digests: Mapping[str, str]) -> None:
    """Add a record, flushed; the whole of it or nothing. Raises ``OSError``."""
    names = list(digests)
    line: dict[str, Any] = {"step": step} | ({} if names == _first_names(path) else {"tensors": names})
    append_whole(path, (json.dumps(line | {"digests": "".join(digests.values())}) + "\n").encode())


def read_digests(path: Path) -> Iterator[tuple[int, Digests]]:
    """The records of a file, in order; none if there is no file. Lines that cannot be read are left out."""
    first = _first_names(path)
    for _, line in _lines(path):
        names, text = line.get("tensors", first), line.get("digests")
        if names and isinstance(text, str) and len(text) == _DIGITS * len(names):
            yield line["step"], {name: text[_DIGITS * n : _DIGITS * (n + 1)] for n, name in enumerate(names)}


def cut_digests(path: Path, step: int) -> None:
    """Drop what comes after the last record of ``step`` or before: a run that goes on from there writes it again."""
    if path.is_file():
        end = max((end for end, line in _lines(path) if line["step"] <= step), default=0)
        with open(path, "r+b") as file:
            file.truncate(end)


def first_difference(then: Mapping[str, str], now: Mapping[str, str]) -> tuple[str | None, str]:
    """The first tensor, in the order of ``then``, whose digest is another one now, if one is; and a sentence.

    Tensors that only ``now`` has were not recorded, and do not count.
    """
    other = [name for name, digest in then.items() if now.get(name) != digest]
    if not other:
        return None, f"tensors equal, {len(then)} digests"
    equal = [name for name in dict.fromkeys(path.split(".")[0] for path in then) if not _part(name, other)]
    rest = f"; equal: {', '.join(equal)}" if equal else ""
    return other[0], f"tensors differ, {len(other)} of {len(then)}, first {other[0]}{rest}"


def _part(name: str, paths: list[str]) -> list[str]:
    return [path for path in paths if path.split(".")[0] == name]


def _first_names(path: Path) -> list[str] | None:
    return next((line.get("tensors") for _, line in _lines(path)), None)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line that holds a record, and where it ends in the file."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        end = 0
        for raw in file:
            end += len(raw)
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict) and isinstance(line.get("step"), int) and raw.endswith(b"\n"):
                yield end, line

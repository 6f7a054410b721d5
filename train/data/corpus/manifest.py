"""Manifests: the utterances, the location of their audio, and its duration (reference 7.1).

A manifest is a JSON lines file. ``load_manifest`` reads one or several of them strictly, reports all bad lines at once,
reads the headers of files without a ``duration``, filters by duration, and returns columns (``manifest_table.py``).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nest_fn.files.atomic import anything, atomic_write
from nest_fn.files.quoting import clip
from nest_fn.train.errors import DataError

from ..audio_files.audio import Channel, audio_info
from ..audio_files.remote import as_cache, is_remote
from ..audio_files.remote_cache import Cache
from .columns import NumberBuilder, TextBuilder, TextColumn, compact, half_units
from .crops import crop_long
from .manifest_lines import EntryBlock, LineProblems, read_blocks, text_of
from .manifest_table import Manifest
from .shard_index import ShardIndex, expand_pattern, index_shards
from .thread_map import ordered_map

_COMMA = re.compile(r",(?![^{}]*\})")  # not one inside of braces


def load_manifest(
    files: str | Path | Sequence[str | Path],
    *,
    min_duration: float = 0.0,
    max_duration: float = math.inf,
    long: str = "drop",
    root: str | Path | None = None,
    shards: Sequence[str] = (),
    channel: Channel = "error",
    check_files: bool = True,
    cache: Cache | str | Path | None = None,
    workers: int = 4,
) -> Manifest:
    """Read manifests and keep the utterances with ``min_duration <= duration <= max_duration`` (seconds), in order.

    ``long="crop"`` divides longer ones into crops (``crops.py``) instead of dropping them.
    ``files`` is one path, several separated by commas, or a list. If ``root`` is given, all audio must be below that
    folder. ``shards`` are patterns of tar archives that hold the audio. ``check_files=False`` does not check that every
    file exists; those at an address are never looked for beforehand, and ``cache`` holds their copies.
    Raises ``DataError`` with the first 20 problems and their total.
    """
    paths = manifest_files(files)
    index = index_shards(shards, workers, cache) if shards else None
    manifest = replace(_parse(paths, index), cache=as_cache(cache))
    title = f"manifest {', '.join(paths)}"
    if index is None:
        manifest = _resolve(manifest, root, check_files, title)
    manifest = _read_headers(manifest, channel, workers, title)
    manifest = crop_long(manifest, max_duration) if long == "crop" else manifest
    manifest = _filter(manifest, min_duration, max_duration, title)
    _refuse_duplicates(manifest, title)
    return manifest


def manifest_files(files: str | Path | Sequence[str | Path]) -> list[str]:
    """Paths from one path, a list, or a string with commas; ``m_{0..7}.jsonl`` and ``m__OP_0..7_CL_.jsonl`` are many.

    Raises ``DataError`` if there are none.
    """
    listed = [files] if isinstance(files, (str, Path)) else list(files)
    paths: list[str] = []
    for item in (os.fspath(entry) for entry in listed):
        parts = [item] if os.path.exists(item) else [part.strip() for part in _COMMA.split(item)]
        for part in filter(None, parts):
            paths += [os.path.expanduser(name) for name in ([part] if os.path.exists(part) else expand_pattern(part))]
    if not paths:
        raise DataError("manifest: no file is named; set data.train")
    return paths


def write_manifest(path: str | Path, entries: Iterable[Mapping[str, Any]], *, overwrite: bool = False) -> None:
    """Write JSON lines atomically. Raises ``OutputError`` if the file exists, unless ``overwrite``."""
    with (
        atomic_write(path, 0, replaces=anything if overwrite else None) as temporary,
        open(temporary, "w", encoding="utf-8") as stream,
    ):
        for entry in entries:
            stream.write(json.dumps(entry) + "\n")


# Steps of load_manifest ----------------------------------------------------------------------------------------------


def _parse(paths: list[str], shards: ShardIndex | None) -> Manifest:
    """All lines of all files as columns, with their members in ``shards``."""
    problems, names = LineProblems(), TextBuilder()
    offset, duration = NumberBuilder(np.float64), NumberBuilder(np.float64)
    file, line = NumberBuilder(np.int32), NumberBuilder(np.int32)
    position, member = NumberBuilder(np.int64), NumberBuilder(np.int64)
    channel, channels = NumberBuilder(np.int32), dict[tuple[int, ...], int]([((), 0)])
    texts = {path: text for path in paths if (text := text_of(path)) is not None}
    for number, path in enumerate(paths):
        before = len(names)
        for block in read_blocks(path, problems, text=texts.get(path)):
            names.extend(block.names)
            offset.extend(block.offset)
            duration.extend(block.duration)
            file.extend([number] * len(block.names))
            line.extend(block.line)
            position.extend(block.position)
            chosen = np.zeros(len(block.names), np.int32)
            for index, named in block.channel.items():
                chosen[index] = channels.setdefault(named, len(channels))
            channel.extend(chosen)
            own = number if shards is not None and len(shards.paths) == len(paths) else -1
            member.extend(_members(path, block, shards, own, problems))
        if len(names) == before and not problems.total:
            problems.add("", f"manifest {path} holds no utterance; it is empty")
    problems.raise_any(f"manifest {', '.join(paths)}")
    offsets, durations = offset.column(), duration.column()
    return Manifest(
        tuple(paths), names.column(), offsets, durations, file.column(), line.column(), position.column(),
        member.column(), compact(half_units(offsets) + half_units(durations)), channel.column(), tuple(channels),
        shards, texts,
    )  # fmt: skip


def _members(
    path: str, block: EntryBlock, shards: ShardIndex | None, own: int, problems: LineProblems
) -> NDArray[np.int64]:
    """The members in ``shards`` that the lines of a block name; -1 where there are no shards.

    ``own`` is the shard of a manifest that is one of as many as there are shards, for names that several shards have.
    """
    if shards is None:
        return np.full(len(block.names), -1, np.int64)
    found = shards.find_clear(block.names, block.shard)
    for index in np.flatnonzero(found < 0).tolist():
        try:
            found[index] = shards.find(block.names[index], block.shard[index])
        except DataError as error:
            problems.add(f"{path}:{block.line[index]}", error)
    return found


def _resolve(manifest: Manifest, root: str | Path | None, check_files: bool, title: str) -> Manifest:
    """Locate every file: relative to its manifest, else as written; if ``root`` is given, it must be below it."""
    problems, other = LineProblems(), dict[int, str]()
    inside = None if root is None else os.path.join(os.path.realpath(root), "")
    for index, name in enumerate(manifest.names if check_files or inside else ()):
        if is_remote(name) or is_remote(manifest.folder(index)):
            if inside:
                problems.add(manifest.where(index), f"{name} is at an address, outside of data.root {root}")
            continue
        path = os.path.join(manifest.folder(index), name)
        if check_files and not os.path.isfile(path):
            given = os.path.abspath(os.path.expanduser(name))
            if not os.path.isfile(given):
                problems.add(manifest.where(index), f"no such file: {clip(name, 300)}; looked for {clip(path, 4200)}")
                continue
            other[index] = path = given
        if inside and not os.path.realpath(path).startswith(inside):
            problems.add(manifest.where(index), f"{name} is {os.path.realpath(path)}, outside of data.root {root}")
    problems.raise_any(title)
    names = TextColumn.of(other.get(index, name) for index, name in enumerate(manifest.names)) if other else None
    return manifest if names is None else replace(manifest, names=names)


def _read_headers(manifest: Manifest, channel: Channel, workers: int, title: str) -> Manifest:
    """Read the durations that lines do not give from the files' headers."""
    missing = np.flatnonzero(np.isnan(manifest.duration))
    problems, duration = LineProblems(), manifest.duration.copy()

    def measure(index: int) -> float | DataError:
        try:
            info = audio_info(manifest.source(index), manifest.where(index))
            if channel == "error" and info.channels != 1 and not manifest.channel[index]:
                return DataError(f"{manifest.where(index)}: {info.channels} channels; set data.channel")
            left = info.duration - manifest.offset[index]
            return left if left > 0 else DataError(f"{manifest.where(index)}: offset is beyond {info.duration:.3f} s")
        except DataError as error:
            return error

    found: Iterator[float | DataError] = ordered_map(measure, missing.tolist(), workers=workers if len(missing) else 0)
    for index, answer in zip(missing, found, strict=True):
        if isinstance(answer, DataError):
            problems.add("", answer)
        else:
            duration[index] = answer
    problems.raise_any(title)
    return replace(manifest, duration=duration)


def _refuse_duplicates(manifest: Manifest, title: str) -> None:
    """Raise ``DataError`` if the same part of the same file occurs twice in the manifests."""
    hashes = np.sort(manifest.utterance)
    twice = hashes[1:][hashes[1:] == hashes[:-1]]
    problems = LineProblems()
    places = np.flatnonzero(np.isin(manifest.utterance, twice)) if len(twice) else twice
    order = places[np.argsort(manifest.utterance[places], kind="stable")]
    for first, again in pairwise(order.tolist()):
        if manifest.utterance[first] == manifest.utterance[again]:
            problems.add(manifest.where(again), f"{manifest.identity(again)} stands already in {manifest.where(first)}")
    problems.raise_any(title)


def _filter(manifest: Manifest, min_duration: float, max_duration: float, title: str) -> Manifest:
    """Drop utterances that are too short or too long, and record how many in ``dropped``."""
    short, long = manifest.duration < min_duration, manifest.duration > max_duration
    counts = {
        f"shorter than min_duration={min_duration} s": int(short.sum()),
        f"longer than max_duration={max_duration} s": int(long.sum()),
    }
    dropped = tuple((rule, count) for rule, count in counts.items() if count)
    kept = np.flatnonzero(~(short | long))
    if not len(kept):
        reasons = ", ".join(f"{count} {rule}" for rule, count in dropped)
        raise DataError(f"{title}: all {len(manifest)} utterances were dropped: {reasons}; change the limits")
    return replace(manifest if len(kept) == len(manifest) else manifest.take(kept), dropped=dropped)

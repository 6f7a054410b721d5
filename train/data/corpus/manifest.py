"""Manifests: the utterances, the location of their audio, and its duration (reference 7.1).

A manifest is a JSON lines file. ``load_manifest`` reads one or several of them strictly, reports all bad lines at once,
reads the headers of files without a ``duration``, filters by duration, and stores columns, so that a million lines fit
in memory. An utterance's id is its path relative to the common folder of all manifests, with offset and duration to the
millisecond: it does not change when the dataset moves, and all random draws for an utterance are keyed by its hash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nest_fn.files.atomic import anything, atomic_write
from nest_fn.files.inputs import open_plain, read_plain
from nest_fn.files.quoting import clip
from nest_fn.train.errors import DataError
from nest_fn.train.hash_rng import utterance_hash

from .audio import Channel, audio_info
from .manifest_lines import LineProblems, parse_line, read_entries
from .shard_index import ShardIndex, index_shards
from .thread_map import ordered_map
from .wav import Source


@dataclass(frozen=True)
class Manifest:
    """Utterances as columns of length ``len(manifest)``; ``file`` indexes ``files``."""

    files: tuple[str, ...]
    names: list[str]  # audio paths, absolute or relative to their manifest's folder, or names of tar members
    offset: NDArray[np.float64]  # seconds
    duration: NDArray[np.float64]  # seconds; NaN only before headers are read
    file: NDArray[np.int32]
    line: NDArray[np.int32]  # from 1
    position: NDArray[np.int64]  # of the line in its file, bytes
    member: NDArray[np.int64]  # number in ``shards``; -1: a plain file
    shards: ShardIndex | None = None
    dropped: tuple[tuple[str, int], ...] = ()  # filter rule, and the number of utterances that it dropped

    def __len__(self) -> int:
        return len(self.names)

    def source(self, index: int) -> Source:
        """The location of an utterance's audio: a path, or a byte range of a tar archive."""
        if self.shards is not None and self.member[index] >= 0:
            return self.shards.span(int(self.member[index]))
        return os.path.join(self._folders[self.file[index]], self.names[index])

    def where(self, index: int) -> str:
        """The manifest and line of an utterance, for messages."""
        return f"{self.files[self.file[index]]}:{self.line[index]}"

    def relative_path(self, index: int) -> str:
        """The audio's path relative to the common folder of all manifests; absolute if it lies outside."""
        name = self.names[index]
        if os.path.isabs(name):
            inside = name.startswith(os.path.join(self._common, ""))
            return str(os.path.relpath(name, self._common)) if inside else name
        joined: str = self._prefixes[self.file[index]] + name
        return os.path.normpath(joined) if "./" in joined or "//" in joined else joined

    def identity(self, index: int) -> str:
        """The utterance's id."""
        return f"{self.relative_path(index)}@{self.offset[index]:.3f}+{self.duration[index]:.3f}"

    @cached_property
    def utterance(self) -> NDArray[np.int64]:
        """63-bit hashes of the ids, int64 ``[n]``, which key the random draws."""
        return np.fromiter((utterance_hash(self.identity(i)) for i in range(len(self))), np.int64, len(self))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all ids, offsets and durations in order; it does not depend on where the dataset is stored."""
        hasher = hashlib.sha256()
        for index in range(len(self)):
            text = f"{self.identity(index)}\t{float(self.offset[index])!r}\t{float(self.duration[index])!r}\n"
            hasher.update(text.encode("utf-8", "surrogatepass"))
        return hasher.hexdigest()

    def fields(self, index: int) -> dict[str, Any]:
        """All keys of an utterance's line (speaker, text, label, ...), read from the manifest. Raises ``DataError``."""
        path = self.files[self.file[index]]
        try:
            with open_plain(path) as stream:
                stream.seek(int(self.position[index]))
                return parse_line(stream.readline().removeprefix(b"\xef\xbb\xbf"))
        except (OSError, DataError) as error:
            raise DataError(f"{self.where(index)}: {error}; the manifest changed since it was loaded") from error

    def read_bytes(self, index: int) -> bytes:
        """The bytes of an utterance's audio file, undecoded. Raises ``DataError``."""
        source = self.source(index)
        try:
            if isinstance(source, (str, Path)):
                return read_plain(source)
            with open_plain(source.path) as file:
                file.seek(source.start)
                return file.read(source.size)
        except OSError as error:
            raise DataError(f"{self.where(index)}: {source}: {error.strerror or error}") from error

    def take(self, indices: NDArray[np.int64]) -> Manifest:
        """The utterances with these indices, in this order."""
        columns = ("offset", "duration", "file", "line", "position", "member")
        return replace(
            self, names=[self.names[i] for i in indices], **{name: getattr(self, name)[indices] for name in columns}
        )

    @cached_property
    def _folders(self) -> list[str]:
        return [os.path.dirname(os.path.abspath(file)) for file in self.files]

    @cached_property
    def _common(self) -> str:
        return os.path.commonpath(self._folders)

    @cached_property
    def _prefixes(self) -> list[str]:
        relative = (os.path.relpath(folder, self._common).replace(os.sep, "/") for folder in self._folders)
        return ["" if folder == "." else folder + "/" for folder in relative]


def load_manifest(
    files: str | Path | Sequence[str | Path],
    *,
    min_duration: float = 0.0,
    max_duration: float = math.inf,
    root: str | Path | None = None,
    shards: Sequence[str] = (),
    channel: Channel = "error",
    check_files: bool = True,
    workers: int = 4,
) -> Manifest:
    """Read manifests and keep the utterances with ``min_duration <= duration <= max_duration`` (seconds), in order.

    ``files`` is one path, several separated by commas, or a list. If ``root`` is given, all audio must be below that
    folder. ``shards`` are patterns of tar archives that hold the audio. ``check_files=False`` does not check that every
    file exists. Raises ``DataError`` with the first 20 problems and their total.
    """
    paths = manifest_files(files)
    index = index_shards(shards, workers) if shards else None
    manifest = _parse(paths, index)
    title = f"manifest {', '.join(paths)}"
    if index is None:
        manifest = _resolve(manifest, root, check_files, title)
    manifest = _read_headers(manifest, channel, workers, title)
    manifest = _filter(manifest, min_duration, max_duration, title)
    _refuse_duplicates(manifest, title)
    return manifest


def manifest_files(files: str | Path | Sequence[str | Path]) -> list[str]:
    """Paths from one path, a list, or a string with commas. Raises ``DataError`` if there are none."""
    listed = [files] if isinstance(files, (str, Path)) else list(files)
    paths: list[str] = []
    for item in (os.fspath(entry) for entry in listed):
        parts = [item] if os.path.exists(item) else [part.strip() for part in item.split(",")]
        paths += [os.path.expanduser(part) for part in parts if part]
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
    problems = LineProblems()
    names: list[str] = []
    numbers: list[tuple[float, float, int, int, int, int]] = []
    for file_number, path in enumerate(paths):
        before = len(names)
        for entry in read_entries(path, problems):
            member = -1
            if shards is not None:
                try:
                    member = shards.find(entry.name, entry.shard)
                except DataError as error:
                    problems.add(f"{path}:{entry.line}", error)
            names.append(entry.name)
            numbers.append((entry.offset, entry.duration, file_number, entry.line, entry.position, member))
        if len(names) == before and not problems.total:
            problems.add("", f"manifest {path} holds no utterance; it is empty")
    problems.raise_any(f"manifest {', '.join(paths)}")
    offset, duration, file, line, position, member_numbers = (np.array(column) for column in zip(*numbers, strict=True))
    return Manifest(
        tuple(paths), names, offset.astype(np.float64), duration.astype(np.float64), file.astype(np.int32),
        line.astype(np.int32), position.astype(np.int64), member_numbers.astype(np.int64), shards,
    )  # fmt: skip


def _resolve(manifest: Manifest, root: str | Path | None, check_files: bool, title: str) -> Manifest:
    """Locate every file: relative to its manifest, else as written; if ``root`` is given, it must be below it."""
    problems, names = LineProblems(), list(manifest.names)
    inside = None if root is None else os.path.join(os.path.realpath(root), "")
    for index, name in enumerate(names if check_files or inside else ()):
        path = str(manifest.source(index))
        if check_files and not os.path.isfile(path):
            given = os.path.abspath(os.path.expanduser(name))
            if not os.path.isfile(given):
                problems.add(manifest.where(index), f"no such file: {clip(name, 300)}; looked for {clip(path, 4200)}")
                continue
            names[index] = path = given
        if inside and not os.path.realpath(path).startswith(inside):
            problems.add(manifest.where(index), f"{name} is {os.path.realpath(path)}, outside of data.root {root}")
    problems.raise_any(title)
    return replace(manifest, names=names)


def _read_headers(manifest: Manifest, channel: Channel, workers: int, title: str) -> Manifest:
    """Read the durations that lines do not give from the files' headers."""
    missing = np.flatnonzero(np.isnan(manifest.duration))
    problems, duration = LineProblems(), manifest.duration.copy()

    def measure(index: int) -> float | DataError:
        try:
            info = audio_info(manifest.source(index), manifest.where(index))
            if channel == "error" and info.channels != 1:
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
    order = np.argsort(manifest.utterance, kind="stable")
    hashes = manifest.utterance[order]
    problems = LineProblems()
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
        first, again = int(order[place]), int(order[place + 1])
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

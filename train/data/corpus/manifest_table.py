"""A loaded manifest: the utterances as columns, so that a million of them take less than 100 MB.

An utterance's id is its path relative to the common folder of all manifests, with offset and duration to the
millisecond and the channels that its line names: it does not change when the dataset moves, and all random draws for
an utterance are keyed by its hash. Keys of a line that training does not need are read from the file again when they
are asked for; the text of a compressed manifest is kept for that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nest_fn.files.inputs import open_plain, read_plain
from nest_fn.train.errors import DataError
from nest_fn.train.hash_rng import utterance_hashes

from ..audio_files.remote import Remote, held_copy, is_remote, remote
from ..audio_files.remote_cache import Cache
from ..audio_files.wav import Source, Span
from .columns import TextColumn, compact
from .manifest_lines import BOM, open_manifest, parse_line
from .shard_index import ShardIndex

_ROWS = 4096  # utterances whose ids are in memory at a time


@dataclass(frozen=True)
class Manifest:
    """Utterances as columns of length ``len(manifest)``; ``file`` indexes ``files``."""

    files: tuple[str, ...]
    names: TextColumn  # audio paths, absolute or relative to their manifest's folder, or names of tar members
    offset: NDArray[np.float64]  # seconds
    duration: NDArray[np.float64]  # seconds; NaN only before headers are read
    file: NDArray[np.int32]
    line: NDArray[np.int32]  # from 1
    position: NDArray[Any]  # of the line in its file, bytes
    member: NDArray[Any]  # number in ``shards``; -1: a plain file
    rounding: NDArray[Any]  # seconds: half a unit of the last decimal of a line's offset and duration
    channel: NDArray[Any]  # number in ``channels``; 0: the line names none
    channels: tuple[tuple[int, ...], ...] = ((),)  # all choices of channels that lines make
    shards: ShardIndex | None = None
    texts: Mapping[str, bytes] = field(default_factory=dict)  # of manifests that are compressed or remote, by path
    cache: Cache | None = None  # of copies of remote files; None: that of ``as_cache``
    dropped: tuple[tuple[str, int], ...] = ()  # filter rule, and the number of utterances that it dropped
    cropped: int = 0  # utterances that were divided into crops
    made: bool = False  # of a folder or a file of audio: its lines are nobody's, and not named

    def __len__(self) -> int:
        return len(self.names)

    def source(self, index: int) -> Source | Remote:
        """The location of an utterance's audio: a path, a byte range of a tar archive, or an address."""
        if self.shards is not None and self.member[index] >= 0:
            return self.shards.span(int(self.member[index]))
        name, folder = self.names[index], self.folder(index)
        if is_remote(name):
            return remote(name, self.cache)
        if is_remote(folder) and not os.path.isabs(name):
            return remote(f"{folder}/{name}", self.cache)
        return os.path.join(folder, name)

    def lasting_name(self, index: int) -> str | None:
        """The audio's absolute path or address, which holds in a manifest anywhere; None for a member of an archive."""
        source = self.source(index)
        if isinstance(source, Span):
            return None
        return source.url if isinstance(source, Remote) else os.path.abspath(source)

    def folder(self, index: int) -> str:
        """The folder or address of an utterance's manifest, which a relative path starts from."""
        return self._folders[self.file[index]]

    def where(self, index: int) -> str:
        """The manifest and line of an utterance or, if the manifest is nobody's, its file; for messages."""
        if self.made:
            return str(self.lasting_name(index) or self.source(index))
        return f"{self.files[self.file[index]]}:{self.line[index]}"

    def relative_path(self, index: int) -> str:
        """The audio's path relative to the common folder of all manifests; absolute if it lies outside."""
        return self._relative(self.names[index], int(self.file[index]))

    def identity(self, index: int) -> str:
        """The utterance's id."""
        span = f"{self.relative_path(index)}@{self.offset[index]:.3f}+{self.duration[index]:.3f}"
        return span + self._suffixes[self.channel[index]]

    @property
    def utterance(self) -> NDArray[np.int64]:
        """63-bit hashes of the ids, int64 ``[n]``, which key the random draws."""
        return self._hashes[0]

    @property
    def digest(self) -> str:
        """SHA-256 of all ids, offsets and durations in order; it does not depend on where the dataset is stored."""
        return self._hashes[1]

    @cached_property
    def _hashes(self) -> tuple[NDArray[np.int64], str]:
        """The hash of every id and the digest of all, in one pass over the ids."""
        hasher, utterance = hashlib.sha256(), np.empty(len(self), np.int64)
        for first in range(0, len(self), _ROWS):
            rows = slice(first, first + _ROWS)
            paths = map(self._relative, self.names.block(first, first + _ROWS), self.file[rows].tolist())
            spans = list(zip(self.offset[rows].tolist(), self.duration[rows].tolist(), strict=True))
            ids = [f"{path}@{begin:.3f}+{length:.3f}" for path, (begin, length) in zip(paths, spans, strict=True)]
            if len(self.channels) > 1:
                marks = [self._suffixes[number] for number in self.channel[rows].tolist()]
                ids = [name + mark for name, mark in zip(ids, marks, strict=True)]
            utterance[rows] = utterance_hashes(ids)
            lines = [f"{name}\t{begin!r}\t{length!r}\n" for name, (begin, length) in zip(ids, spans, strict=True)]
            hasher.update("".join(lines).encode("utf-8", "surrogatepass"))
        return utterance, hasher.hexdigest()

    def fields(self, index: int) -> dict[str, Any]:
        """All keys of an utterance's line (speaker, text, label, ...), read from the manifest. Raises ``DataError``."""
        path = self.files[self.file[index]]
        try:
            with open_manifest(path, self.texts.get(path)) as stream:
                stream.seek(int(self.position[index]))
                return parse_line(stream.readline().removeprefix(BOM))
        except (OSError, DataError) as error:
            raise DataError(f"{self.where(index)}: {error}; the manifest changed since it was loaded") from error

    def read_bytes(self, index: int) -> bytes:
        """The bytes of an utterance's audio file, undecoded. Raises ``DataError``."""
        source = self.source(index)
        try:
            if isinstance(source, Remote):
                with held_copy(source) as path:
                    return read_plain(path)
            if isinstance(source, (str, Path)):
                return read_plain(source)
            with open_plain(source.path) as file:
                file.seek(source.start)
                return file.read(source.size)
        except OSError as error:
            raise DataError(f"{self.where(index)}: {source}: {error.strerror or error}") from error

    def take(self, indices: NDArray[np.int64]) -> Manifest:
        """The utterances with these indices, in this order."""
        return replace(
            self,
            names=self.names.take(indices),
            offset=compact(self.offset[indices]),
            duration=self.duration[indices],
            file=compact(self.file[indices]),
            line=self.line[indices],
            position=compact(self.position[indices]),
            member=compact(self.member[indices]),
            rounding=self.rounding[indices],
            channel=compact(self.channel[indices]),
        )

    def _relative(self, name: str, file: int) -> str:
        """``relative_path`` of a name in a manifest."""
        if "://" in name:
            return name
        if name.startswith("/"):
            if not name.startswith(self._inside):
                return name
            if "/." in name or "//" in name or name.endswith("/"):
                return os.path.relpath(name, self._common)
            return name[len(self._inside) :]
        joined: str = self._prefixes[file] + name
        return os.path.normpath(joined) if "./" in joined or "//" in joined else joined

    @cached_property
    def _suffixes(self) -> list[str]:
        """What the channels of an utterance add to its id."""
        return ["" if not chosen else "#" + ",".join(map(str, chosen)) for chosen in self.channels]

    @cached_property
    def _folders(self) -> list[str]:
        return [
            file.rpartition("/")[0] if is_remote(file) else os.path.dirname(os.path.abspath(file))
            for file in self.files
        ]

    @cached_property
    def _places(self) -> list[str]:
        """The folders as absolute paths, those of addresses too, so that ids follow from how folders lie."""
        return ["/" + folder.replace("://", "/") if is_remote(folder) else folder for folder in self._folders]

    @cached_property
    def _common(self) -> str:
        return os.path.commonpath(self._places)

    @cached_property
    def _inside(self) -> str:
        return os.path.join(self._common, "")

    @cached_property
    def _prefixes(self) -> list[str]:
        relative = (os.path.relpath(folder, self._common).replace(os.sep, "/") for folder in self._places)
        return ["" if folder == "." else folder + "/" for folder in relative]

"""Tar shards: many audio files in few archives, read in place by their byte positions and never extracted.

``audio_{0..511}.tar`` names a set of shards; ``audio__OP_0..511_CL_.tar`` means the same. Reading the headers builds an
index of all members before a run; damaged archives and missing members are errors then, not in the middle of the run.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nest_fn.files.atomic import anything, atomic_write
from nest_fn.files.outputs import begin, claim, finish
from nest_fn.train.errors import DataError
from nest_fn.train.hash_rng import utterance_hashes
from nest_fn.version import versions

from ..audio_files.remote import Remote, held_copy, hold_copy, is_remote, remote
from ..audio_files.remote_cache import Cache
from ..audio_files.wav import Span
from .columns import NumberBuilder, TextBuilder, TextColumn, compact
from .tar import tar_members
from .thread_map import ordered_map

if TYPE_CHECKING:
    from .manifest_table import Manifest

_MAX_SHARDS = 100_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_SUBSEGMENT = re.compile(r"-sub\d+(?=(\.[^./]+)?$)")


def expand_pattern(pattern: str) -> list[str]:
    """``a_{0..2}.tar -> a_0.tar, a_1.tar, a_2.tar``; also ``{x,y}``, and ``_OP_``/``_CL_`` for the braces.

    Raises ``DataError`` for an empty range or more than 100,000 names.
    """
    pattern = pattern.replace("_OP_", "{").replace("_CL_", "}")
    match = _RANGE.search(pattern)
    if not match:
        return [pattern]
    first, last, listed = match.groups()
    if listed is not None:
        parts = listed.split(",")
    else:
        if int(last) < int(first) or int(last) - int(first) >= _MAX_SHARDS:
            raise DataError(f"files {pattern!r}: the range {first}..{last} is empty or above {_MAX_SHARDS}")
        width = len(first) if first.startswith("0") else 0
        parts = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    tails = expand_pattern(pattern[match.end() :])
    if len(parts) * len(tails) > _MAX_SHARDS:
        raise DataError(f"files {pattern!r}: more than {_MAX_SHARDS} names")
    return [pattern[: match.start()] + part + tail for part in parts for tail in tails]


@dataclass(frozen=True)
class ShardIndex:
    """All members of a set of archives. A member's number indexes ``names``, ``shard``, ``start`` and ``size``."""

    paths: tuple[str, ...]
    names: TextColumn
    shard: NDArray[np.int32]
    start: NDArray[Any]  # bytes
    size: NDArray[Any]  # bytes
    hashes: NDArray[np.int64]  # of all names, sorted; two names of one hash are as rare as two utterances of one
    number: NDArray[Any]  # the member's for each of ``hashes``

    def find(self, name: str, shard: int = -1, own: int = -1) -> int:
        """The number of the member ``name``, in any shard or in the given one. Raises ``DataError``.

        Where no shard is given and several have the name, that of shard ``own`` is meant, if there is one.
        """
        if shard >= len(self.paths):
            raise DataError(f"shard_id {shard} asked, there are {len(self.paths)} shards")
        member = name.removeprefix("./")
        for candidate in (member, _SUBSEGMENT.sub("", member)):
            found = [n for n in self._named(candidate) if shard < 0 or self.shard[n] == shard]
            if len(found) > 1:
                raise DataError(f"member {candidate!r} is in several shards; give its shard_id")
            if found:
                return found[0]
        place = f"shard {self.paths[shard]}" if shard >= 0 else f"any of {len(self.paths)} shards"
        raise DataError(f"member {name!r} is not in {place}; make the shards anew")

    def find_clear(self, names: Sequence[str], shard: Sequence[int]) -> NDArray[np.int64]:
        """``find`` for many names ``[n]``; -1 where it must say what is wrong, or look twice."""
        wanted = utterance_hashes(name.removeprefix("./") for name in names)
        if not len(self.names) or not len(wanted):
            return np.full(len(wanted), -1, np.int64)
        first, last = np.searchsorted(self.hashes, wanted), np.searchsorted(self.hashes, wanted, side="right")
        found = self.number[np.minimum(first, len(self.number) - 1)].astype(np.int64)
        given = np.array(shard)
        return np.where((last - first == 1) & ((given < 0) | (self.shard[found] == given)), found, -1)

    def span(self, number: int) -> Span:
        """The byte range of a member."""
        path = self.paths[self.shard[number]]
        return Span(path, int(self.start[number]), int(self.size[number]), self.names[number])

    def _named(self, name: str) -> list[int]:
        """The numbers of all members of this name."""
        wanted = utterance_hashes([name])
        first, last = np.searchsorted(self.hashes, wanted), np.searchsorted(self.hashes, wanted, side="right")
        found: list[int] = self.number[first[0] : last[0]].tolist()
        return found


def index_shards(patterns: Sequence[str], workers: int = 4, cache: Cache | str | Path | None = None) -> ShardIndex:
    """Read the headers of all archives; those at an address are fetched into ``cache``, and stay there while it lives.

    Raises ``DataError`` for the first damaged one.
    """
    paths = [path for pattern in patterns for path in expand_pattern(pattern)]
    if not paths:
        raise DataError("shards: no archive is named")
    held = dict(zip(paths, ordered_map(lambda one: _held(one, cache), paths, workers=workers), strict=True))
    paths = [held[path][0] for path in paths]
    names, hashes, shard = TextBuilder(), NumberBuilder(np.int64), NumberBuilder(np.int32)
    start, size = NumberBuilder(np.int64), NumberBuilder(np.int64)
    for number, members in enumerate(ordered_map(tar_members, paths, workers=workers)):
        names.extend([member.name for member in members])
        hashes.extend(utterance_hashes(member.name for member in members))
        shard.extend([number] * len(members))
        start.extend([member.start for member in members])
        size.extend([member.size for member in members])
    unsorted = hashes.column().astype(np.int64)
    order = np.argsort(unsorted, kind="stable")
    columns = shard.column(), start.column(), size.column()
    index = ShardIndex(tuple(paths), names.column(), *columns, unsorted[order], compact(order))
    for _, file in held.values():  # an open copy stays in the cache
        if file is not None:
            weakref.finalize(index, file.close)
    return index


def _held(path: str, cache: Cache | str | Path | None) -> tuple[str, BinaryIO | None]:
    return hold_copy(remote(path, cache)) if is_remote(path) else (path, None)


def write_shards(manifest: Manifest, out_dir: str | Path, shards: int, *, overwrite: bool = False) -> Path:
    """Pack a manifest's audio into ``audio_{0..shards-1}.tar`` and write a ``manifest.jsonl`` with ``shard_id``.

    Files keep their bytes and their order; all segments of a file go to one shard, and shards have nearly equal sizes.
    The archives depend only on the content: they hold no times and no owners. Returns the new manifest's path. Raises
    ``DataError``, ``OutputError``.
    """
    groups: dict[str, list[int]] = {}
    for index in range(len(manifest)):
        groups.setdefault(str(manifest.source(index)), []).append(index)
    if not 1 <= shards <= len(groups):
        raise DataError(f"shard: {shards} shards asked of {len(groups)} audio files; ask 1 to {len(groups)}")
    folder, listing = Path(out_dir), Path(out_dir) / "manifest.jsonl"
    origin = {"command": "data shard", "data": manifest.digest, "shards": shards, **versions()}
    place = claim(folder, origin, folder=True, inputs=manifest.files, overwrite=overwrite)
    if place.done:
        return listing
    files = list(groups.values())
    cuts = even_cuts([_archived(manifest, indices[0]) for indices in files], shards)
    names = [f"audio_{number}.tar" for number in range(shards)] + [listing.name]
    begin(place, names)
    lines: list[str] = []
    for number, (first, last) in enumerate(pairwise(cuts)):
        lines += _write_shard(manifest, files[first:last], folder / f"audio_{number}.tar", number)
    with atomic_write(listing, 0, replaces=anything) as temporary:
        temporary.write_bytes("".join(lines).encode("utf-8"))
    finish(place, names)
    return listing


def even_cuts(sizes: Sequence[int], parts: int) -> list[int]:
    """Cut points (``parts + 1`` indices) that divide a list of sizes into nonempty parts with nearly equal sums.

    If no size exceeds the average of a part's sum, each sum differs from that average by at most the largest size.
    """
    sums = np.cumsum([0, *sizes], dtype=np.int64)
    target = sums[-1] * (np.arange(1, parts) / parts)
    above = np.searchsorted(sums, target)
    nearest = np.where(target - sums[above - 1] < sums[above] - target, above - 1, above)
    cuts = [0]
    for part, cut in enumerate(nearest.tolist(), 1):
        cuts.append(min(max(cut, cuts[-1] + 1), len(sizes) - parts + part))
    return [*cuts, len(sizes)]


def _archived(manifest: Manifest, index: int) -> int:
    """Bytes that an utterance's file takes in an archive: a header block, and the content padded to whole blocks."""
    source = manifest.source(index)
    try:
        if isinstance(source, Remote):
            with held_copy(source) as path:
                size = os.stat(path).st_size
        else:
            size = source.size if isinstance(source, Span) else os.stat(source).st_size
    except OSError as error:
        raise DataError(f"{manifest.where(index)}: {source}: {error.strerror or error}") from error
    return tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def _write_shard(manifest: Manifest, files: list[list[int]], path: Path, number: int) -> list[str]:
    """Write one archive; return the manifest lines of its utterances."""
    lines = []
    with (
        atomic_write(path, 0, replaces=anything) as temporary,
        tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for indices in files:
            name = _member_name(manifest, indices[0])
            data = manifest.read_bytes(indices[0])
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            archive.addfile(info, io.BytesIO(data))
            for index in indices:
                fields = {k: v for k, v in manifest.fields(index).items() if k != "audio_filename"}
                fields |= {"audio_filepath": name, "duration": float(manifest.duration[index]), "shard_id": number}
                lines.append(json.dumps(fields) + "\n")
    return lines


def _member_name(manifest: Manifest, index: int) -> str:
    """The audio's path relative to the manifest, or a name made of its hash if that path would leave the archive."""
    path = manifest.relative_path(index)
    if not os.path.isabs(path) and ".." not in path.split("/") and not is_remote(path):
        return path
    return f"{manifest.utterance[index]:016x}{Path(path).suffix}"

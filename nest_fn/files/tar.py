"""Positions of the members of a tar archive, read by Python's ``tarfile``; nothing is extracted.

Links, devices, sparse files, absolute names, names with ``..``, duplicates and damaged or truncated archives are
refused. The checks here are needed because ``tarfile`` treats a damaged header as the end of the archive.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from .inputs import other_format

_KINDS = {
    tarfile.LNKTYPE: "a hard link", tarfile.SYMTYPE: "a symbolic link", tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe",
}  # fmt: skip


class TarError(ValueError):
    """An archive that is damaged or contains something other than regular files."""


class Member(NamedTuple):
    """One regular file in an archive, at the bytes ``[start, start + size)`` of the archive."""

    name: str
    start: int
    size: int


def tar_members(file: BinaryIO) -> list[Member]:
    """List the regular files of an archive, in order. Raises ``TarError`` for other members and damaged archives."""
    members: dict[str, Member] = {}
    for info in _headers(file, file.seek(0, os.SEEK_END)):
        name = _safe(info.name)
        if info.isdir():
            continue
        if info.issparse():
            raise TarError(f"tar member {name!r} is a sparse file, only plain files are read")
        if not info.isreg():
            kind = _KINDS.get(info.type, f"of type {info.type!r}")
            raise TarError(f"tar member {name!r} is {kind}, only plain files are read")
        if name in members:
            raise TarError(f"tar member {name!r} comes twice")
        members[name] = Member(name, info.offset_data, info.size)
    return list(members.values())


def _headers(file: BinaryIO, total: int) -> Iterator[tarfile.TarInfo]:
    """Iterate over the headers of an archive of ``total`` bytes, up to the block of zeros at its end."""
    file.seek(0)
    if (found := other_format(file.read(8))) is not None:
        raise TarError(f"tar archive is {found}, so that members cannot be read in place: unpack it")
    file.seek(0)
    if total == 0:
        raise TarError("tar archive is cut at byte 0: its end mark is missing")
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as archive:
            position = 0
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them for lookups by name
                if info.offset < position or info.size < 0:
                    raise TarError(f"tar header at byte {info.offset} has a negative size")
                position = info.offset_data + info.size
                if position > total:
                    raise TarError(
                        f"tar archive is cut: {info.name!r} wants bytes up to {position}, the file has {total}"
                    )
                yield info
            end = archive.offset
    except TarError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise TarError(f"tar archive is damaged or cut: {error}") from error
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise TarError(f"tar archive is cut at byte {end + len(block)}: its end mark is missing")
    if any(block):
        raise TarError(f"tar header at byte {end} has a wrong checksum")


def _safe(name: str) -> str:
    """Normalise a member's name and check that it stays inside the archive."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name:
        raise TarError(f"tar member {name!r} points outside of the archive")
    return "/".join(parts)

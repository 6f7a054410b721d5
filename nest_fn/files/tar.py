"""Where the members of a tar archive are: its headers walked without extracting anything.

Read are the formats of POSIX (ustar, pax) and GNU (long names). Refused are links, devices, sparse files, absolute
names, names with ``..``, duplicates, wrong checksums, and archives that end early. Every step is bounded by the size
of the file.
"""

from __future__ import annotations

import os
from typing import BinaryIO, NamedTuple

_BLOCK = 512
_MAX_NAME = 1 << 16  # bytes of an extended header
_REGULAR = (b"0", b"\0", b"7")
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}


class TarError(ValueError):
    """An archive that is damaged, or holds something else than plain files."""


class Member(NamedTuple):
    """One regular file in an archive: bytes ``[start, start + size)`` of it."""

    name: str
    start: int
    size: int


def tar_members(file: BinaryIO) -> list[Member]:
    """The regular files of an archive, in order. Raises ``TarError`` on anything that is not plain and whole."""
    return _walk(file, file.seek(0, os.SEEK_END))


def _walk(file: BinaryIO, total: int) -> list[Member]:
    """Header after header up to the block of zeros that ends an archive."""
    members: list[Member] = []
    seen: set[str] = set()
    extended: dict[str, str] = {}
    position = 0
    while True:
        file.seek(position)
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise TarError(f"tar archive is cut at byte {position + len(block)}: its end mark is missing")
        if not any(block):
            return members
        kind, name, size = _header(block, position)
        start = position + _BLOCK
        if kind not in b"xLg" and "size" in extended:
            size = _decimal(extended["size"], "size")
        position = start + -(-size // _BLOCK) * _BLOCK
        if start + size > total:
            raise TarError(f"tar archive is cut: {name!r} wants bytes up to {start + size}, the file has {total}")
        if kind in (b"x", b"L", b"g"):
            records = _extension(file.read(size) if size <= _MAX_NAME else None, kind, name)
            extended = extended if kind == b"g" else extended | records
            continue
        name = _safe(extended.get("path", name))
        extended = {}
        if kind == b"5":
            continue
        if kind not in _REGULAR:
            raise TarError(f"tar member {name!r} is {_KINDS.get(kind, f'of type {kind!r}')}, only plain files are read")
        if name in seen:
            raise TarError(f"tar member {name!r} comes twice")
        seen.add(name)
        members.append(Member(name, start, size))


def _header(block: bytes, position: int) -> tuple[bytes, str, int]:
    """Type, name and size of one member."""
    stored = _number(block[148:156], "checksum")
    if stored != sum(block) - sum(block[148:156]) + 8 * 32:
        raise TarError(f"tar header at byte {position} has a wrong checksum")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return block[156:157], name, _number(block[124:136], "size")


def _number(raw: bytes, what: str) -> int:
    """An octal number, or a binary one where the first bit is set."""
    if raw[0] & 0x80:
        if raw[0] != 0x80:
            raise TarError(f"tar header: {what} is negative or too large")
        return int.from_bytes(raw[1:], "big")
    digits = raw.strip(b" \0")
    if not all(48 <= digit < 56 for digit in digits):
        raise TarError(f"tar header: {what} {raw!r} is not an octal number")
    return int(digits or b"0", 8)


def _extension(body: bytes | None, kind: bytes, name: str) -> dict[str, str]:
    """What an extended header says of the next member."""
    if body is None:
        raise TarError(f"tar header {name!r} is longer than {_MAX_NAME} bytes")
    if kind == b"L":
        return {"path": _text(body)}
    records: dict[str, str] = {}
    while body:
        head, _, _ = body.partition(b" ")
        length = _decimal(head.decode("ascii", "replace"), "length of a pax record")
        record = body[len(head) + 1 : length]
        key, mark, value = record.partition(b"=")
        if length <= len(head) + 1 or length > len(body) or not mark or not record.endswith(b"\n"):
            raise TarError("tar header: a pax record is malformed")
        if key in (b"path", b"size"):
            records[key.decode()] = _decoded(value[:-1])
        elif key.startswith(b"GNU.sparse"):
            raise TarError("tar member is a sparse file, only plain files are read")
        body = body[length:]
    return records


def _decimal(text: str, what: str) -> int:
    """A decimal number of at most 18 digits."""
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise TarError(f"tar header: {what} {text!r} is not a number")
    return int(text)


def _text(raw: bytes) -> str:
    """Bytes up to the first zero."""
    return _decoded(raw.partition(b"\0")[0])


def _decoded(raw: bytes) -> str:
    """UTF-8, with other bytes kept as Python keeps them in file names."""
    return raw.decode("utf-8", "surrogateescape")


def _safe(name: str) -> str:
    """A name relative to the archive, without ``./``."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith(("/", "\\")) or ".." in parts or "\0" in name:
        raise TarError(f"tar member {name!r} points outside of the archive")
    return "/".join(parts)

"""Opening the user's files for reading: regular files only, so that a command never blocks on a pipe."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


_OTHERS = {
    b"\x1f\x8b": "compressed by gzip",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\0": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PK\x03\x04": "a ZIP archive",
    b"PAR1": "a Parquet file",
}


def other_format(content: bytes) -> str | None:
    """What a file is that begins with ``content``, if it is compressed or an archive where a plain file is wanted."""
    return next((name for magic, name in _OTHERS.items() if content.startswith(magic)), None)


def open_plain(path: str | Path) -> io.BufferedReader:
    """Open a regular file for reading bytes. Raises ``OSError`` for anything else, without reading from it."""
    path = os.fspath(path)  # os.open would take an int for a file descriptor
    try:
        _refuse(os.stat(path).st_mode, path)  # before opening it: opening a device may have side effects
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null byte, or a lone surrogate
        raise OSError(errno.EINVAL, f"is no file's name ({error})", ascii(path)) from error
    try:
        _refuse(os.fstat(descriptor).st_mode, path)  # the file may have been replaced since
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: str | Path) -> bytes:
    """Read all bytes of a regular file. Raises ``OSError``."""
    with open_plain(path) as file:
        return file.read()


def _refuse(mode: int, path: str | Path) -> None:
    kind = stat.S_IFMT(mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"is {_KINDS.get(kind, 'no file')}, a plain file is wanted", str(path))

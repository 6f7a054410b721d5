"""Files of the user's opened for reading: plain ones only, so that a pipe never makes a command wait."""

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


def open_plain(path: str | Path) -> io.BufferedReader:
    """The file open for reading bytes. Raises ``OSError`` for what is no plain file, before anything of it is read."""
    path = os.fspath(path)  # a number would be taken for an open file
    try:
        _refuse(os.stat(path).st_mode, path)  # before it is opened: opening a device may do something
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a null byte, or a lone surrogate
        raise OSError(errno.EINVAL, f"is no file's name ({error})", ascii(path)) from error
    try:
        _refuse(os.fstat(descriptor).st_mode, path)  # another file may have its name by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: str | Path) -> bytes:
    """All bytes of a plain file. Raises ``OSError``."""
    with open_plain(path) as file:
        return file.read()


def _refuse(mode: int, path: str | Path) -> None:
    kind = stat.S_IFMT(mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"is {_KINDS.get(kind, 'no file')}, a plain file is wanted", str(path))

"""One writer per folder: a lock that the operating system releases when its holder ends, however it ends.

The existence of a lock file proves nothing: its writer may have been killed, on this machine or on one that is gone,
and process ids are reused, in containers immediately. The lock is therefore held on an open file (``flock``; over NFS
the server holds it). On a file system without locks, ``take`` always succeeds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from .inputs import open_plain

_HOLDER = b"process "  # how a holder's description begins
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Lock:
    """A lock file that at most one process holds; its content describes the holder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def take(self) -> str | None:
        """Try to take the lock: None on success, else its holder, ``process 4321 on HOST``. Raises ``OSError``."""
        while True:
            file = open(self.path, "a+")  # noqa: SIM115 - it stays open while the lock is held
            try:
                if not _locked(file):
                    file.seek(0)
                    holder = file.read()
                    file.close()
                    return holder or "another process"
                if self._is_named(file):
                    file.truncate(0)
                    file.write(f"{_HOLDER.decode()}{os.getpid()} on {socket.gethostname()}")
                    file.flush()
                    self._file = file
                    return None
            except BaseException:
                file.close()
                raise
            file.close()  # its last holder removed it after we opened it: try again with the new file

    def is_ours(self) -> bool:
        """Whether the file exists and was written by this class, whether or not its holder is alive."""
        try:
            with open_plain(self.path) as file:
                return file.read(len(_HOLDER)) == _HOLDER
        except OSError:
            return False

    def release(self) -> None:
        """Release the lock if we hold it. A file that cannot be removed stays and blocks nobody."""
        if self._file is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
            self._file.close()
            self._file = None

    def _is_named(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except FileNotFoundError:
            return False


def holder(path: Path) -> str | None:
    """The current holder of the lock at ``path``, as ``Lock.take`` describes it; None if it is free."""
    try:
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read() or "another process"
    except OSError:
        return None
    return None


def _locked(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True

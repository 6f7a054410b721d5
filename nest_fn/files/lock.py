"""One writer a folder: a lock that the operating system gives back when its holder ends, however it ends.

A file that is there says nothing: its writer may have been killed, on this machine or on one that is gone, and numbers
of processes come again, in containers at once. What is locked is an open file (``flock``; over NFS the server keeps
it). On a file system that knows no locks everybody gets one.
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

_HOLDER = b"process "  # how a holder's name begins
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Lock:
    """A file that at most one process holds, and in which it says who it is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def take(self) -> str | None:
        """None if it is ours now, else who has it: ``process 4321 on HOST``. Raises ``OSError``."""
        while True:
            file = open(self.path, "a+")  # noqa: SIM115 - it is to stay open
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
            file.close()  # its former holder removed it between our opening and our locking: there is another by now

    def is_ours(self) -> bool:
        """Whether a file is there that a holder wrote, alive or not."""
        try:
            with open_plain(self.path) as file:
                return file.read(len(_HOLDER)) == _HOLDER
        except OSError:
            return False

    def release(self) -> None:
        """Give it back, if it is ours. A file that cannot be removed stays, and stops nobody."""
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
    """Who has the lock at ``path`` now, in words; None if nobody has."""
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

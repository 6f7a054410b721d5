"""Lines at the end of a file: each is whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def append_whole(path: Path, data: bytes) -> None:
    """Append ``data``, flushed; all of it or nothing. Raises ``OSError`` with the file's name."""
    with open(path, "ab", buffering=0) as file:
        start = file.tell()
        if (file.write(data) or 0) < len(data):  # a disk that is full takes what it can
            file.truncate(start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

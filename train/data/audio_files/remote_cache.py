"""The folder of copies of remote files: bounded, and safe for many readers on a machine or a shared file system.

A reader holds a copy by a shared lock of the operating system on the open file; a copy is removed only under an
exclusive one, so that no copy goes while it is read. Of those that nobody holds, the least recently used go first. Only
files that this module named are ever removed: ``ab/abcd..._NAME``, after the SHA-256 of the address, in a folder of its
first two digits. Where the file system has no locks, nothing is removed.

Here alone the time of a file's last use is read: it decides which copies are fetched again, and no result.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nest_fn.files.inputs import open_plain

_NAME = re.compile(r"[0-9a-f]{32}_[A-Za-z0-9._-]*")
_FOLDER = re.compile(r"[0-9a-f]{2}")
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_ROOM = 0.9  # of the bound is left filled when copies are removed, so that this happens rarely


class Cache(NamedTuple):
    """Where copies are kept, and how many bytes of them; None: without a bound."""

    folder: Path
    limit: int | None = None


def copy_path(cache: Cache, url: str) -> Path:
    """The place of the copy of the file at an address."""
    digest = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rstrip("/").rpartition("/")[2])[-80:]
    return cache.folder / digest[:2] / f"{digest[:32]}_{name}"


def hold(path: Path) -> BinaryIO | None:
    """Open a copy and hold it until it is closed; None if it is not there. Counts as its use. Raises ``OSError``."""
    while True:
        try:
            file = open_plain(path)
        except FileNotFoundError:
            return None
        _lock(file, fcntl.LOCK_SH)
        if _is_named(file, path):
            with suppress(OSError):  # of another user
                os.utime(path)
            return file
        file.close()  # it was removed before we held it


@contextmanager
def alone(place: Path) -> Iterator[None]:
    """Wait until nobody else is at work at ``place``, and keep others away from it while the block runs."""
    path = place.with_name(f".{place.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(path, "ab")  # noqa: SIM115 - it stays open while the lock is held
        _lock(file, fcntl.LOCK_EX)
        if _is_named(file, path):
            break
        file.close()  # who held it removed it
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        file.close()


def make_room(cache: Cache, size: int) -> None:
    """Count ``size`` bytes more, and remove copies that nobody holds, the least recently used first, if need be."""
    if cache.limit is None:
        return
    counter = cache.folder / ".nest_fn_bytes"
    with alone(counter):
        counted = _count(counter)
        if counted is None or counted + size > cache.limit:
            counted = _remove_oldest(cache.folder, int(_ROOM * cache.limit) - size, cache.limit - size)
        with suppress(OSError):
            counter.write_text(str(counted + size))


def _count(counter: Path) -> int | None:
    """Bytes of all copies, at least; None if it is not known."""
    try:
        return int(counter.read_text()[:30])
    except (OSError, ValueError):
        return None


def _remove_oldest(folder: Path, least: int, most: int) -> int:
    """Remove copies until ``least`` bytes are left, if there are more than ``most``; the bytes that are left."""
    found = sorted(_copies(folder))
    total = sum(size for _, _, size in found)
    if total <= most:
        return total
    for _, path, size in found:
        if total <= least:
            break
        if _remove(path):
            total -= size
    return total


def _copies(folder: Path) -> Iterator[tuple[int, str, int]]:
    """The last use, path and bytes of every copy."""
    for inner in os.scandir(folder):
        if _FOLDER.fullmatch(inner.name) and inner.is_dir(follow_symlinks=False):
            for entry in os.scandir(inner.path):
                ours = _NAME.fullmatch(entry.name) and entry.name.startswith(inner.name)
                if ours and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        facts = entry.stat(follow_symlinks=False)
                        yield facts.st_mtime_ns, entry.path, facts.st_size


def _remove(path: str) -> bool:
    """Remove a copy unless somebody holds it; whether it is gone."""
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:  # held, not ours to remove, or a file system without locks
        return False
    return True


def _lock(file: BinaryIO, kind: int) -> None:
    try:
        fcntl.flock(file, kind)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            raise


def _is_named(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False

"""Files and folders that appear whole or not at all: written beside their place, flushed, then renamed.

What stands at the place already is refused, unless the caller says of it that it may be replaced.

A writer that dies leaves ``.NAME.PID.tmp`` behind (with the suffix of a file), and the old version in its place. While
one folder takes another's place there is a moment without either under the name: the old one waits as ``.NAME.old``
until the new one is there. ``last_complete`` finds it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nest_fn.errors import CheckpointError, OutputError

Replaces = Callable[[Path], str | None]
"""Whether what stands at a path may give way: None, or why it may not."""

_SPARE = 1 << 20  # bytes to leave free for what stands beside the tensors
_TEMPORARY = re.compile(r"\..*\.\d+\.tmp(\.\w+)?")


@contextmanager
def atomic_write(path: str | Path, size: int, folder: bool = False, replaces: Replaces | None = None) -> Iterator[Path]:
    """A path to write a file (or a folder of files) to, which takes the place of ``path`` when the block ends well.

    ``size`` is how many bytes will be written. ``replaces`` judges what stands at ``path``; without it nothing may.
    Raises ``OutputError`` for what may not give way, ``CheckpointError`` if the bytes are not free and if writing
    fails; what was written is then removed, and what stood at ``path`` stays.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" + ("" if folder else path.suffix))
    try:
        _check_place(path, size, folder, replaces)
        remove(temporary)
        if folder:
            temporary.mkdir()
        yield temporary
        _flush(temporary)
        _check_free(path, replaces)  # somebody may have come meanwhile
        _move(temporary, path, replaces)
    except BaseException as error:
        remove(temporary, strict=False)
        if isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError":
            raise CheckpointError(
                f"{path}: cannot be written: {_reason(error)}; what was there is unchanged."
            ) from error
        raise


def last_complete(path: str | Path) -> Path:
    """``path``, or its former version where a writer died between taking that away and putting the new one there."""
    path = Path(path)
    return path if path.exists() or not _old(path).is_dir() else _old(path)


def remove(path: Path, strict: bool = True) -> None:
    """Remove a file or a folder, if it is there; ``strict=False`` does what it can."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=not strict)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        if strict:
            raise


def is_temporary(name: str) -> bool:
    """Whether a name is that of a file or folder which a killed writer left."""
    return _TEMPORARY.fullmatch(name) is not None


def anything(path: Path) -> None:
    """For ``replaces``: what stands in a folder of our own, under a name of our own."""


def _check_free(path: Path, replaces: Replaces | None) -> None:
    if not os.path.lexists(path):
        return
    reason = "is there already" if replaces is None else "is a link" if path.is_symlink() else replaces(path)
    if reason is not None:
        raise OutputError(f"{path}: {reason}; nothing there was touched: choose another name.")


def _check_place(path: Path, size: int, folder: bool, replaces: Replaces | None) -> None:
    if path.exists() and path.is_dir() != folder:
        kinds = ("a folder", "a file") if folder else ("a file", "a folder")
        raise OutputError(f"{path}: is {kinds[1]}, and {kinds[0]} was to be written; choose another name.")
    _check_free(path, replaces)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < size + _SPARE:
        raise CheckpointError(
            f"{path}: needs {_megabytes(size + _SPARE)}, the disk has {_megabytes(free)} free; free some, or save "
            "elsewhere."
        )


def _flush(path: Path) -> None:
    """Onto the disk: contents first, then the folder that names them."""
    for child in sorted(path.iterdir()) if path.is_dir() else ():
        _flush(child)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(temporary: Path, path: Path, replaces: Replaces | None) -> None:
    """Put ``temporary`` in the place of ``path``. A folder that is not empty cannot be renamed over."""
    old = _old(path)
    if path.is_dir():
        if not _half_removed(old, path):
            _check_free(old, replaces)
        remove(old)
        path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            old.rename(path)
            raise
    else:
        os.replace(temporary, path)
    _sync(path.parent)
    if replaces is not None and old.is_dir() and replaces(old) is None:
        remove(old, strict=False)


def _half_removed(old: Path, path: Path) -> bool:
    """Whether ``old`` is what a writer left that died while it removed the former version of ``path``."""
    return old.is_dir() and {entry.name for entry in old.iterdir()} <= {entry.name for entry in path.iterdir()}


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _reason(error: BaseException) -> str:
    """The system's words, without the stack of a C++ library behind them."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    cause = error.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    number = re.search(r"\(os error (\d+)\)", str(error))  # so safetensors quotes the system
    return os.strerror(int(number[1])) if number else str(error).partition("\n")[0][:300]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.{1 if size < 1e8 else 0}f} MB"

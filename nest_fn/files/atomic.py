"""Atomic writes: files and folders are written under a temporary name, flushed to disk, then renamed.

A path that exists already is refused unless the caller allows its replacement.

A writer that dies leaves ``.NAME.PID.tmp`` behind (with the suffix of a file), and the old version at its path.
Replacing a folder takes two renames: between them the path does not exist, and the old version is at ``.NAME.old``,
where ``last_complete`` finds it.
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
"""Decides whether what exists at a path may be replaced: None if it may, else the reason why not."""

_SPARE = 1 << 20  # bytes that must be free for files other than the tensors
_TEMPORARY = re.compile(r"\..*\.\d+\.tmp(\.\w+)?")


@contextmanager
def atomic_write(path: str | Path, size: int, folder: bool = False, replaces: Replaces | None = None) -> Iterator[Path]:
    """A temporary path for a file (or a folder of files), which is renamed to ``path`` when the block succeeds.

    ``size`` is the number of bytes to be written. ``replaces`` decides whether an existing ``path`` may be replaced;
    without it none may. Raises ``OutputError`` if ``path`` may not be replaced, ``CheckpointError`` if the disk has not
    enough free bytes or writing fails; then what was written is removed and ``path`` is unchanged.
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
        _check_free(path, replaces)  # the path may have been created meanwhile
        _move(temporary, path, replaces)
    except BaseException as error:
        remove(temporary, strict=False)
        if isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError":
            raise CheckpointError(
                f"{path}: cannot be written: {_reason(error)}; what was there is unchanged."
            ) from error
        raise


def last_complete(path: str | Path) -> Path:
    """``path``, or the old version of a folder if a writer died between the two renames that replace it."""
    path = Path(path)
    return path if path.exists() or not _old(path).is_dir() else _old(path)


def remove(path: Path, strict: bool = True) -> None:
    """Remove a file or a folder if it exists; ``strict=False`` ignores errors, which are ``OSError``."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=not strict)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError:
        if strict:
            raise


def is_temporary(name: str) -> bool:
    """Whether a name is that of a temporary file or folder, as a killed writer leaves it."""
    return _TEMPORARY.fullmatch(name) is not None


def anything(path: Path) -> None:
    """A ``replaces`` that allows everything, for paths inside folders that this library manages."""


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
    """Flush to disk: first the contents of a folder, then the folder."""
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
    """Rename ``temporary`` to ``path``; a folder there is renamed first, as a rename cannot replace it."""
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
    """Whether ``old`` is a former version of ``path`` that a writer was removing when it died."""
    return old.is_dir() and {entry.name for entry in old.iterdir()} <= {entry.name for entry in path.iterdir()}


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _reason(error: BaseException) -> str:
    """The operating system's message, without the stack trace that a C++ library appends."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    cause = error.__context__
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    number = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors quotes the operating system
    return os.strerror(int(number[1])) if number else str(error).partition("\n")[0][:300]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.{1 if size < 1e8 else 0}f} MB"

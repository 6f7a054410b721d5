"""Files and folders that appear whole or not at all: written beside their place, flushed, then renamed.

A writer that dies leaves ``.NAME.PID.tmp`` behind (with the suffix of a file), and the old version in its place. There
is one moment at which a folder is nowhere: the old one waits as ``.NAME.old`` until the new one is there. ``present``
finds it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nest_fn.errors import CheckpointError

_SPARE = 1 << 20  # bytes to leave free for what stands beside the tensors


@contextmanager
def replacing(path: str | Path, room: int, folder: bool = False) -> Iterator[Path]:
    """A path to write a file (or a folder of files) to, which takes the place of ``path`` when the block ends well.

    ``room`` is how many bytes will be written. Raises ``CheckpointError`` if they are not free and if writing fails;
    what was written is then removed, and what stood at ``path`` stays.
    """
    path = Path(os.path.abspath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" + ("" if folder else path.suffix))
    try:
        _check_place(path, room, folder)
        remove(temporary)
        if folder:
            temporary.mkdir()
        yield temporary
        _flush(temporary)
        _move(temporary, path)
    except BaseException as error:
        remove(temporary, strict=False)
        if isinstance(error, OSError | RuntimeError) or type(error).__name__ == "SafetensorError":
            raise CheckpointError(
                f"{path}: cannot be written: {_reason(error)}; what was there is unchanged."
            ) from error
        raise


def present(path: str | Path) -> Path:
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


def _check_place(path: Path, room: int, folder: bool) -> None:
    if path.exists() and path.is_dir() != folder:
        kinds = ("a folder", "a file") if folder else ("a file", "a folder")
        raise CheckpointError(f"{path}: is {kinds[1]}, and {kinds[0]} was to be written; choose another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < room + _SPARE:
        raise CheckpointError(
            f"{path}: needs {_megabytes(room + _SPARE)}, the disk has {_megabytes(free)} free; make room, or save "
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


def _move(temporary: Path, path: Path) -> None:
    """Put ``temporary`` in the place of ``path``. A folder that is not empty cannot be renamed over."""
    old = _old(path)
    if path.is_dir():
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
    remove(old, strict=False)


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

"""Files at an address with a scheme (https, s3, gs, hf, ...): fetched by fsspec into a local folder, and kept.

An audio file at an address is taken for unchanging: a copy that is there is used. Copies appear whole or not at all,
and those not used for longest go when there are too many (``remote_cache.py``). Manifests are fetched anew each time,
into memory.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from nest_fn.extras import load_extra
from nest_fn.files.atomic import anything, atomic_write
from nest_fn.train.errors import CheckpointError, DataError, UsageError

from .remote_cache import Cache, alone, copy_path, hold, make_room

if TYPE_CHECKING:
    from nest_fn.config import DataConfig

A = TypeVar("A")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WAITS = (0.5, 2.0, 8.0)  # seconds before the second, third and fourth attempt
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)  # errors that another attempt would repeat


class _NotFetched(Exception):
    """Carries why a file did not come."""


class Remote(NamedTuple):
    """A file at an address, and where its copy is kept."""

    url: str
    cache: Cache

    def __str__(self) -> str:
        return self.url


def is_remote(path: object) -> bool:
    """Whether a path is an address with a scheme."""
    return isinstance(path, str) and _SCHEME.match(path) is not None


def remote(url: str, cache: Cache | str | Path | None) -> Remote:
    """The file at an address; ``cache`` as in ``as_cache``."""
    return Remote(url, as_cache(cache))


def as_cache(cache: Cache | str | Path | None) -> Cache:
    """A cache, of a folder one without a bound; None: ``~/.cache/nest_fn``."""
    if isinstance(cache, Cache):
        return cache
    return Cache(Path(cache).expanduser() if cache is not None else Path.home() / ".cache" / "nest_fn")


def cache_of(config: DataConfig) -> Cache:
    """The cache that the settings of the data name."""
    limit = None if config.remote_cache_mb is None else int(config.remote_cache_mb * 1e6)
    return as_cache(config.remote_cache)._replace(limit=limit)


@contextmanager
def held_copy(source: Remote, wait: Callable[[float], None] = time.sleep) -> Iterator[str]:
    """The path of a file's copy, fetched if it is not there; it stays while the block runs. Raises as ``hold_copy``."""
    path, file = hold_copy(source, wait)
    with file:
        yield path


def hold_copy(source: Remote, wait: Callable[[float], None] = time.sleep) -> tuple[str, BinaryIO]:
    """The path of a file's copy, fetched if it is not there, and the open file, until whose end the copy stays.

    Raises ``DataError``; without fsspec ``UsageError``.
    """
    path = copy_path(source.cache, source.url)
    held = hold(path)
    return str(path), _attempted(source.url, lambda: _fetched(source, path), wait) if held is None else held


def _fetched(source: Remote, path: Path) -> BinaryIO:
    """Fetch a file, or wait for another who is fetching it; the copy, held."""
    system, place = _system(source.url)
    with alone(path):
        if (held := hold(path)) is not None:
            return held
        for left in path.parent.glob(f".{path.name}.*.tmp*"):  # by one who was killed, for we are alone
            left.unlink(missing_ok=True)
        with atomic_write(path, 0, replaces=anything) as temporary:
            try:
                system.get_file(place, str(temporary))
                size = os.stat(temporary).st_size
                _check_size(size, system, place)
            except Exception as error:
                raise _NotFetched from error  # an OSError would be told as one of writing
            make_room(source.cache, size)
            file = open(temporary, "rb")  # noqa: SIM115 - the caller closes it
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_SH)  # before it has its name, so that nobody removes it first
        return file


def remote_bytes(url: str, wait: Callable[[float], None] = time.sleep) -> bytes:
    """The content of a file at an address. Raises ``DataError``, and ``UsageError`` without fsspec."""

    def fetch() -> bytes:
        system, place = _system(url)
        content = bytes(system.cat_file(place))
        _check_size(len(content), system, place)
        return content

    return _attempted(url, fetch, wait)


def _system(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the place in it. Raises ``UsageError``."""
    try:
        core = load_extra("fsspec.core")
    except ImportError as error:
        raise UsageError(f"{url}: addresses are read through fsspec: {error}") from error
    try:
        made: tuple[Any, str] = core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the package for this scheme is missing, or the scheme is unknown
        raise UsageError(
            f"{url}: fsspec does not read it here: {(str(error).splitlines() or [''])[0][:300]}"
        ) from error
    return made


def _check_size(got: int, system: Any, place: str) -> None:
    size = system.info(place).get("size")
    if size is not None and size != got:
        raise OSError(f"{got} of {size} bytes came")


def _attempted(url: str, fetch: Callable[[], A], wait: Callable[[float], None]) -> A:
    """What ``fetch`` returns, after as many attempts as it takes, four at most. Raises ``DataError``."""
    for pause in (*_WAITS, None):
        try:
            return fetch()
        except (UsageError, CheckpointError):
            raise
        except Exception as error:  # each package has errors of its own
            cause = error.__cause__ if isinstance(error, _NotFetched) and error.__cause__ else error
            reason = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0][:300]}"
            if isinstance(cause, _FINAL):
                raise DataError(f"{url}: {reason}; correct the address") from error
            if pause is None:
                raise DataError(f"{url}: not fetched in {len(_WAITS) + 1} attempts ({reason})") from error
            wait(pause)
    raise AssertionError("the last attempt returns or raises")

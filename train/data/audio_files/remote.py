"""Files at an address with a scheme (https, s3, gs, hf, ...): fetched by fsspec into a local folder, and kept.

An audio file at an address is taken for unchanging: a copy that is there is used. Copies appear whole or not at all,
and nothing removes them. Manifests are fetched anew each time, into memory.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nest_fn.extras import load_extra
from nest_fn.files.atomic import anything, atomic_write
from nest_fn.train.errors import CheckpointError, DataError, UsageError

A = TypeVar("A")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_WAITS = (0.5, 2.0, 8.0)  # seconds before the second, third and fourth attempt
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError)  # errors that another attempt would repeat


class _NotFetched(Exception):
    """Carries why a file did not come."""


class Remote(NamedTuple):
    """A file at an address, and the folder that holds the copy."""

    url: str
    cache: str

    def __str__(self) -> str:
        return self.url


def is_remote(path: object) -> bool:
    """Whether a path is an address with a scheme."""
    return isinstance(path, str) and _SCHEME.match(path) is not None


def remote(url: str, cache: str | Path | None) -> Remote:
    """The file at an address; ``cache=None`` keeps its copy below ``~/.cache/nest_fn``."""
    return Remote(url, str(Path(cache).expanduser() if cache is not None else Path.home() / ".cache" / "nest_fn"))


def local_copy(source: Remote, wait: Callable[[float], None] = time.sleep) -> str:
    """The path of a file's copy, fetched if it is not there. Raises ``DataError``; without fsspec ``UsageError``."""
    digest = hashlib.sha256(source.url.encode("utf-8", "surrogatepass")).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]", "_", source.url.rstrip("/").rpartition("/")[2])[-80:]
    path = Path(source.cache) / digest[:2] / f"{digest[:32]}_{name}"
    if path.exists():
        return str(path)

    def fetch() -> None:
        system, place = _system(source.url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, 0, replaces=anything) as temporary:
            try:
                system.get_file(place, str(temporary))
                _check_size(temporary.stat().st_size, system, place)
            except Exception as error:
                raise _NotFetched from error  # an OSError would be told as one of writing

    _attempted(source.url, fetch, wait)
    return str(path)


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

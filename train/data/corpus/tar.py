"""Lists the members of a tar shard; ``nest_fn.files.tar`` reads the headers."""

from __future__ import annotations

from nest_fn.files import tar
from nest_fn.files.inputs import open_plain
from nest_fn.train.errors import DataError


def tar_members(path: str) -> list[tar.Member]:
    """The regular files of an archive, in order. Raises ``DataError`` for damaged archives and unsupported members."""
    try:
        with open_plain(path) as file:
            return tar.tar_members(file)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except tar.TarError as error:
        raise DataError(f"{path}: {error}; make the shard anew") from error

"""The reference's files: reads and writes ``.nemo`` archives, reads Lightning's ``.ckpt`` (reference 9.2).

    params, state, cfg = read_nemo("ssl_en_nest_large_v1.0.nemo")
    write_nemo("mine.nemo", params, state, cfg)

Nothing is extracted and no code is executed: members are read from the archive in place, and a pickle may contain only
tensors and plain values. Numerics are ``current`` unless ``compat="legacy"`` is given: the published checkpoints were
trained with versions of the reference before 2.5, but later versions load them with the current numerics (reference 0).
"""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nest_fn.checkpoint.model_files import check_trees
from nest_fn.config import Compat, Config, ConfigError
from nest_fn.config.parse.yaml_io import MAX_BYTES, parse
from nest_fn.config.writer import to_text
from nest_fn.errors import CheckpointError
from nest_fn.files.atomic import atomic_write
from nest_fn.files.tar import Member, TarError, tar_members
from nest_fn.files.tensors import opened, read_torch, size_of, tensors_only
from nest_fn.layers.types import Params, State

from . import nemo
from .lightning import to_plain
from .nemo_config import from_reference, to_reference

CONFIG, WEIGHTS = "model_config.yaml", "model_weights.ckpt"
_CHUNK = 1 << 22  # bytes
_MAX_RATIO = 20  # maximum ratio of unpacked to packed size of a gzip archive
_MIN_LIMIT = 1 << 28  # bytes that any archive may unpack to
_WRITER = "nest_fn"  # owner of members in archives that we write


def read_nemo(path: str | Path, compat: Compat | None = None) -> tuple[Params, State, Config]:
    """Read params, state and config of a ``.nemo`` archive, plain or gzip.

    ``compat`` chooses the numerics, see above. Codebooks stay float64; constants and duplicates in the file
    (``decoder_ssl.*``) are ignored. Raises ``CheckpointError`` naming what is missing, damaged, unsafe or unknown.
    """
    source = str(path)
    with opened(path) as raw, _unpacked(raw, source) as archive:
        members = _members(archive, source)
        cfg = from_reference(_config(archive, members[CONFIG], f"{source}: {CONFIG}"), source, compat)
        weights = members[WEIGHTS]
        content = read_torch(_part(archive, weights), f"{source}: {WEIGHTS}")
    return trees_from(content, cfg, source)


def write_nemo(path: str | Path, params: Params, state: State, cfg: Config, *, overwrite: bool = False) -> None:
    """Write an archive that the reference can restore (``EncDecDenoiseMaskedTokenPredModel.restore_from``).

    ``overwrite=True`` replaces an archive that this function wrote. Raises ``OutputError`` if anything else exists at
    ``path``, ``CheckpointError`` if writing fails or the reference lacks a setting that changes its numbers,
    ``ValueError`` if the trees do not match ``cfg``.
    """
    check_trees("write_nemo", params, state, cfg)
    settings = to_text(to_reference(cfg)).encode()
    weights = {name: leaf.detach().cpu().contiguous() for name, leaf in nemo.to_state_dict(params, state, cfg).items()}
    size, replaces = size_of(weights) + len(settings), _own_archive if overwrite else None
    with atomic_write(path, size, replaces=replaces) as temporary, open(temporary, "wb") as file:
        _append(file, CONFIG, lambda: file.write(settings))
        _append(file, WEIGHTS, lambda: torch.save(weights, file))
        file.write(bytes(2 * tarfile.BLOCKSIZE))


def read_lightning(content: Any, source: str, compat: Compat | None = None) -> tuple[Params, State, Config]:
    """Params, state and config from the content of a Lightning ``.ckpt`` that was read with ``STAND_INS``.

    ``compat`` is as in ``read_nemo``. Raises ``CheckpointError``.
    """
    if not isinstance(content, Mapping) or "state_dict" not in content:
        raise CheckpointError(f"{source}: has no 'state_dict', so it is no Lightning checkpoint.")
    settings = to_plain(content.get("hyper_parameters"), source)
    if isinstance(settings, Mapping) and isinstance(settings.get("cfg"), Mapping):
        settings = settings["cfg"]
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{source}: has no config among its 'hyper_parameters'; take the .nemo file instead.")
    return trees_from(content["state_dict"], from_reference(settings, source, compat), source)


def trees_from(state_dict: Any, cfg: Config, source: str) -> tuple[Params, State, Config]:
    """Params, state and config from the reference's ``state_dict``. Raises ``CheckpointError`` listing mismatches."""
    weights = without_wrappers(tensors_only(state_dict, source))
    try:
        return (*nemo.from_state_dict(weights, cfg), cfg)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}.") from error


def without_wrappers(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Names without what ``torch.compile`` and data-parallel modules put into them: ``_orig_mod.`` and ``module.``."""
    return {name.replace("_orig_mod.", "").removeprefix("module."): leaf for name, leaf in weights.items()}


def _members(archive: BinaryIO, source: str) -> dict[str, Member]:
    """Members of the archive by name, including the two that make a model."""
    try:
        members = {member.name: member for member in tar_members(archive)}
    except TarError as error:
        raise CheckpointError(f"{source}: {error}; take another copy.") from error
    for name in (CONFIG, WEIGHTS):
        if name not in members:
            held = ", ".join(sorted(members)[:8]) or "nothing"
            raise CheckpointError(f"{source}: has no '{name}', only {held}; a .nemo file of one model is read here.")
    return members


def _config(archive: BinaryIO, member: Member, source: str) -> Mapping[str, Any]:
    if member.size > MAX_BYTES:
        raise CheckpointError(f"{source}: has {member.size} bytes; a configuration has at most {MAX_BYTES}.")
    archive.seek(member.start)
    try:
        settings = parse(archive.read(member.size).decode("utf-8-sig"), source)
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(
            str(error) if isinstance(error, ConfigError) else f"{source}: is not UTF-8 text."
        ) from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{source}: holds a {type(settings).__name__}; want a mapping.")
    return settings


@contextmanager
def _unpacked(raw: BinaryIO, source: str) -> Iterator[BinaryIO]:
    """The archive itself or, if it is a gzip file, an unnamed temporary file with its unpacked content."""
    packed = raw.read(2) == b"\x1f\x8b"
    if not packed:
        yield raw
        return
    most = max(_MIN_LIMIT, _MAX_RATIO * raw.seek(0, io.SEEK_END))
    raw.seek(0)
    with tempfile.TemporaryFile() as file:
        try:
            with gzip.GzipFile(fileobj=raw) as content:
                while chunk := content.read(_CHUNK):
                    if file.tell() + len(chunk) > most:
                        raise CheckpointError(f"{source}: unpacks to more than {most} bytes, as no model does.")
                    file.write(chunk)
        except (OSError, EOFError, zlib.error) as error:
            raise CheckpointError(f"{source}: cannot be unpacked: {error}; take another copy.") from error
        yield file


def _own_archive(path: Path) -> str | None:
    """A ``replaces`` of ``atomic_write``: None if ``write_nemo`` wrote the file, else why it is not replaced."""
    try:
        with tarfile.open(path, "r:") as archive:
            ours = all(member.uname == _WRITER for member in archive)
    except (tarfile.TarError, OSError):
        ours = False
    return None if ours else "is there already, and no archive that this library wrote"


def _append(file: BinaryIO, name: str, write: Callable[[], Any]) -> None:
    """Append one member to a tar archive, without a copy: its header is written last, when its size is known."""
    start = file.tell()
    file.write(bytes(tarfile.BLOCKSIZE))
    write()
    info = tarfile.TarInfo(f"./{name}")
    info.size, info.uname = file.tell() - start - tarfile.BLOCKSIZE, _WRITER
    file.write(bytes(-info.size % tarfile.BLOCKSIZE))
    file.seek(start)
    file.write(info.tobuf(tarfile.GNU_FORMAT))
    file.seek(0, io.SEEK_END)


class _Part(io.RawIOBase):
    """A range of bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, member: Member) -> None:
        super().__init__()
        self._file, self._start, self._size, self._at = file, member.start, member.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._at))
        self._file.seek(self._start + self._at)
        content = self._file.read(wanted)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _part(file: BinaryIO, member: Member) -> BinaryIO:
    return io.BufferedReader(_Part(file, member), buffer_size=1 << 16)

"""Named tensors in one file: ``.safetensors`` if that package is installed, else ``.pt``, PyTorch's own format.

Reading either executes no code. A ``.pt`` file is a zip archive with a pickle, which may contain only tensors and plain
values (``weights_only=True``); the CRC of every record is checked too, which ``torch.load`` does not do.
"""

from __future__ import annotations

import importlib
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nest_fn.errors import CheckpointError
from nest_fn.extras import load_extra
from nest_fn.layers.types import Tensor

from .inputs import open_plain

SUFFIXES = (".safetensors", ".pt")
_CHUNK = 1 << 22  # bytes


def usual_suffix() -> str:
    """The suffix of files to write if the user has not chosen one."""
    try:
        _package()
    except ImportError:
        return ".pt"
    return ".safetensors"


def check_writable(path: Path) -> None:
    """Raise ``CheckpointError`` if the suffix needs a package that is not installed."""
    if path.suffix == ".safetensors":
        _safetensors(path)


def size_of(leaves: Mapping[str, Tensor]) -> int:
    """Size of all tensors in bytes."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves.values())


def write_tensors(path: Path, leaves: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors and string metadata, in the format of the suffix of ``path``."""
    own = _with_own_storage(leaves)
    texts = dict(metadata or {})
    if path.suffix == ".safetensors":
        package = _safetensors(path)
        path.touch()
        mode = path.stat().st_mode & 0o777  # that of new files; the package's own is readable by the owner only
        package.torch.save_file(own, path, metadata=texts or None)  # it could not read back an empty dict
        path.chmod(mode)
        return
    with open(path, "wb") as file:
        torch.save({"tensors": own, "metadata": texts}, file)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and metadata that ``write_tensors`` wrote. Raises ``CheckpointError`` naming the file."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    with opened(path) as file:
        content = read_torch(file, str(path))
    if not isinstance(content, dict) or content.keys() != {"tensors", "metadata"}:
        raise CheckpointError(f"{path}: is no file of tensors by name of this library.")
    texts = content["metadata"]
    if not isinstance(texts, dict) or not all(isinstance(text, str) for pair in texts.items() for text in pair):
        raise CheckpointError(f"{path}: its metadata are not texts by name.")
    return tensors_only(content["tensors"], str(path)), texts


def opened(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Raises ``CheckpointError`` if it is missing or cannot be read."""
    try:
        return open_plain(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}.") from error


def tensors_only(mapping: Any, source: str) -> dict[str, Tensor]:
    """Check that a mapping holds dense tensors by name and return them, detached.

    Raises ``CheckpointError`` naming the first entry that is something else.
    """
    if not isinstance(mapping, Mapping):
        raise CheckpointError(f"{source}: wants tensors by name, holds a {type(mapping).__name__}.")
    for name, leaf in mapping.items():
        if not isinstance(name, str) or not isinstance(leaf, Tensor):
            raise CheckpointError(f"{source}: {name!r} is a {type(leaf).__name__}, only tensors by name are read.")
        if leaf.layout != torch.strided or leaf.is_quantized or leaf.device.type != "cpu":
            raise CheckpointError(
                f"{source}: '{name}' is a tensor without plain numbers ({leaf.layout}, {leaf.device})."
            )
    return {name: leaf.detach() for name, leaf in mapping.items()}


def read_torch(file: BinaryIO, source: str, allowed: Mapping[str, type] | None = None) -> Any:
    """Read what ``torch.save`` wrote, onto the CPU: tensors, plain values, and the classes ``allowed`` by name.

    Raises ``CheckpointError`` if the pickle names any other class, for damaged files and for formats before PyTorch
    1.6.
    """
    _check_records(file, source)
    known: list[Any] = [(stand_in, name) for name, stand_in in (allowed or {}).items()]
    names: AbstractContextManager[Any] = torch.serialization.safe_globals(known) if known else nullcontext()
    try:
        with names:
            file.seek(0)
            foreign = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
            if not foreign:
                file.seek(0)
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise any exception; none is ours
        raise CheckpointError(f"{source}: is damaged: {type(error).__name__}: {_first_line(error)}") from error
    shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
    raise CheckpointError(
        f"{source}: its pickle names {shown}, which could run code when read; only tensors and plain values are read."
    )


def _check_records(file: BinaryIO, source: str) -> None:
    """Raise ``CheckpointError`` unless all records are stored as PyTorch stores them and match their CRC."""
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise CheckpointError(f"{source}: is no file of torch.save, or one from before PyTorch 1.6.")
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
                    raise CheckpointError(
                        f"{source}: record '{record.filename}' is packed; torch.save never does that."
                    )
                if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                    raise CheckpointError(f"{source}: was written on a big-endian machine; save it anew on another.")
                with archive.open(record) as content:
                    while content.read(_CHUNK):  # the CRC is checked at the end
                        pass
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many kinds of errors for damaged files
        raise CheckpointError(f"{source}: is damaged or cut short: {_first_line(error)}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    package = _safetensors(path)
    with opened(path):
        pass
    try:
        with package.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # its own errors, and those of JSON for a damaged header
        raise CheckpointError(f"{path}: is damaged or cut short: {_first_line(error)}") from error


def _safetensors(path: Path) -> Any:
    try:
        return _package()
    except ImportError as error:
        raise CheckpointError(f"{path}: {error}; or use .pt.") from error


def _package() -> Any:
    package = load_extra("safetensors")
    importlib.import_module("safetensors.torch")  # makes it available as an attribute of the package
    return package


def _with_own_storage(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, contiguous, each with its own storage: saving a view would save its whole storage."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, leaf in leaves.items():
        leaf = leaf.detach().to("cpu").contiguous()
        storage = leaf.untyped_storage()
        if storage.nbytes() != leaf.numel() * leaf.element_size() or storage.data_ptr() in seen:
            leaf = leaf.clone()
        seen.add(leaf.untyped_storage().data_ptr())
        own[name] = leaf
    return own


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:300]

"""Is this machine ready: versions, devices, extras, memory for workers, disk, and a real write."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

import nest_fn
from nest_fn.extras import EXTRAS, load_extra


class Finding(NamedTuple):
    """One line of the doctor's report; ``ok`` None is information."""

    ok: bool | None
    text: str


def examine(folder: str | Path = ".") -> Iterator[Finding]:
    """Everything that a run needs, in the order in which a person would ask."""
    yield from _versions()
    yield from _devices()
    for extra, packages in EXTRAS.items():
        problems = [problem for name in packages if (problem := _problem(name))]
        yield Finding(None, f"extra '{extra}': {'; '.join(problems) or 'yes'}")
    yield from _storage(Path(folder))


def _versions() -> Iterator[Finding]:
    yield Finding(None, f"nest-fn {nest_fn.__version__}, numpy {metadata.version('numpy')}")
    torch_version, audio_version = torch.__version__, metadata.version("torchaudio")
    same = torch_version.split("+")[0].split(".")[:2] == audio_version.split("+")[0].split(".")[:2]
    yield Finding(same, f"torch {torch_version} and torchaudio {audio_version} " + ("fit" if same else "do not fit"))
    try:
        importlib.import_module("torchaudio")
        yield Finding(True, "torchaudio loads")
    except Exception as error:  # a broken build fails in many ways
        yield Finding(False, f"torchaudio does not load: {str(error).splitlines()[0]}; install it with the same torch")


def _devices() -> Iterator[Finding]:
    yield Finding(None, f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        yield Finding(None, "no CUDA device: compile=auto stays eager, precision fp32 is best")
    for index in range(torch.cuda.device_count()):
        gigabytes = torch.cuda.get_device_properties(index).total_memory / 2**30
        yield Finding(True, f"CUDA {index}: {torch.cuda.get_device_name(index)}, {gigabytes:.0f} GiB")


def _storage(folder: Path) -> Iterator[Finding]:
    gigabytes = shutil.disk_usage(folder).free / 2**30
    yield Finding(gigabytes > 5, f"{gigabytes:.1f} GiB free in {folder.resolve()}")
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"nest_fn" * 1000)
            file.flush()
            os.fsync(file.fileno())
        yield Finding(True, "a file can be written and flushed here")
    except OSError as error:
        yield Finding(False, f"nothing can be written here: {error.strerror}; choose another folder with --folder")


def _problem(package: str) -> str | None:
    """Why an optional package cannot be used."""
    try:
        load_extra(package)
    except ImportError as error:
        return str(error)
    return None

"""Is this machine ready: versions, devices, compilers, extras, disk, and a real write."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nest_fn.audio import functions
from nest_fn.extras import EXTRAS, load_extra
from nest_fn.version import __version__

TORCH = (2, 11)  # the oldest that pyproject.toml allows
_FOR = {
    "audio": "all formats but plain WAV",
    "parquet": "nest-fn data import of Parquet files and Hugging Face datasets",
    "remote": "audio and manifests at s3://, gs://, hf://, https://",
    "report": "nest-fn report and the demo's report.html",
    "analysis": "pictures of nest-fn analyse; its numbers are written without it",
    "log": "TensorBoard; metrics.jsonl is written without it",
    "wandb": "Weights & Biases, with trainer.loggers=wandb",
    "text": "sub-word tokens for finetune-ctc; characters need none",
    "tokenizers": "vocabularies of the package tokenizers",
    "beam": "beam search for transcribe",
    "completion": "nest-fn completion for a shell",
    "export": ".safetensors and .onnx",
}
_GIBIBYTES = 5  # free on disk, below which a run may not end


class Finding(NamedTuple):
    """One line of the doctor's report; ``ok`` None is information."""

    ok: bool | None
    text: str


def examine(folder: str | Path = ".") -> Iterator[Finding]:
    """Everything that a run needs, in the order in which a person would ask."""
    yield from _versions()
    yield from _devices()
    yield from _compilers()
    for extra, packages in EXTRAS.items():
        yield Finding(None, f"extra '{extra}' ({_FOR[extra]}): {'; '.join(map(_package, packages))}")
    yield from _storage(Path(folder))


def _versions() -> Iterator[Finding]:
    """Versions of the modules that are really imported, not of the packages' records."""
    yield Finding(None, f"nest-fn {__version__}, Python {platform.python_version()}, numpy {np.__version__}")
    cuda, rocm = torch.version.cuda, torch.version.hip
    built = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPUs alone"
    oldest = ".".join(map(str, TORCH))
    right = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) >= TORCH
    install = f"pip install 'torch>={oldest}' 'torchaudio>={oldest}'"
    yield Finding(right, f"torch {torch.__version__}, built for {built}" + ("" if right else f"; {install}"))
    yield Finding(None, _torchaudio())


def _torchaudio() -> str:
    """Whose audio functions are used, and why."""
    if functions.UNUSED_BECAUSE is None:
        version = importlib.import_module("torchaudio").__version__
        return f"torchaudio {version}: resampling and edit distance are its own"
    return (
        f"torchaudio does not load ({functions.UNUSED_BECAUSE}): resampling and edit distance come from "
        "nest_fn.audio.plain, with the same numbers; SpecAugment and beam search want torchaudio"
    )


def _cpu() -> str:
    spins = os.environ.get("GOMP_SPINCOUNT")
    waiting = (
        f"GOMP_SPINCOUNT is {spins}" if spins else f"OMP_WAIT_POLICY is {os.environ.get('OMP_WAIT_POLICY', 'not set')}"
    )
    able = torch.cpu.get_capabilities()
    known = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if able.get(name)]
    return (
        f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, {waiting}; "
        f"{', '.join(known) or able.get('architecture', 'unknown')}"
    )


def _devices() -> Iterator[Finding]:
    yield Finding(None, _cpu())
    if not torch.cuda.is_available():
        yield Finding(None, "no CUDA device: trainer.device=auto is the CPU, trainer.compile=auto is off")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        size = card.total_memory / 2**30
        yield Finding(True, f"CUDA {index}: {card.name}, {size:.0f} GiB, compute capability {card.major}.{card.minor}")


def _compilers() -> Iterator[Finding]:
    """The compilers that Inductor and Triton call, by the names under which they look for them."""
    cpp = os.environ.get("CXX", "g++")
    version = _compiler(cpp)
    text = f"C++ compiler: {version}" if version else f"no C++ compiler ({cpp}): install it, or name one in CXX"
    yield Finding(None, f"{text}; trainer.compile=on on a CPU wants one")
    if torch.cuda.is_available():
        c = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "gcc"
        version = _compiler(c)
        text = f"C compiler: {version}" if version else f"no C compiler ({c}): install it, name one in CC"
        yield Finding(version is not None, text + ("" if version else ", or set trainer.compile=off"))


def _compiler(command: str) -> str | None:
    """The first line of a compiler's ``--version``, None if it does not run."""
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.stdout.splitlines() or [command])[0] if done.returncode == 0 else None


def _storage(folder: Path) -> Iterator[Finding]:
    try:
        gibibytes = shutil.disk_usage(folder).free / 2**30
        enough = gibibytes > _GIBIBYTES
        advice = "" if enough else f"; a run wants more than {_GIBIBYTES}"
        yield Finding(enough, f"{gibibytes:.1f} GiB free in {folder.resolve()}{advice}")
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"nest_fn" * 1000)
            file.flush()
            os.fsync(file.fileno())
        yield Finding(True, "a file can be written and flushed here")
    except OSError as error:
        yield Finding(False, f"{folder}: nothing can be written here: {error.strerror}; ask about another folder")


def _package(name: str) -> str:
    """The version of an optional package, or why it cannot be used."""
    try:
        return f"{name} {getattr(load_extra(name), '__version__', 'of unknown version')}"
    except ImportError as error:
        return str(error)

"""Errors of training commands, with their exit codes.

A message says what was expected, what was given, and what to do. Errors of the configuration are in ``nest_fn.config``.
"""

from __future__ import annotations

import errno
import os
import traceback

from nest_fn.config.parse.problems import ConfigError
from nest_fn.errors import CheckpointError, NestError
from nest_fn.files.quoting import printable

__all__ = [
    "EXIT_FAILURE",
    "EXIT_INTERRUPTED",
    "EXIT_PIPE",
    "EXIT_PREEMPTED",
    "EXIT_USAGE",
    "CheckpointError",
    "CollapseError",
    "DataError",
    "DistributedError",
    "MemoryExhausted",
    "NestError",
    "NonFiniteError",
    "UsageError",
    "error_text",
    "exit_code",
    "is_out_of_memory",
]

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # saved after a request to stop: start the command again to resume
EXIT_INTERRUPTED = 130  # Ctrl-C
EXIT_PIPE = 141  # standard output was closed before all results were printed; the shell's code for SIGPIPE


class UsageError(NestError):
    """The command was called wrongly, or an optional package that it needs is missing."""

    exit_code = EXIT_USAGE


class DataError(NestError):
    """A manifest, an audio file or a shard cannot be used."""

    exit_code = 3


class NonFiniteError(NestError):
    """The loss or a gradient is NaN or infinite."""

    exit_code = 5


class CollapseError(NestError):
    """The quantizer's codes collapsed, and ``trainer.stop_on_collapse`` ends the run."""

    exit_code = 5


class MemoryExhausted(NestError):
    """A step ran out of memory."""

    exit_code = EXIT_FAILURE


class DistributedError(NestError):
    """A rank was lost, or the ranks disagree."""

    exit_code = 6


# What allocators say: PyTorch's of CPU memory, the C library, C++, cuBLAS and cuDNN.
_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)
_ONEDNN_NO_MEMORY = (
    "could not create a primitive",
    "could not create a memory object",
    "could not execute a primitive",
)


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with ``error``: 0 only for ``SystemExit(None)`` and ``SystemExit(0)``."""
    if isinstance(error, NestError):
        return error.exit_code
    if isinstance(error, ConfigError):
        return EXIT_USAGE
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else (EXIT_FAILURE if error.code else 0)
    return EXIT_FAILURE


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error means out of memory, for which PyTorch has no type on a CPU: its libraries differ in words.

    oneDNN fails "to create a primitive" where it finds no room for generated code or scratch space; for a shape that
    it does not support it names a primitive *descriptor*.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if names & {"MemoryError", "OutOfMemoryError"} or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    text = str(error).splitlines()[0] if str(error) else ""
    return any(words in text.lower() for words in _NO_MEMORY) or text in _ONEDNN_NO_MEMORY


def error_text(error: BaseException) -> str:
    """The message for a user: one line if there is a remedy, else (a fault of the program) the traceback."""
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"error: {os.fsdecode(error.filename)}: {error.strerror}")
    if isinstance(error, NestError | ConfigError | OSError):
        return printable(f"error: {error}")
    if is_out_of_memory(error):
        return "error: out of memory; close other programs, or ask for less at a time"
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    return "".join(traceback.format_exception(error)).rstrip()

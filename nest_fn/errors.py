"""Errors of the library; ``train.errors`` has those of training. ``exit_code`` is the exit code of a command.

A message says what was expected, what was found, and what to do.
"""

from __future__ import annotations


class NestError(Exception):
    """Base of all errors of this library except those for wrong arguments and configurations."""

    exit_code = 1


class OutputError(NestError):
    """An output path is in use or must not be written to; nothing there was changed."""

    exit_code = 2


class CheckpointError(NestError):
    """A checkpoint is missing, damaged or of an unknown kind, or it cannot be written."""

    exit_code = 4


class ExportError(NestError):
    """A model cannot be exported: unsupported settings, an unknown kind of file, or a missing package."""

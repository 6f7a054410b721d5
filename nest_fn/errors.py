"""Errors of the library. ``exit_code`` is that of a command which ends with one; ``train.errors`` has the others.

A message says what was asked, what came, and what to do.
"""

from __future__ import annotations


class NestError(Exception):
    """Base of every error of this library that is neither a wrong argument nor a wrong configuration."""

    exit_code = 1


class OutputError(NestError):
    """A place to write to is taken, or is one that must not be written to; nothing there was touched."""

    exit_code = 2


class CheckpointError(NestError):
    """A checkpoint is missing, damaged or of another kind, or it cannot be written."""

    exit_code = 4


class ExportError(NestError):
    """A model cannot be written as a graph: its settings, the file's kind, or a missing package."""

"""Words for a person, on a stream that may be gone, full, closed or read by nobody: what it does not take is dropped.

A job must not end, nor wait, because nobody listens. Into a pipe or terminal that is not read (``| less``, a stopped
reader, Ctrl-S) nothing more is written once it was full for ``PATIENCE_S``; when it is read again, the lines that are
missing are counted there.
"""

from __future__ import annotations

import math
import os
import select
import shutil
import sys
from contextlib import suppress
from typing import TextIO

PATIENCE_S = 1.0
_PIECE = select.PIPE_BUF  # bytes that a pipe which can be written takes without waiting


class Console:
    """Writes to a stream, None if it was closed from the start, and never raises, nor waits for long."""

    def __init__(self, stream: TextIO | None, patience_s: float = PATIENCE_S) -> None:
        self._stream, self._patience_s = stream, patience_s
        self._missing = 0  # lines that a reader was too slow for
        self._descriptor: int | None = None
        self.terminal = False
        with suppress(OSError, ValueError):  # a stream in memory; a closed one
            if stream is not None:
                self.terminal = stream.isatty()
                self._descriptor = stream.fileno()

    @property
    def columns(self) -> int:
        """Of this terminal, now: it may have been resized, and standard output may be another one."""
        with suppress(OSError):
            if self._descriptor is not None:
                return os.get_terminal_size(self._descriptor).columns or shutil.get_terminal_size().columns
        return shutil.get_terminal_size().columns

    def write(self, text: str) -> None:
        """The text, or nothing."""
        if self._stream is None:
            return
        with suppress(OSError, ValueError):
            if self._descriptor is None:
                self._stream.write(text)
                self._stream.flush()
            else:
                self._send(self._descriptor, text)

    def _send(self, descriptor: int, text: str) -> None:
        """Past Python's buffer, which would keep what cannot be written, and fail at the end with exit code 120."""
        if not _takes(descriptor, 0.0 if self._missing else self._patience_s):
            self._missing += text.count("\n")
            return
        note = f"({self._missing} lines are missing here, for nobody read them in time)\n" if self._missing else ""
        self._missing = 0
        data = (note + text).encode(getattr(self._stream, "encoding", None) or "utf-8", "backslashreplace")
        while data and _takes(descriptor, self._patience_s):
            data = data[os.write(descriptor, data[:_PIECE]) :]


def _takes(descriptor: int, seconds: float) -> bool:
    """Whether it can be written to without waiting, within some seconds; a broken one can: the error comes at once."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(None if seconds == math.inf else seconds * 1000))


def show(text: str, end: str = "\n") -> None:
    """A line of results on standard output. Raises ``OSError``, which names it, where it cannot be written."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        raise named_output(error) from None


def named_output(error: OSError) -> OSError:
    """An error of standard output, with its name."""
    return OSError(error.errno, error.strerror, "standard output")


def tell(text: str) -> None:
    """A line on standard output from a command whose product is a file.

    It goes on where that cannot be written. A reader that is slow is waited for: such a command has few words, or says
    them when its work is done.
    """
    Console(sys.stdout, math.inf).write(text + "\n")


def open_standard_streams() -> None:
    """Make standard streams safe to have.

    A descriptor that was closed (``2>&-``) is opened on nothing: else the next file would get its number, a checkpoint
    perhaps, and whatever a library writes to number 2 would go into it. What cannot be encoded is escaped.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def finish_standard_streams() -> OSError | None:
    """Write out what Python's buffers hold; the error of standard output if it takes it not, None if all is well.

    What could not be written is given up, so that the interpreter does not fail on it once more with exit code 120.
    """
    found = None
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except ValueError:  # closed
            continue
        except OSError as error:
            found = error if stream is sys.stdout else found
            with open(os.devnull, "w") as nothing, suppress(OSError, ValueError):
                os.dup2(nothing.fileno(), stream.fileno())
                stream.flush()
    return found

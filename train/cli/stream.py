"""Messages to a person, on a stream that may be closed, broken, full or unread, and the end of a process that has one.

Text that the stream does not take is dropped.

A job must neither end nor block because nobody reads its output. Once a pipe or terminal that nobody reads (``| less``,
a stopped reader, Ctrl-S) has been full for ``PATIENCE_S``, further lines are dropped; when it is read again, a note
there gives the number of missing lines.
"""

from __future__ import annotations

import math
import os
import select
import shutil
import sys
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO

from nest_fn.train.errors import NestError, error_text

if TYPE_CHECKING:
    from nest_fn.config import Config
    from nest_fn.train.distributed.launch import Job

PATIENCE_S = 1.0
_PIECE = select.PIPE_BUF  # bytes that a writable pipe accepts without blocking


class Console:
    """Writes to a stream (None: closed from the start); never raises, and waits at most ``patience_s`` for a reader."""

    def __init__(self, stream: TextIO | None, patience_s: float = PATIENCE_S) -> None:
        self._stream, self._patience_s = stream, patience_s
        self._missing = 0  # lines dropped because the reader was too slow
        self._descriptor: int | None = None
        self.terminal = False
        with suppress(OSError, ValueError):  # an in-memory stream, or a closed one
            if stream is not None:
                self.terminal = stream.isatty()
                self._descriptor = stream.fileno()

    @property
    def columns(self) -> int:
        """The current width of this terminal, which may have been resized and need not be that of standard output."""
        with suppress(OSError):
            if self._descriptor is not None:
                return os.get_terminal_size(self._descriptor).columns or shutil.get_terminal_size().columns
        return shutil.get_terminal_size().columns

    def write(self, text: str) -> None:
        """Write the text, or drop it."""
        if self._stream is None:
            return
        with suppress(OSError, ValueError):
            if self._descriptor is None:
                self._stream.write(text)
                self._stream.flush()
            else:
                self._send(self._descriptor, text)

    def _send(self, descriptor: int, text: str) -> None:
        """Bypass Python's buffer: text left there would end the interpreter with exit code 120."""
        if not _is_writable(descriptor, 0.0 if self._missing else self._patience_s):
            self._missing += text.count("\n")
            return
        note = f"({self._missing} lines are missing here, for nobody read them in time)\n" if self._missing else ""
        self._missing = 0
        data = (note + text).encode(getattr(self._stream, "encoding", None) or "utf-8", "backslashreplace")
        while data and _is_writable(descriptor, self._patience_s):
            data = data[os.write(descriptor, data[:_PIECE]) :]


def _is_writable(descriptor: int, seconds: float) -> bool:
    """Whether the descriptor becomes writable within ``seconds``; a broken one does: writing to it fails at once."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    return bool(poll.poll(None if seconds == math.inf else seconds * 1000))


def show(text: str, end: str = "\n") -> None:
    """Print results on standard output. Raises ``OSError`` that names standard output if they cannot be written."""
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        raise named_output(error) from None


def named_output(error: OSError) -> OSError:
    """The same error, with ``standard output`` as its file name."""
    return OSError(error.errno, error.strerror, "standard output")


def tell(text: str) -> None:
    """Print a line on standard output, from a command whose result is a file.

    The command goes on if the line cannot be written. The call waits for a slow reader: such a command prints few
    lines, or prints them when its work is done.
    """
    Console(sys.stdout, math.inf).write(text + "\n")


def open_standard_streams() -> None:
    """Make the standard streams safe to use.

    A closed descriptor (``2>&-``) is opened on the null device: otherwise the next opened file, perhaps a checkpoint,
    would get its number, and whatever a library writes to descriptor 2 would go into that file. Characters that
    cannot be encoded are escaped.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def finish_standard_streams() -> OSError | None:
    """Flush the standard streams; return the error of standard output, or None if it was flushed.

    Text that cannot be written is discarded, so that the interpreter does not fail on it again with exit code 120.
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


def tell_end(text: str) -> None:
    """Print a last line on standard error; it overwrites a progress bar."""
    rank = f"rank {os.environ.get('RANK')}: " if is_distributed() else ""
    console = Console(sys.stderr)
    console.write(("\r\033[K" if console.terminal else "") + rank + text + "\n")


def is_distributed() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def exit_if_distributed(code: int) -> int:
    """Return the exit code; under torchrun exit immediately, as normal cleanup could hang in a call to a lost rank."""
    if is_distributed():
        finish_standard_streams()
        os._exit(code)
    return code


def joined_ranks(cfg: Config, log: Any = None) -> AbstractContextManager[Job]:
    """The ranks of a command; a ``LogFile`` is told of an error that ends the process."""
    from nest_fn.train.distributed.launch import init_ranks

    trainer = cfg.trainer
    return init_ranks(trainer.rank_timeout_s, trainer.collective_timeout_s, partial(_on_hang, log))


def _on_hang(log: Any, error: NestError) -> None:
    """Log the error and exit immediately, even if the main thread is blocked."""
    if log is not None:
        log.write(error_text(error))
        log.close()
    tell_end(error_text(error))
    os._exit(error.exit_code)

"""``log.txt`` of a run folder: everything that a run reported, with the time, over all its resumes.

What a terminal, a pipe or a full disk did not take stands here. The only file of the library that reads the clock of
the wall: for people, never for a result.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nest_fn.files.appending import append_whole
from nest_fn.train.errors import error_text
from nest_fn.train.reporter import Reporter

from .sentences import sentence


class LogFile:
    """Lines prefixed with the local time.

    Until the run begins they wait, so that a refused start writes nothing, unless the run has a log already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun = False
        self._waiting: list[str] = []
        self._lost = 0  # lines since the last one that could be written

    def begin(self) -> None:
        """Write every line from now on as it comes."""
        self._begun = True
        for text in self._waiting:
            self._append(text)
        self._waiting = []

    def write(self, text: str) -> None:
        """Write one or more lines; they are dropped and counted if the disk is full."""
        text = _stamped(text)
        if self._begun:
            self._append(text)
        else:
            self._waiting.append(text)

    def close(self) -> None:
        """What was said before a run could go on belongs to its log if it has one."""
        if not self._begun and self.path.exists():
            self.begin()

    def _append(self, text: str) -> None:
        note = _stamped(f"({self._lost} lines could not be written here)") if self._lost else ""
        try:
            append_whole(self.path, (note + text).encode("utf-8", "backslashreplace"))  # paths may be no UTF-8
            self._lost = 0
        except OSError:
            self._lost += text.count("\n")


def _stamped(text: str) -> str:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S%z")
    return "".join(f"{stamp} {line}\n" for line in text.splitlines())


class Logged:
    """A reporter that also writes everything to the log."""

    def __init__(self, reporter: Reporter, log: LogFile) -> None:
        self.reporter, self.log = reporter, log

    def say(self, text: str) -> None:
        """A line of information."""
        self.log.write(text)
        self.reporter.say(text)

    def warn(self, text: str) -> None:
        """A line that asks for attention."""
        self.log.write(f"warning: {text}")
        self.reporter.warn(text)

    def progress(self, step: int, total: int, values: Mapping[str, Any]) -> None:
        """A step was made and measured."""
        self.log.write(sentence(values, total, None))
        self.reporter.progress(step, total, values)


@contextmanager
def logged(
    reporter: Reporter, path: Path, diagnose: Callable[[BaseException], BaseException] = lambda error: error
) -> Iterator[Logged]:
    """A reporter that logs its lines, Python's warnings while the block runs, and the error that ends it.

    ``diagnose`` makes of that error the one to end with.
    """
    told = Logged(reporter, LogFile(path))
    try:
        with _warnings_told(told):
            yield told
    except BaseException as error:
        found = diagnose(error)
        told.log.write(error_text(found))
        if found is error:
            raise
        raise found from error
    finally:
        told.log.close()


@contextmanager
def _warnings_told(reporter: Reporter) -> Iterator[None]:
    """Python's warnings, PyTorch's among them, are reported as all others."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        reporter.warn(f"{category.__name__}: {message} ({filename}:{lineno})")

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield

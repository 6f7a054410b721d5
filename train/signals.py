"""Requests to stop set a flag that the loop reads: Ctrl-C, of which a second one aborts at once, and those below.

SIGTERM (Slurm, Kubernetes, PBS, HTCondor), SIGUSR1 (Slurm's --signal, Grid Engine before a limit), SIGUSR2 (LSF at its
run limit, Grid Engine before a kill), SIGXCPU (CPU time: ulimit -t, Grid Engine), SIGHUP (a terminal or a connection
that was closed). A SIGHUP that is ignored at the start, as by nohup, stays ignored. SIGPIPE and SIGXFSZ do nothing in
Python: the write fails in their place, and whoever writes deals with it.

Python sees a signal between two of its own instructions: a batch that is awaited is given up within a fraction of a
second, but a step that computes or compiles ends first.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nest_fn.train.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED


class StopRequest:
    """Which signal asked for a stop, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._raise = False

    @property
    def asked(self) -> bool:
        """Whether to save and stop at the next step."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 75 for all others (saved: please start again)."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_PREEMPTED

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        if self._raise:
            self._raise = False
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal raises ``Stopped`` while the block runs: for long work of which nothing can be saved."""
        self._raise = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._raise = False


class Stopped(BaseException):
    """A stop was asked for inside of ``at_once``. Not an ``Exception``, so that no handler of errors takes it."""


def stopping() -> tuple[signal.Signals, ...]:
    """The signals that ask for a stop."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return tuple(numbers)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle the signals while the block runs; outside the main thread nothing is handled."""
    request = StopRequest()
    try:
        before = {number: signal.signal(number, request) for number in stopping()}
    except ValueError:  # not the main thread
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

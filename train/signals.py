"""Signals that request a stop set a flag, which the training loop reads.

They are Ctrl-C (a second one aborts immediately), SIGTERM (Slurm, Kubernetes, PBS, HTCondor), SIGUSR1 (Slurm's
--signal, Grid Engine before a limit), SIGUSR2 (LSF at its run limit, Grid Engine before a kill), SIGXCPU (CPU time:
ulimit -t, Grid Engine), and SIGHUP (a closed terminal or connection). A SIGHUP that is ignored at the start, as under
nohup, stays ignored. Python ignores SIGPIPE and SIGXFSZ: the write raises an error instead, which its caller handles.

Python handles a signal between two of its own instructions: waiting for a batch ends within a fraction of a second, but
a step that computes or compiles is finished first.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nest_fn.train.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED


class StopRequest:
    """The signal that requested a stop, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._raise = False

    @property
    def asked(self) -> bool:
        """Whether to save and stop at the next step."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 75 for all others (saved: start the command again to resume)."""
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
        """A signal raises ``Stopped`` while the block runs; for long work that leaves nothing to save."""
        self._raise = True
        try:
            if self.asked:
                raise Stopped
            yield
        finally:
            self._raise = False


class Stopped(BaseException):
    """A stop was requested inside ``at_once``. Not an ``Exception``, so that no error handler catches it."""


def stopping() -> tuple[signal.Signals, ...]:
    """The signals that request a stop."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return tuple(numbers)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle the signals while the block runs; outside the main thread, do nothing."""
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

"""Requests to stop: SIGTERM, SIGUSR1 and Ctrl-C set a flag that the loop reads; a second Ctrl-C aborts at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from .errors import EXIT_INTERRUPTED, EXIT_PREEMPTED


class StopRequest:
    """Which signal asked for a stop, if any."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def asked(self) -> bool:
        """Whether to save and stop at the next step."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """75 for a scheduler's signal (saved: please start again), 130 for Ctrl-C."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_PREEMPTED

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle the three signals while the block runs; outside the main thread nothing is handled."""
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    try:
        before = {number: signal.signal(number, request) for number in numbers}
    except ValueError:  # not the main thread
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

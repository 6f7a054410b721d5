"""One checkpoint at a time is written by a thread, beside the steps that follow it."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

Warn = Callable[[str], None]


class BackgroundSave:
    """A save that a thread makes, and what it had to say, which the main thread passes on between two steps."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._warnings: list[str] = []
        self._error: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether a save is being made."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, save: Callable[[Warn], object]) -> None:
        """Start ``save(warn)``. The one before must have been finished: at most one is made at a time."""
        if self._thread is not None:
            raise RuntimeError("BackgroundSave: a save was begun before the one before it was finished")
        self._thread = Thread(target=self._make, args=(save,), name="checkpoint", daemon=True)  # no exit waits for it
        self._thread.start()

    def report(self, warn: Warn) -> None:
        """If the save has ended, pass its warnings to ``warn`` and raise the error that ended it, if one did."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread.join()
        warnings, error = self._warnings, self._error
        self._thread, self._warnings, self._error = None, [], None
        for text in warnings:
            warn(text)
        if error is not None:
            raise error

    def finish(self, warn: Warn, timeout_s: float | None = None) -> bool:
        """Wait for the save, at most ``timeout_s``, and ``report`` it; whether none is being made any more."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        self.report(warn)
        return not self.running

    def _make(self, save: Callable[[Warn], object]) -> None:
        try:
            save(self._warnings.append)
        except BaseException as error:  # of any kind: the main thread raises it
            self._error = error

"""Heartbeats of all ranks, so that a lost rank is named promptly and no other rank stays blocked on it.

Each rank increments a counter in the job's store. Rank 0 watches all counters; the others watch rank 0's counter and a
note that names a lost rank. A rank that ends with an error writes such a note itself. The store belongs to torchrun or
to rank 0; if it cannot be reached, that process or its machine is gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.distributed import Store  # type: ignore[attr-defined]

from nest_fn.train.errors import DistributedError

_STORE_GONE = "the job's store is gone, and with it rank 0 or the launcher"
_GRACE_S = 10.0  # for the main thread to end on its own, before the heartbeat thread ends the process


class Heartbeat:
    """One rank's heartbeat: a thread that increments this rank's counter and watches the others."""

    def __init__(
        self, store: Store, rank: int, world: int, timeout_s: float, on_hang: Callable[[DistributedError], None]
    ) -> None:
        """``on_hang`` must end the process; it is called if the main thread stays blocked in a call to a lost rank."""
        # A separate connection, so that a blocked call of the main thread does not stop the heartbeat.
        self._store: Any = store.clone()  # type: ignore[attr-defined]
        self._rank, self._world, self._timeout_s, self._on_hang = rank, world, timeout_s, on_hang
        self._pause = min(1.0, timeout_s / 5)
        self._beats = 0
        self._done = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread; call it once every rank has created its heartbeat."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread without reporting a failure."""
        self._done.set()
        self._thread.join(timeout=5.0)

    def report_failure(self, reason: str) -> None:
        """Write a note that tells the other ranks why this rank ends."""
        with suppress(RuntimeError):  # the store is gone with its machine: no rank could read the note
            self._store.set("note", f"rank {self._rank} ended: {reason}")

    def diagnose(self, failure: str) -> DistributedError:
        """Why a call to the other ranks failed: waits some seconds for a note, then looks for counters that stopped."""
        try:
            self._store.set(f"survivor/{self._rank}", "")
            before = self._read_beats()
            for _ in range(3):
                time.sleep(self._pause)
                if self._read_note():
                    break
            else:
                self._note_lost([rank for rank, beat in enumerate(self._read_beats()) if beat == before[rank]])
            found = self._read_note() or f"a call to the other ranks failed, and all of them live: {failure}"
        except RuntimeError:
            found = _STORE_GONE
        return self._error(found)

    def _run(self) -> None:
        last_seen: dict[int, tuple[int, float]] = {}
        while not self._done.wait(self._pause):
            try:
                self._beat()
                self._check_counters(last_seen)
                note = self._read_note()
            except RuntimeError:
                note = _STORE_GONE
            if note is not None:
                if not self._done.wait(_GRACE_S):
                    self._on_hang(self._error(note))
                return

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", str(self._beats))

    def _check_counters(self, last_seen: dict[int, tuple[int, float]]) -> None:
        """Write a note about ranks whose counter has not changed for ``timeout_s``."""
        now = time.monotonic()
        for rank, beat in self._beats_of(range(self._world) if self._rank == 0 else (0,)).items():
            if last_seen.get(rank, (0, 0.0))[0] != beat:
                last_seen[rank] = beat, now
        self._note_lost([rank for rank, (_, seen) in last_seen.items() if now - seen > self._timeout_s])

    def _note_lost(self, ranks: list[int]) -> None:
        lost = [rank for rank in ranks if rank != self._rank and not self._store.check([f"survivor/{rank}"])]
        if lost and not self._store.check(["note"]):
            named = ", ".join(map(str, lost))
            self._store.set("note", f"rank {named} of {self._world} was lost (killed, or its machine is gone)")

    def _read_note(self) -> str | None:
        return str(self._store.get("note").decode()) if self._store.check(["note"]) else None

    def _read_beats(self) -> list[int]:
        return list(self._beats_of(range(self._world)).values())

    def _beats_of(self, ranks: range | tuple[int, ...]) -> dict[int, int]:
        found = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        return {rank: int(beat) for rank, beat in zip(ranks, found, strict=True)}

    def _error(self, what: str) -> DistributedError:
        return DistributedError(
            f"{what}; nothing that was saved is lost: start again, with as many ranks as you like, and it goes on from "
            "the last checkpoint."
        )

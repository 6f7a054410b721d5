"""Signs of life of all ranks, so that a lost one is named at once and nobody waits for it.

Each rank counts up a number in the job's store. Rank 0 watches all numbers, the others watch rank 0's and a note that
says who was lost. A rank that ends with an error leaves a note of its own. The store is torchrun's, or that of rank 0;
where it is gone, so is that machine.
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
    """One rank's side of it: a thread that beats and looks around."""

    def __init__(
        self, store: Store, rank: int, world: int, timeout_s: float, on_hang: Callable[[DistributedError], None]
    ) -> None:
        """``on_hang`` must end the process: it is called where the main thread hangs in a call to a lost rank."""
        # A connection of its own: a blocked call of the main thread must not silence it.
        self._store: Any = store.clone()  # type: ignore[attr-defined]
        self._rank, self._world, self._timeout_s, self._on_hang = rank, world, timeout_s, on_hang
        self._pause = min(1.0, timeout_s / 5)
        self._beats = 0
        self._done = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._live, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin, once every rank has made its heartbeat."""
        self._thread.start()

    def stop(self) -> None:
        """End without a failure to report."""
        self._done.set()
        self._thread.join(timeout=5.0)

    def report_failure(self, reason: str) -> None:
        """Tell the others why this rank ends."""
        with suppress(RuntimeError):  # the store went with its machine; nobody is left to be told by it
            self._store.set("note", f"rank {self._rank} ended: {reason}")

    def diagnose(self, failure: str) -> DistributedError:
        """Why a call to the other ranks failed: looks for those that said so, or no longer beat, for some seconds."""
        try:
            self._store.set(f"survivor/{self._rank}", "")
            before = self._read_beats()
            for _ in range(3):
                time.sleep(self._pause)
                if self._noted():
                    break
            else:
                self._note_lost([rank for rank, beat in enumerate(self._read_beats()) if beat == before[rank]])
            found = self._noted() or f"a call to the other ranks failed, and all of them live: {failure}"
        except RuntimeError:
            found = _STORE_GONE
        return self._error(found)

    def _live(self) -> None:
        last_seen: dict[int, tuple[int, float]] = {}
        while not self._done.wait(self._pause):
            try:
                self._beat()
                self._look(last_seen)
                noted = self._noted()
            except RuntimeError:
                noted = _STORE_GONE
            if noted is not None:
                if not self._done.wait(_GRACE_S):
                    self._on_hang(self._error(noted))
                return

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"beat/{self._rank}", str(self._beats))

    def _look(self, last_seen: dict[int, tuple[int, float]]) -> None:
        """Note ranks whose number has stood still for too long."""
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

    def _noted(self) -> str | None:
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

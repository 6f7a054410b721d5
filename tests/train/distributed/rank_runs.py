"""Ranks of ``nest-fn pretrain`` as processes: by ``torchrun``, or by hand, where each one's own exit code is seen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 240.0  # seconds, for whatever must come in the end; a machine at work on something else may be slow
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class Process:
    """A command of its own session, whose words go to a file."""

    def __init__(self, words: Sequence[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with open(log, "w") as out:
            self.popen = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def told(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def send(self, number: int) -> None:
        """A signal to the command alone, not to what it started."""
        self.popen.send_signal(number)

    def ended(self, seconds: float = PATIENCE) -> int:
        """Its exit code, which must come within some seconds."""
        wait_for(lambda: self.popen.poll() is not None, [], f"the end of {self.log.stem}", seconds)
        return self.popen.returncode

    def end(self) -> None:
        """Kill it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)  # the group may outlive its leader
        self.popen.wait()


@contextmanager
def by_torchrun(words: Sequence[str], folder: Path) -> Iterator[Process]:
    """Two ranks under their launcher; the launcher. ``folder`` takes the log."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = Process([*TORCHRUN, "-m", "nest_fn.train", *words], folder / "torchrun.log", {})
    try:
        yield launcher
    finally:
        launcher.end()


@contextmanager
def by_hand(folder: Path, *words: Sequence[str]) -> Iterator[list[Process]]:
    """One rank for each command, without a launcher: rank 0 holds the store. ``folder`` takes the logs."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(words))}
    ranks: list[Process] = []
    try:
        for rank, own in enumerate(words):
            given = place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(Process(["-m", "nest_fn.train", *own], folder / f"rank{rank}.log", given))
        yield ranks
    finally:
        for process in ranks:
            process.end()


def wait_for(condition: Callable[[], bool], alive: Sequence[Process], what: str, seconds: float = PATIENCE) -> None:
    """Wait until a condition holds, while some processes live."""
    end = time.monotonic() + seconds
    while not condition():
        for process in alive:
            assert process.popen.poll() is None, f"{process.log.stem} ended before {what}: {process.told()}"
        assert time.monotonic() < end, f"{what} did not come in {seconds:g} s: {[p.told() for p in alive]}"
        time.sleep(0.01)


def saved(run: Path, step: int, ranks: Sequence[Process]) -> None:
    """Wait for a checkpoint."""
    path = run / "checkpoints" / f"step_{step:08d}" / "meta.json"
    wait_for(path.exists, ranks, str(path))


def steps(run: Path) -> list[int]:
    """Of its checkpoints."""
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())

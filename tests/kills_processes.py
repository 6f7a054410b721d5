"""The processes of a run that is to be killed: one command, or a launcher and its ranks. Made for Linux (/proc)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 180.0  # seconds without a sign of life after which a run hangs
MOSTLY = 0.75  # share of kills that hit one of several ranks; the others hit all and their launcher


@dataclass(frozen=True)
class Setting:
    """What all runs of an experiment share."""

    ranks: int
    overrides: tuple[str, ...]

    @property
    def valid_every(self) -> int:
        """Steps from one validation to the next."""
        return int([word.partition("=")[2] for word in self.overrides if word.startswith("trainer.valid_every=")][-1])

    def command(self, run: Path, steps: int) -> list[str]:
        """The command line, always the same for the same run."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}", "-m"]
        words = ["nest_fn.train", "pretrain", "-c", "tiny", "--folder", str(run), f"trainer.max_steps={steps}"]
        return [sys.executable, *(launcher if self.ranks > 1 else ["-m"]), *words, *self.overrides]


class Attempt:
    """One start of the command, its processes, and what it told."""

    def __init__(self, setting: Setting, run: Path, steps: int) -> None:
        self.log, self.ranks = run.with_suffix(".log"), setting.ranks
        self.offset = self.log.stat().st_size if self.log.exists() else 0
        self.started, self.lived = time.monotonic(), 0.0  # seconds until it was killed
        environment = {"OMP_NUM_THREADS": "1"} | os.environ
        with open(self.log, "a") as out:
            self.process = subprocess.Popen(
                setting.command(run, steps), cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True
            )

    def told(self) -> str:
        """What this start has printed."""
        with open(self.log) as file:
            file.seek(self.offset)
            return file.read()

    def end(self) -> str:
        """How it ended, in words."""
        return f"ended with exit code {self.process.poll()}:\n{self.told()[-2000:]}"

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait at most so long, or until something is true; whether the command has ended by itself."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            if self.process.poll() is not None:
                return True
            time.sleep(min(0.005, max(0.0, end - time.monotonic())))
        return self.process.poll() is not None

    def kill(self, draw: float) -> tuple[str, int]:
        """SIGKILL; who was hit, and how many others had to be ended by hand since they did not end by themselves.

        Of several ranks mostly one is hit, and the launcher is to end the others; else all of them and the launcher.
        Nothing is done to a command that has ended.
        """
        if self.process.poll() is not None:
            return "all", 0
        self.lived, launcher = time.monotonic() - self.started, self.process.pid
        if self.ranks > 1:
            os.kill(launcher, signal.SIGSTOP)  # so that it starts no rank in between
        ranks = _children(launcher) if self.ranks > 1 else []
        one = int(draw / MOSTLY * len(ranks)) if ranks and draw < MOSTLY else -1
        victims = [ranks[one]] if one >= 0 else [launcher, *ranks]
        for victim in victims:
            _kill(victim)
        if one >= 0:
            os.kill(launcher, signal.SIGCONT)
            self.wait(PATIENCE)
        survivors = [pid for pid in ranks if pid not in victims and _state(pid)]
        self.process.kill()
        for pid in survivors:
            _kill(pid)
        self.process.wait()
        while any(_state(pid) for pid in ranks):
            time.sleep(0.01)
        return (f"rank {one}" if one >= 0 else "all"), len(survivors)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _state(pid: int) -> list[str]:
    """State letter and parent of a process; empty if it has ended, be it that nobody has asked for its exit code."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields


def _children(parent: int) -> list[int]:
    """Processes started by ``parent``, in the order of their start as far as their numbers rise."""
    pids = sorted(int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [pid for pid in pids if _state(pid)[1:] == [str(parent)]]

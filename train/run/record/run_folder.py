"""The folder of a run: what it was started with, what it measured, what it saved.

config.yaml  command.txt  environment.json  data.json  metrics.jsonl  digests.jsonl  log.txt
checkpoints/step_00001000/

log.txt holds all that was said and warned, with the time, over all resumes; what another rank alone has to say, or ends
with, is in its log_rank1.txt. What a full disk does not take is missing there, and counted.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nest_fn.config import Config
from nest_fn.config.writer import to_text
from nest_fn.files.appending import append_whole
from nest_fn.files.inputs import read_plain
from nest_fn.files.lock import Lock
from nest_fn.files.outputs import MARK, contents
from nest_fn.train.errors import CheckpointError, UsageError
from nest_fn.version import __version__, code_digest


class RunFolder:
    """Paths of a run, its lock, and its metrics file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.digests = self.path / "digests.jsonl"  # if trainer.digest_every is set
        self.checkpoints = self.path / "checkpoints"
        self._lock = Lock(self.path / "lock")
        self._made: list[Path] = []  # folders that ``open`` made, the innermost first

    def open(self) -> None:
        """Make the folder and lock it.

        Raises ``UsageError`` if it cannot be written or is somebody else's, ``CheckpointError`` if held.
        """
        if not self._may_hold_a_run():
            raise UsageError(
                f"run folder {self.path}: {contents(self.path)}, and no run; nothing there was touched: choose another "
                "with --folder."
            )
        absent = [folder for folder in (self.checkpoints, *self.checkpoints.parents) if not folder.exists()]
        try:
            self._made = absent
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            holder = self._lock.take()
        except OSError as error:
            self.close(began=False)
            raise UsageError(f"run folder {self.path}: {error.strerror}; choose another with --folder.") from error
        if holder is not None:
            raise CheckpointError(
                f"run folder {self.path}: {holder} is writing here; stop it, or choose another with --folder."
            )

    def _may_hold_a_run(self) -> bool:
        """Whether nothing stands here, or a run that began, however far it came: its command, mark or lock says so."""
        if not self.path.is_dir() or not any(True for _ in self.path.iterdir()):
            return True
        began = any((self.path / name).exists() for name in ("command.txt", "data.json", MARK)) or self._lock.is_ours()
        empty = [entry.name for entry in self.path.iterdir()] == ["checkpoints"] and not any(self.checkpoints.iterdir())
        return self.checkpoints.is_dir() and (began or empty)

    def close(self, began: bool = True) -> None:
        """Give the lock back. Of a run that never ``began`` no folder stays that was made for it."""
        self._lock.release()
        for folder in () if began else self._made:
            with suppress(OSError):  # something is in it
                folder.rmdir()

    def describe(self, cfg: Config, command: list[str], data: Mapping[str, Any], ranks: int = 1) -> None:
        """Write what the run was started with, on how many ranks."""
        (self.path / "command.txt").write_bytes(os.fsencode(" ".join(command) + "\n"))  # paths may be no UTF-8
        (self.path / "config.yaml").write_text(to_text(cfg.to_dict()), encoding="utf-8")
        (self.path / "environment.json").write_text(json.dumps({**environment(), "ranks": ranks}, indent=1) + "\n")
        (self.path / "data.json").write_text(json.dumps(data, indent=1) + "\n")

    def append(self, line: Mapping[str, Any]) -> None:
        """One line of metrics, flushed; the whole of it or nothing. Raises ``OSError`` if it cannot be written."""
        append_whole(self.metrics, (json.dumps(line) + "\n").encode())

    def log(self, rank: int) -> Path:
        """The log file of a rank."""
        return self.path / ("log.txt" if rank == 0 else f"log_rank{rank}.txt")

    def validation(self, step: int) -> dict[str, float] | None:
        """The validation of ``step`` in the metrics, None if there was none."""
        lines = (line for _, line in self._lines() if line.get("step") == step)
        return next((line["valid"] for line in lines if isinstance(line.get("valid"), dict)), None)

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics that can be read, in order."""
        return [line for _, line in self._lines() if isinstance(line.get("step"), int)]

    def environment(self) -> dict[str, Any]:
        """``environment.json``; empty if it is missing or damaged."""
        return self._read("environment.json")

    def data(self) -> dict[str, Any]:
        """``data.json``; empty if it is missing or damaged."""
        return self._read("data.json")

    def _read(self, name: str) -> dict[str, Any]:
        path = self.path / name
        return _read_line(read_plain(path)) if path.is_file() else {}

    def cut_metrics(self, step: int) -> None:
        """Drop what comes after the last line of ``step`` or before: a resumed run writes it again.

        Bytes before that which are no line of metrics stay as they are.
        """
        lines = self._lines()
        if not lines:
            return
        past = [number for number, (_, line) in enumerate(lines, 1) if _whole(line.get("step"), step)]
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_bytes(b"".join(raw for raw, _ in lines[: max(past, default=0)]))
        temporary.replace(self.metrics)

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Each line of the metrics, as bytes and as read; a damaged one reads as nothing."""
        if not self.metrics.exists():
            return []
        return [(raw + b"\n", _read_line(raw)) for raw in read_plain(self.metrics).split(b"\n") if raw]


def _read_line(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return line if isinstance(line, dict) else {}


def _whole(value: Any, most: int) -> bool:
    return isinstance(value, int) and value <= most


def environment() -> dict[str, Any]:
    """Versions, machine and devices, for the record."""
    return {
        "nest_fn": __version__,
        "code": code_digest(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "executable": sys.executable,
    }

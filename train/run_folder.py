"""The folder of a run: what it was started with, what it measured, what it saved.

config.yaml  command.txt  environment.json  data.json  metrics.jsonl  checkpoints/step_00001000/
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import nest_fn
from nest_fn.config import Config
from nest_fn.config.writer import to_text

from .errors import CheckpointError, UsageError
from .lock import Lock


class RunFolder:
    """Paths of a run, its lock, and its metrics file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self._lock = Lock(self.path / "lock")

    def open(self) -> None:
        """Make the folder and lock it. Raises ``UsageError`` if it cannot be written, ``CheckpointError`` if held."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            holder = self._lock.take()
        except OSError as error:
            raise UsageError(f"run folder {self.path}: {error.strerror}; choose another with --folder.") from error
        if holder is not None:
            raise CheckpointError(
                f"run folder {self.path}: {holder} is writing here; stop it, or choose another with --folder."
            )

    def close(self) -> None:
        """Give the lock back."""
        self._lock.release()

    def describe(self, cfg: Config, command: list[str], data: Mapping[str, Any]) -> None:
        """Write down what the run was started with."""
        (self.path / "config.yaml").write_text(to_text(cfg.to_dict()), encoding="utf-8")
        (self.path / "command.txt").write_bytes(os.fsencode(" ".join(command) + "\n"))  # paths may be no UTF-8
        (self.path / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
        (self.path / "data.json").write_text(json.dumps(data, indent=1) + "\n")

    def append(self, line: Mapping[str, Any]) -> None:
        """One line of metrics, flushed; the whole of it or nothing. Raises ``OSError`` if it cannot be written."""
        text = (json.dumps(line) + "\n").encode()
        with open(self.metrics, "ab", buffering=0) as file:
            start = file.tell()
            if file.write(text) < len(text):  # a disk that is full takes what it can
                file.truncate(start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.metrics))

    def validation(self, step: int) -> dict[str, float] | None:
        """What the metrics say of the validation of ``step``, None if there was none."""
        if not self.metrics.exists():
            return None
        lines = map(json.loads, self.metrics.read_text().splitlines())
        return next((line["valid"] for line in lines if line["step"] == step and "valid" in line), None)

    def cut_metrics(self, step: int) -> None:
        """Drop lines after ``step``, and a line cut short by a kill: a resumed run writes them again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue
        temporary = self.metrics.with_suffix(".tmp")
        temporary.write_text("".join(kept))
        temporary.replace(self.metrics)


def environment() -> dict[str, Any]:
    """Versions, machine and devices, for the record."""
    return {
        "nest_fn": nest_fn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "executable": sys.executable,
    }

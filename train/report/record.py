"""What a run folder says about a run, whether it is finished, in progress, or ended with an error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Any

from nest_fn.checkpoint import retention
from nest_fn.config import Config
from nest_fn.files.inputs import read_plain
from nest_fn.files.lock import holder
from nest_fn.train.rerun.opening import settings_of
from nest_fn.train.run.failure_dump import failures_folder
from nest_fn.train.run.record.run_folder import RunFolder

Line = Mapping[str, Any]
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4}) ")


@dataclass(frozen=True)
class Record:
    """A run as its folder describes it."""

    name: str  # by which a page names it
    folder: Path
    cfg: Config
    steps: Sequence[Line]  # lines of training metrics
    valid: Sequence[Line]  # lines of validation metrics
    environment: Mapping[str, Any]
    data: Mapping[str, Any]
    command: str
    log: Sequence[str]  # lines without their times
    seconds: float  # between the first and the last line of each of its sessions, in total
    checkpoints: Sequence[Path]
    failures: Sequence[int]  # steps of which a dump was made
    holder: str | None  # the process that is writing here

    @property
    def done(self) -> int:
        """Updates that were recorded."""
        lines = max((line["step"] for line in (*self.steps, *self.valid)), default=0)
        return max([lines, *map(retention.step_of, self.checkpoints)])

    @property
    def finished(self) -> bool:
        """Whether it made all its updates."""
        return self.done >= self.cfg.trainer.max_steps

    @property
    def error(self) -> str | None:
        """The error with which its last session ended."""
        last = next((line for line in reversed(self.log) if line.startswith(("error: ", "command:"))), "")
        return last.removeprefix("error: ") if last.startswith("error: ") and self.holder is None else None

    @property
    def warnings(self) -> list[str]:
        """What it warned of."""
        return [line.removeprefix("warning: ") for line in self.log if line.startswith("warning: ")]

    def series(self, name: str, valid: bool = False) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, where it was recorded as a number."""
        found = [
            (line["step"], float(value))
            for line in (self.valid if valid else self.steps)
            if isinstance(value := (line["valid"] if valid else line).get(name), int | float)
        ]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, name: str, valid: bool = False) -> float | None:
        """The last finite value of a metric."""
        return next((value for value in reversed(self.series(name, valid)[1]) if isfinite(value)), None)


def read_records(folders: Sequence[Path]) -> list[Record]:
    """The records of runs, named by their folders as briefly as they differ. Raises ``UsageError``, ``ConfigError``."""
    return [read_record(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def read_record(folder: Path, name: str | None = None) -> Record:
    """The record of one run. Raises ``UsageError`` if the folder holds none, ``ConfigError`` for a damaged config."""
    cfg, run = settings_of("report", folder), RunFolder(folder)
    lines = [line for line in run.lines() if isinstance(line.get("step"), int)]
    log, seconds = _read_log(folder / "log.txt")
    return Record(
        name or folder.name, folder, cfg,
        [line for line in lines if "valid" not in line and "loss" in line],
        [line for line in lines if isinstance(line.get("valid"), dict) and "loss" in line["valid"]],
        run.environment(), run.data(), _read_text(folder / "command.txt").strip(), log, seconds,
        retention.list_checkpoints(folder / "checkpoints"),
        [retention.step_of(path) for path in retention.list_checkpoints(failures_folder(folder))],
        holder(folder / "lock"),
    )  # fmt: skip


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    parts = [folder.absolute().parts for folder in folders]
    for length in range(1 if len(parts) > 1 else 2, max(2, *map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({number})" for number, folder in enumerate(folders, 1)]


def _read_log(path: Path) -> tuple[list[str], float]:
    """The lines without their times, and the seconds of all sessions, each from its command to its last line."""
    lines, seconds = [], 0.0
    start: datetime | None = None
    end: datetime | None = None
    for line in _read_text(path).splitlines():
        found = _STAMP.match(line)
        if found is None:
            continue
        text, time = line[found.end() :], datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S%z")
        lines.append(text)
        if text.startswith("command:"):
            seconds += _span(start, end)
            start = time
        end = time
    return lines, seconds + _span(start, end)


def _span(start: datetime | None, end: datetime | None) -> float:
    return max((end - start).total_seconds(), 0.0) if start is not None and end is not None else 0.0


def _read_text(path: Path) -> str:
    return read_plain(path).decode("utf-8", "replace") if path.is_file() else ""

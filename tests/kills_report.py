"""What ``tests.kills`` found: one record a kill, two runs compared byte for byte, and a table of it all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

PHASES = ("imports", "data and resume", "steps", "save", "removal of old checkpoints", "validation")


@dataclass(frozen=True)
class Kill:
    """A kill, and what the files told afterwards."""

    seconds: float  # since the start of the process
    early: bool  # drawn from the start of the process, not from its first save
    victims: str  # all, rank 0, rank 1
    helped: int  # processes of other ranks that did not end by themselves
    phase: str  # one of PHASES
    resumed: int | None  # the step that the process went on from; None: killed before it told
    checkpoint: int  # step of the newest whole checkpoint; 0: none
    reached: int  # the last step that left a trace
    damaged: int  # newer checkpoints that are not whole
    half_line: bool  # metrics end in a line that was cut short
    leftovers: tuple[str, ...]  # of interrupted writes

    @property
    def lost(self) -> int:
        """Steps to be made again, at the least."""
        return self.reached - self.checkpoint

    def line(self) -> str:
        """For a log."""
        resumed = "" if self.resumed is None else f"resumed at {self.resumed}, "
        left = f", left {' '.join(self.leftovers)}" if self.leftovers else ""
        return f"{self.victims} after {self.seconds:.2f} s in {self.phase}: {resumed}saved {self.checkpoint}{left}"


@dataclass(frozen=True)
class Verdict:
    """How the run that was killed differs from the other one; nothing at all is what is wanted."""

    final: tuple[str, ...]  # files of the last checkpoint
    earlier: tuple[str, ...]  # files of other checkpoints that both have
    metrics: tuple[str, ...]  # the first lines that differ
    compared: int  # files of checkpoints
    lines: int  # of metrics
    leftovers: tuple[str, ...]  # what interrupted writes left for good; no fault, but it is told

    @property
    def equal(self) -> bool:
        """Whether all bytes are."""
        return not (self.final or self.earlier or self.metrics)


def metrics_lines(run: Path) -> list[str]:
    """The lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({name: value for name, value in line.items() if name != "time"}) for line in lines]


def compare(run: Path, reference: Path, steps: int) -> Verdict:
    """Two runs that ended at ``steps``: all files of checkpoints that both have, and every line of metrics."""
    last = f"step_{steps:08d}"
    ours, theirs = _checkpoints(run), _checkpoints(reference)
    both = {name.partition("/")[0] for name in ours} & {name.partition("/")[0] for name in theirs} | {last}
    names = sorted(name for name in ours.keys() | theirs.keys() if name.partition("/")[0] in both)
    differ = [name for name in names if ours.get(name) != theirs.get(name)]
    differ += [last] if f"{last}/meta.json" not in ours else []
    a, b = metrics_lines(run), metrics_lines(reference)
    pairs = [f"line {n}: {x} | {y}" for n, (x, y) in enumerate(zip(a, b, strict=False), 1) if x != y]
    pairs += [f"{len(a)} lines | {len(b)} lines"] if len(a) != len(b) else []
    return Verdict(
        final=tuple(name for name in differ if name.startswith(last)),
        earlier=tuple(name for name in differ if not name.startswith(last)),
        metrics=tuple(pairs[:5]),
        compared=len(names),
        lines=len(b),
        leftovers=leftovers(run),
    )


def leftovers(run: Path) -> tuple[str, ...]:
    """What interrupted writes left in a run's folder."""
    found = [path.name for path in run.glob("*") if path.name.startswith("lock.") or path.suffix == ".tmp"]
    found += [path.name for path in (run / "checkpoints").glob(".*")]
    return tuple(sorted(found))


def table(
    kills: Sequence[Kill], verdict: Verdict | None, problem: str, rows: dict[str, str], wanted: int
) -> str:  # fmt: skip
    """All of it as a table in Markdown; ``rows`` are shown first."""
    phases = Counter(kill.phase for kill in kills)
    resumes = [kill.resumed for kill in kills if kill.resumed is not None]
    lost = [kill.lost for kill in kills if kill.resumed is not None]
    rows = dict(rows)
    rows["kills"] = (
        f"{len(kills)} of {wanted}, {sum(kill.early for kill in kills)} of them from the start of the process"
    )
    rows |= {f"- in {name}": str(phases[name]) for name in PHASES}
    if any(kill.victims != "all" for kill in kills):
        rows["who"] = ", ".join(f"{who} {n}" for who, n in sorted(Counter(kill.victims for kill in kills).items()))
        rows["ranks that had to be ended by hand"] = str(sum(kill.helped for kill in kills))
    rows["killed processes that had gone on from step 0, from a later one, had not come so far"] = (
        f"{resumes.count(0)}, {sum(step > 0 for step in resumes)}, {len(kills) - len(resumes)}"
    )
    rows["saves cut short"] = str(phases["save"])
    rows["lines of metrics cut short"] = str(sum(kill.half_line for kill in kills))
    rows["checkpoints found damaged"] = str(sum(kill.damaged for kill in kills))
    if lost:
        rows["steps known to be lost to a kill while training, median and most"] = f"{median(lost):g}, {max(lost)}"
    rows["every resume went on"] = "**no**: " + " / ".join(problem.splitlines()) if problem else "yes"
    if verdict is not None:
        rows |= _verdict_rows(verdict)
    lines = [f"| {name} | {text} |" for name, text in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _verdict_rows(verdict: Verdict) -> dict[str, str]:
    def says(differ: tuple[str, ...]) -> str:
        return "equal to the byte" if not differ else f"**differ**: {'; '.join(differ)}"

    return {
        "final checkpoint": says(verdict.final),
        f"checkpoints that both runs have ({verdict.compared} files)": says(verdict.final + verdict.earlier),
        f"metrics.jsonl, times aside ({verdict.lines} lines)": says(verdict.metrics),
        "left over at the end": " ".join(verdict.leftovers) or "nothing",
    }


def _checkpoints(run: Path) -> dict[str, bytes]:
    """Every file of every checkpoint by its path below ``checkpoints``."""
    folder = run / "checkpoints"
    files: list[Any] = [path for path in folder.glob("step_*/**/*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

"""``nest-fn verify RUN``: a part of a run made again and compared with what it recorded, to the last bit.

Compared are each line of ``metrics.jsonl`` (times apart) and each checkpoint, tensor by tensor. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.checkpoint import retention
from nest_fn.checkpoint.folder import digest_of
from nest_fn.layers.tree import flatten
from nest_fn.train.errors import CheckpointError, UsageError
from nest_fn.train.reporter import Reporter
from nest_fn.train.run.context import Run
from nest_fn.train.run.record.progress import Progress
from nest_fn.train.run.record.run_folder import RunFolder, environment

from .compare import ROUNDING, changed_entries, line_difference, tensor_differences
from .opening import open_again, progress_before, settings_of
from .steps import Step, leaves_of, steps_from


class Comparison(NamedTuple):
    """What was compared at one step."""

    step: int  # updates done
    text: str
    equal: bool
    relative: float  # the largest relative difference that was seen; 0 if equal


class Part(NamedTuple):
    """The part of a run to make again: the updates after ``start`` up to ``end``, and what was recorded there."""

    start: int
    end: int
    lines: dict[int, Mapping[str, Any]]  # lines of training metrics of the whole run, by updates done
    checkpoints: dict[int, Path]  # all that are there, by updates done


def verify(
    folder: Path, start: int | None, steps: int | None, overrides: Sequence[str], reporter: Reporter
) -> Iterator[Comparison]:
    """Make ``steps`` updates after step ``start`` again and compare them, one by one.

    By default from the last checkpoint but one (else from the seed) to the next checkpoint (else to the last line).
    Raises ``UsageError`` for a folder that holds no run and a part of which nothing was recorded, ``CheckpointError``.
    """
    cfg = settings_of("verify", folder, overrides)
    part = choose_part(folder, start, steps)
    run = open_again(cfg, folder, reporter)
    for note in surroundings(folder):
        reporter.warn(note)
    origin, progress = progress_before(run, part.start)
    reporter.say(f"verify: steps {part.start} to {part.end} of {folder}, from {origin or 'the seed'}")
    yield from _compared(run, progress, part)


def choose_part(folder: Path, start: int | None, steps: int | None) -> Part:
    """Which updates to make again. Raises ``UsageError`` if nothing was recorded of them."""
    lines: dict[int, Mapping[str, Any]] = {line["step"]: line for line in RunFolder(folder).lines() if "loss" in line}
    checkpoints = {retention.step_of(path): path for path in retention.list_checkpoints(folder / "checkpoints")}
    recorded = sorted(lines.keys() | checkpoints.keys())
    if start is None:
        start = ([0, *sorted(checkpoints)])[-2] if checkpoints else 0
    later = [step for step in sorted(checkpoints) if step > start]
    last = later[0] if later else max(recorded, default=0)
    end = start + steps if steps is not None else last
    if not any(start < step <= end for step in recorded):
        told = f"from step {recorded[0]} to {recorded[-1]}" if recorded else "nowhere"
        raise UsageError(
            f"verify: {folder} recorded nothing after step {start} up to {end}; it has lines of metrics and "
            f"checkpoints {told}: give other --from and --steps."
        )
    return Part(start, min(end, max(recorded)), lines, checkpoints)


def surroundings(folder: Path) -> Iterator[str]:
    """How machine, versions and ranks differ from those of the run: each may round otherwise."""
    then = RunFolder(folder).environment()
    if not then:
        return
    now = {**environment(), "ranks": 1, "executable": then.get("executable")}
    changed = changed_entries(then, {name: now[name] for name in now if name in then})
    if changed:
        yield (
            f"not as when the run was started: {'; '.join(changed)}. Floats may round otherwise "
            "(docs/reproducibility.md); trainer.threads sets the threads."
        )


def _compared(run: Run, progress: Progress, part: Part) -> Iterator[Comparison]:
    made = steps_from(run, progress, part.lines.__contains__)
    for step in islice(made, part.end - progress.ts.step):
        done = step.progress.ts.step
        if done <= part.start:
            continue
        if step.line is not None:
            yield _line(step, part.lines[done], run.folder.path)
        if done in part.checkpoints:
            yield _checkpoint(step, part.checkpoints[done])


def _line(step: Step, recorded: Mapping[str, Any], folder: Path) -> Comparison:
    assert step.line is not None
    done, found = step.progress.ts.step, line_difference(recorded, step.line)
    digest = digest_of(flatten(step.progress.ts.params), {})[:12]
    if found is None:
        return Comparison(done, f"metrics equal, loss {step.line['loss']!r}, parameters {digest}", True, 0.0)
    return Comparison(done, f"metrics differ (recorded and now): {found.text}", False, found.relative)


def _checkpoint(step: Step, path: Path) -> Comparison:
    done = step.progress.ts.step
    try:
        trees, _, _ = checkpoint_folder.read_checkpoint(path)
    except CheckpointError as error:
        return Comparison(done, f"checkpoint damaged: {error}", False, float("inf"))
    now = leaves_of(step.progress)
    other = list(tensor_differences(flatten(trees), now))
    if not other:
        return Comparison(done, f"checkpoint equal, {len(now)} tensors", True, 0.0)
    first = other[0]
    text = f"checkpoint differs in {len(other)} of {len(now)} tensors, first {first.path}: {first.text}"
    return Comparison(done, text, False, max(one.relative for one in other))


def verdict(found: Sequence[Comparison]) -> str:
    """The comparisons in one sentence."""
    other = [one for one in found if not one.equal]
    if not other:
        return f"equal to the last bit: {len(found)} records, steps {found[0].step} to {found[-1].step}"
    worst = max(one.relative for one in other)
    size = "of the size of rounding" if worst <= ROUNDING else "more than rounding"
    return f"differs from step {other[0].step} on; largest relative difference {worst:.2g}, {size}"

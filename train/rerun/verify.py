"""``nest-fn verify RUN``: a part of a run made again and compared with what it recorded, to the last bit.

Compared are each line of ``metrics.jsonl`` (times apart), each checkpoint, tensor by tensor, and each record of
``digests.jsonl``, which a run with ``trainer.digest_every`` writes. Nothing is written.
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
from nest_fn.train.run.record.digests import Digests, digests_of, first_difference, read_digests
from nest_fn.train.run.record.progress import Progress
from nest_fn.train.run.record.run_folder import RunFolder

from .compare import line_difference, relative_distance, tensor_differences
from .opening import open_again, progress_before, settings_of
from .steps import Step, leaves_of, steps_from, tensors_of_step
from .verdict import Comparison, counted, surroundings


class Part(NamedTuple):
    """The part of a run to make again: the updates after ``start`` up to ``end``, and what was recorded there."""

    start: int
    end: int
    lines: dict[int, Mapping[str, Any]]  # lines of training metrics of the whole run, by updates done
    checkpoints: dict[int, Path]  # all that are there, by updates done
    digests: dict[int, Digests]  # of every tensor, by updates done

    @property
    def about(self) -> str:
        """What was recorded of it, in words."""
        kinds = (("line", self.lines), ("checkpoint", self.checkpoints), ("record", self.digests))
        found = [counted(sum(self.start < step <= self.end for step in steps), name) for name, steps in kinds]
        return f"{found[0]} of metrics, {found[1]}, {found[2]} of digests"


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
    if changed := surroundings(folder):
        reporter.warn(
            f"not as when the run was started: {'; '.join(changed)}. Floats may round otherwise "
            "(docs/reproducibility.md); trainer.threads sets the threads."
        )
    origin, progress = progress_before(run, part.start)
    reporter.say(
        f"verify: steps {part.start} to {part.end} of {folder}, from {origin or 'the seed'}; recorded are {part.about}"
    )
    if progress.ts.step in part.digests:
        yield _beginning(progress, part.digests[progress.ts.step])
    yield from _compared(run, progress, part)


def choose_part(folder: Path, start: int | None, steps: int | None) -> Part:
    """Which updates to make again. Raises ``UsageError`` if nothing was recorded of them."""
    lines: dict[int, Mapping[str, Any]] = {line["step"]: line for line in RunFolder(folder).lines() if "loss" in line}
    checkpoints = {retention.step_of(path): path for path in retention.list_checkpoints(folder / "checkpoints")}
    digests = dict(read_digests(RunFolder(folder).digests))
    recorded = sorted(lines.keys() | checkpoints.keys() | digests.keys())
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
    return Part(start, min(end, max(recorded)), lines, checkpoints, digests)


def _compared(run: Run, progress: Progress, part: Part) -> Iterator[Comparison]:
    made = steps_from(run, progress, part.lines.__contains__)
    for step in islice(made, part.end - progress.ts.step):
        done = step.progress.ts.step
        if done <= part.start:
            continue
        if done in part.digests:
            yield _digests(tensors_of_step(run, step), part.digests[done], done)
        if step.line is not None:
            yield _line(step, part.lines[done], run.folder.path)
        if done in part.checkpoints:
            yield _checkpoint(step, part.checkpoints[done])


def _beginning(progress: Progress, recorded: Digests) -> Comparison:
    """Whether the checkpoint from which the steps are made is what the run had there; its batch is another one."""
    now = leaves_of(progress)
    held = {name: digest for name, digest in recorded.items() if name in now}
    found = _digests(now, held, progress.ts.step)
    return found._replace(kind="beginning", text=f"the checkpoint from which the steps are made: {found.text}")


def _digests(now: Mapping[str, Any], recorded: Digests, step: int) -> Comparison:
    first, text = first_difference(recorded, digests_of({name: now[name] for name in recorded if name in now}))
    return Comparison("digests", step, text, first is None, 0.0 if first is None else None, first)


def _line(step: Step, recorded: Mapping[str, Any], folder: Path) -> Comparison:
    assert step.line is not None
    done, found = step.progress.ts.step, line_difference(recorded, step.line)
    digest = digest_of(flatten(step.progress.ts.params), {})[:12]
    if found is None:
        return Comparison("metrics", done, f"metrics equal, loss {step.line['loss']!r}, parameters {digest}", True, 0.0)
    return Comparison("metrics", done, f"metrics differ (recorded and now): {found.text}", False, found.relative)


def _checkpoint(step: Step, path: Path) -> Comparison:
    done = step.progress.ts.step
    try:
        trees, _, _ = checkpoint_folder.read_checkpoint(path)
    except CheckpointError as error:
        return Comparison("checkpoint", done, f"checkpoint damaged: {error}", False, float("inf"))
    now = leaves_of(step.progress)
    other = list(tensor_differences(flatten(trees), now))
    if not other:
        return Comparison("checkpoint", done, f"checkpoint equal, {len(now)} tensors", True, 0.0)
    first = other[0]
    text = f"checkpoint differs in {len(other)} of {len(now)} tensors, first {first.path}: {first.text}"
    return Comparison("checkpoint", done, text, False, relative_distance(flatten(trees), now), first.path)

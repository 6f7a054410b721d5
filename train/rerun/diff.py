"""``nest-fn diff RUN RUN``: where two runs part. Settings, data, versions, then what they recorded.

With ``rerun`` both are made again side by side from their last common state, up to the first update after which a
tensor differs. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.checkpoint import retention
from nest_fn.layers.tree import flatten
from nest_fn.train.errors import CheckpointError
from nest_fn.train.reporter import Reporter
from nest_fn.train.run.context import Run
from nest_fn.train.run.record.digests import first_difference, read_digests
from nest_fn.train.run.record.progress import Progress
from nest_fn.train.run.record.run_folder import RunFolder

from .compare import TensorDifference, changed_entries, line_difference, tensor_differences
from .opening import open_again, progress_before, settings_of
from .steps import Step, leaves_of, steps_from

SHOWN = 20  # differences of settings that are listed


class Difference(NamedTuple):
    """One respect in which two runs are compared."""

    what: str
    equal: bool | None  # None: they have nothing in common to compare
    lines: tuple[str, ...]


def diff(first: Path, second: Path) -> Iterator[Difference]:
    """Compare what two runs recorded. Raises ``UsageError`` for a folder that holds no run, ``ConfigError``."""
    configs = [settings_of("diff", folder) for folder in (first, second)]
    yield _entries("config", *(flatten(config.to_dict()) for config in configs))
    yield _entries("data", *(_data(folder) for folder in (first, second)))
    yield _entries("code, versions and machine", *(_environment(folder) for folder in (first, second)))
    yield _metrics(first, second)
    yield _digests(first, second)
    yield _checkpoints(first, second)


def _entries(what: str, first: dict[str, Any], second: dict[str, Any]) -> Difference:
    if not first or not second:
        return Difference(what, None, ("not recorded by both",))
    changed = changed_entries(first, second)
    more = (f"and {len(changed) - SHOWN} more",) if len(changed) > SHOWN else ()
    return Difference(what, not changed, (*changed[:SHOWN], *more))


def _data(folder: Path) -> dict[str, Any]:
    """Digests of the data by split; where the files lie does not matter."""
    found = RunFolder(folder).data()
    return {f"{split} (digest)": _digest_of(entry) for split, entry in found.items()}


def _digest_of(entry: Any) -> str:
    return str(entry.get("digest"))[:12] if isinstance(entry, dict) else str(entry)


def _environment(folder: Path) -> dict[str, Any]:
    found = {name: str(value) for name, value in RunFolder(folder).environment().items()}
    return found | ({"code": found["code"][:12]} if "code" in found else {})


def _metrics(first: Path, second: Path) -> Difference:
    """The first line of metrics, of training or validation, that is not the same in both."""
    lines = [{(line["step"], "valid" in line): line for line in RunFolder(f).lines()} for f in (first, second)]
    common = sorted(lines[0].keys() & lines[1].keys())
    if not common:
        return Difference("metrics", None, ("no step has a line in both",))
    for number, place in enumerate(common):
        then, now = (flatten(side[place]) for side in lines)
        untimed = [{name: value for name, value in line.items() if not name.startswith("time")} for line in (then, now)]
        found = line_difference(*untimed)
        if found is not None:
            told = (
                f"step {place[0]}: {found.text} (relative {found.relative:.2g}); {number} common lines before are equal"
            )
            return Difference("metrics", False, (told,))
    return Difference("metrics", True, (f"{len(common)} common lines, to step {common[-1][0]}",))


def _digests(first: Path, second: Path) -> Difference:
    """The first record of digests that is not the same in both, and its first tensor that is not."""
    records = [dict(read_digests(RunFolder(folder).digests)) for folder in (first, second)]
    common = sorted(records[0].keys() & records[1].keys())
    if not common:
        return Difference("digests", None, ("no step has a record in both; trainer.digest_every makes them",))
    for number, step in enumerate(common):
        then, now = (record[step] for record in records)
        shared = {name: digest for name, digest in then.items() if name in now} if then.keys() & now.keys() else then
        name, text = first_difference(shared, now)
        if name is not None:
            return Difference("digests", False, (f"step {step}: {text}; {number} common records before are equal",))
    return Difference("digests", True, (f"{len(common)} common records, to step {common[-1]}",))


def _checkpoints(first: Path, second: Path) -> Difference:
    """The first common checkpoint that is not the same in both, and its first tensor that is not."""
    common, equal = common_checkpoints(first, second), 0
    if not common:
        return Difference("checkpoints", None, ("no step has a checkpoint in both",))
    for step, paths in common.items():
        try:
            if _file_digests(paths[0]) == _file_digests(paths[1]):
                equal += 1
                continue
            other = list(tensor_differences(*(_leaves(path) for path in paths)))
        except CheckpointError as error:
            return Difference("checkpoints", False, (f"step {step}: {error}",))
        if other:
            return Difference(
                "checkpoints", False, (f"step {step}: {told(other)}; {equal} common ones before are equal",)
            )
        equal += 1
    return Difference("checkpoints", True, (f"{equal} common ones, to step {max(common)}",))


def common_checkpoints(first: Path, second: Path) -> dict[int, tuple[Path, Path]]:
    """Checkpoints of the steps that both runs have, by step."""
    found = [{retention.step_of(p): p for p in retention.list_checkpoints(f / "checkpoints")} for f in (first, second)]
    return {step: (found[0][step], found[1][step]) for step in sorted(found[0].keys() & found[1].keys())}


def told(other: Sequence[TensorDifference]) -> str:
    """The first of the tensors that differ, and how many they are."""
    many = "1 tensor differs" if len(other) == 1 else f"{len(other):,} tensors differ"
    return f"{many}, first {other[0].path}: {other[0].text}"


def _file_digests(path: Path) -> dict[str, str]:
    """SHA-256 of the files with tensors, as the checkpoint records and its files have them."""
    content = checkpoint_folder.verify(path)
    return {name: content["files"][entry["file"]]["sha256"] for name, entry in content["trees"].items()}


def _leaves(path: Path) -> dict[str, Any]:
    return flatten(checkpoint_folder.read_checkpoint(path).trees)


def first_differing_update(first: Path, second: Path, overrides: Sequence[str], reporter: Reporter) -> Difference:
    """Make both runs again side by side, from their last equal checkpoint, else from their seeds, until they part.

    Raises ``UsageError``, ``ConfigError``, ``CheckpointError``, ``DataError``.
    """
    configs = [settings_of("diff", folder, overrides) for folder in (first, second)]
    start = _last_equal(first, second)
    runs = [open_again(config, folder, reporter) for config, folder in zip(configs, (first, second), strict=True)]
    begun = [progress_before(run, start)[1] for run in runs]
    what = f"made again from step {start}"
    other = list(tensor_differences(*map(leaves_of, begun)))
    if other:
        return Difference(what, False, (f"before the first update {told(other)}",))
    configs += [settings_of("diff", folder) for folder in (first, second)]  # no override makes steps that were not
    return Difference(what, *_lockstep(runs, begun, min(config.trainer.max_steps for config in configs)))


def _last_equal(first: Path, second: Path) -> int:
    equal = [0]
    for step, paths in common_checkpoints(first, second).items():
        try:
            if _file_digests(paths[0]) != _file_digests(paths[1]):
                break
        except CheckpointError:
            break
        equal.append(step)
    return equal[-1]


def _lockstep(runs: Sequence[Run], begun: Sequence[Progress], last: int) -> tuple[bool, tuple[str, ...]]:
    """Whether all updates to ``last`` are equal, and in what the first one differs that is not."""
    sides = [steps_from(run, progress, lambda _: False) for run, progress in zip(runs, begun, strict=True)]
    for _ in range(begun[0].ts.step, last):
        found = _parted(*(next(side) for side in sides))
        if found:
            return False, found
    return True, (f"all updates to step {last} are equal",)


def _parted(first: Step, second: Step) -> tuple[str, ...]:
    """In what one update differs: its utterances, its sums, its tensors; empty if in nothing."""
    step, lines = first.progress.ts.step, []
    if first.raw["ids"] != second.raw["ids"]:
        pairs = zip(first.raw["ids"], second.raw["ids"], strict=False)
        names = next((pair for pair in pairs if pair[0] != pair[1]), (len(first.raw["ids"]), len(second.raw["ids"])))
        lines.append(f"update {step}: the batches differ, first {names[0]} and {names[1]}")
    sums = [{n: float(v) for n, v in side.values.items() if v.numel() == 1} for side in (first, second)]
    if (found := line_difference(*sums)) is not None:
        lines.append(f"update {step}: {found.text}")
    other = list(tensor_differences(*(leaves_of(side.progress) for side in (first, second))))
    if other:
        lines.append(f"update {step}: {told(other)}")
    return tuple(lines)

"""What the runs of a study came to: a value for each run and measure, means over seeds, differences to the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nest_fn.layers.tree import flatten
from nest_fn.train.run.record.run_folder import RunFolder

from .execute import is_finished
from .plan import Study, Task
from .statistics import Difference, Interval, bootstrap_interval, holm, paired, unpaired


class Arm(NamedTuple):
    """One arm in one measure."""

    name: str
    values: dict[int, float]  # by seed, of finished runs
    mean: float
    bootstrap: Interval
    difference: Difference | None  # to the baseline, over the seeds that both have; None: is the baseline
    bootstrap_difference: Interval
    ignoring_pairs: Difference | None
    holm: float  # adjusted p over the arms of this measure


class Table(NamedTuple):
    """All arms in one measure."""

    measure: str
    baseline: str
    arms: list[Arm]


def collect(study: Study, folder: Path) -> list[Table]:
    """A table for each measure, of the runs that are finished."""
    finals = {task: _final(task.folder(folder)) for task in study.tasks if is_finished(study, task, folder)}
    return [_table(study, measure, finals) for measure in study.measures]


def _final(run: Path) -> dict[str, float]:
    """The last value of every metric, by its dotted name."""
    found: dict[str, float] = {}
    for line in RunFolder(run).lines():
        found |= {name: float(value) for name, value in flatten(line).items() if isinstance(value, int | float)}
    return found


def _table(study: Study, measure: str, finals: Mapping[Task, Mapping[str, float]]) -> Table:
    values = {
        arm: {s: finals[Task(arm, s)][measure] for s in study.seeds if measure in finals.get(Task(arm, s), {})}
        for arm in study.arms
    }
    base = values[study.baseline]
    arms = [_arm(name, found, None if name == study.baseline else base) for name, found in values.items()]
    adjusted = holm([math.nan if arm.difference is None else arm.difference.p for arm in arms])
    return Table(measure, study.baseline, [arm._replace(holm=p) for arm, p in zip(arms, adjusted, strict=True)])


def _arm(name: str, values: dict[int, float], base: Mapping[int, float] | None) -> Arm:
    held = list(values.values())
    mean = sum(held) / len(held) if held else math.nan
    common = [seed for seed in values if base is not None and seed in base]
    if base is None or not common:
        return Arm(name, values, mean, bootstrap_interval(held), None, (math.nan, math.nan), None, math.nan)
    first, second = [base[seed] for seed in common], [values[seed] for seed in common]
    differences = [after - before for before, after in zip(first, second, strict=True)]
    return Arm(
        name, values, mean, bootstrap_interval(held), paired(first, second), bootstrap_interval(differences),
        unpaired(first, second), math.nan,
    )  # fmt: skip


def pairing(study: Study, folder: Path) -> str:
    """Whether the arms of each seed saw the same data in the same order, by the digests that the runs recorded."""
    other = []
    for seed in study.seeds:
        digests = {_data_digest(Task(arm, seed).folder(folder)) for arm in study.arms} - {None}
        if len(digests) > 1:
            other.append(seed)
    if not other:
        return (
            "The arms of each seed had the same data in the same order (equal digests), and draws keyed by utterance."
        )
    return (
        f"The arms of seeds {', '.join(map(str, other))} had other data, or the same in other batches: what is paired "
        "is then the seed alone."
    )


def _data_digest(run: Path) -> str | None:
    found = RunFolder(run).data().get("train")
    return str(found.get("digest")) if isinstance(found, dict) else None


def interval_text(interval: Interval) -> str:
    """``[0.123, 0.345]``, or nothing where there is none."""
    return "" if math.isnan(interval[0]) else f"[{interval[0]:.3g}, {interval[1]:.3g}]"


HEAD = ("arm", "seeds", "mean", "bootstrap", "difference", "bootstrap", "paired t", "ignoring pairs", "p", "Holm")


def rows(table: Table) -> Iterator[Sequence[str]]:
    """The rows of a table below ``HEAD``, as texts."""
    for arm in table.arms:
        row = [
            arm.name,
            str(len(arm.values)),
            "" if math.isnan(arm.mean) else f"{arm.mean:.5g}",
            interval_text(arm.bootstrap),
        ]
        if arm.difference is None or arm.ignoring_pairs is None:
            row += ["baseline" if arm.name == table.baseline else "", "", "", "", "", ""]
        else:
            known = not math.isnan(arm.difference.p)
            row += [
                f"{arm.difference.mean:+.3g}", interval_text(arm.bootstrap_difference),
                interval_text(arm.difference.interval), interval_text(arm.ignoring_pairs.interval),
                f"{arm.difference.p:.3g}" if known else "", f"{arm.holm:.3g}" if known else "",
            ]  # fmt: skip
        yield row


def to_markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """All tables as Markdown."""
    parts = []
    for table in tables:
        lines = [HEAD, tuple("---" for _ in HEAD), *rows(table)]
        parts.append(f"## {table.measure}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, *notes]) + "\n"


def to_json(tables: Sequence[Table]) -> dict[str, Any]:
    """All tables as values for JSON; NaN as null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return None if math.isnan(value) else value
        if hasattr(value, "_asdict"):
            return {name: plain(child) for name, child in value._asdict().items()}
        if isinstance(value, dict):
            return {str(name): plain(child) for name, child in value.items()}
        return [plain(child) for child in value] if isinstance(value, list | tuple) else value

    return {table.measure: plain(table) for table in tables}

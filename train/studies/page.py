"""The report of a study as one HTML page: findings in words, tables, differences, and small multiples of the arms."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from nest_fn.train.report import page
from nest_fn.train.report.drawing import COLOURS, GUESS, drawing, to_svg
from nest_fn.train.report.record import Record, read_record

from .plan import Study, Task
from .table import HEAD, Table, interval_text, pairing, rows, to_markdown

CLEAR = 0.05  # adjusted p below which a difference is called clear
_ACROSS = 3  # small multiples beside each other
_TASK = ("data.augment.", "loss.", "masking.", "num_books=", "num_classes=", "preprocessor.", "quantizer.")
"""Settings on which the measures of validation depend, whatever was learnt."""


def study_page(study: Study, folder: Path, tables: Sequence[Table]) -> str:
    """The page. Raises ``UsageError`` if matplotlib is missing."""
    records = {
        task: read_record(task.folder(folder))
        for task in study.tasks
        if (task.folder(folder) / "config.yaml").is_file()
    }
    body = [
        f"<h1>Study {page.text(folder.name)}</h1>",
        page.paragraph(f"{len(study.arms)} arms x {len(study.seeds)} seeds of {study.config}", soft=True),
        page.section("Findings", f'<ul class="verdict">{"".join(map(_item, findings(study, tables)))}</ul>'),
        *(_measure(study, records, table) for table in tables),
        page.section("How it is reckoned", *map(page.paragraph, notes(study, folder))),
        page.section("Arms", page.table(("arm", "settings"), [(n, " ".join(v)) for n, v in study.arms.items()]),
                     page.paragraph(f"All: {' '.join(study.overrides)}", soft=True)),
    ]  # fmt: skip
    return page.page(f"Study {folder.name}", body)


def _item(text: str) -> str:
    return f'<li class="{"good" if " clear" in text and "not clear" not in text else "plain"}">{page.text(text)}</li>'


def findings(study: Study, tables: Sequence[Table]) -> Iterator[str]:
    """What differs from the baseline, in words."""
    done = sum(len(arm.values) for arm in tables[0].arms) if tables else 0
    yield f"{done} of {len(study.tasks)} runs are finished and have {tables[0].measure if tables else 'a measure'}."
    changed = sorted({start.rstrip(".=") for start in _TASK for own in study.arms.values() if _names(own, start)})
    if changed:
        yield (
            f"Mind that the arms differ in {', '.join(changed)}, and that each is validated with its own: losses and "
            "accuracies are then of different tasks, and do not say whose features are better."
        )
    for table in tables:
        for arm in table.arms:
            if arm.difference is None or arm.ignoring_pairs is None:
                continue
            told = f"{table.measure}: {arm.name} is {arm.difference.mean:+.3g} from {table.baseline}"
            if math.isnan(arm.difference.p):
                yield f"{told}, of one seed only."
                continue
            kind = "clear" if arm.holm < CLEAR else "not clear"
            wide = _width(arm.ignoring_pairs.interval) / max(_width(arm.difference.interval), 1e-300)
            yield (
                f"{told}, paired 95 % interval "
                f"{interval_text(arm.difference.interval)}: {kind} (p {arm.holm:.2g} after Holm). Ignoring the pairs, "
                f"the interval is {wide:.2g} times as wide."
            )


def _names(overrides: Sequence[str], start: str) -> bool:
    """Whether an override sets something below ``start``."""
    return any(text.removeprefix("model.").startswith(start) for text in overrides)


def _width(interval: tuple[float, float]) -> float:
    return interval[1] - interval[0]


def notes(study: Study, folder: Path) -> list[str]:
    """What the numbers are."""
    return [
        "A value is a run's last one; intervals are of 95 %. Means and differences are over seeds; a difference is the "
        "arm minus the "
        f"baseline ({study.baseline}), seed by seed. {pairing(study, folder)}",
        "The bootstrap interval (percentile, over seeds) is too narrow for few seeds; Student's t interval of the "
        "paired differences is the one to trust. p is of the paired t test, adjusted by Holm's method over the arms "
        "of a measure. Ignoring pairs is Welch's interval.",
    ]


def _measure(study: Study, records: dict[Task, Record], table: Table) -> str:
    numbers = range(1, len(HEAD))
    return page.section(
        table.measure,
        page.table(HEAD, rows(table), numbers=numbers),
        page.figures(page.figure(_values(table), "Points: seeds, joined where they are the same one.")),
        page.figure(_multiples(study, records, table.measure), "A line a seed; grey: the baseline.", wide=True),
    )


def _values(table: Table) -> str:
    """Each run's value by arm; a line joins the runs of a seed."""
    with drawing() as figure:
        axes = figure.subplots()
        seeds = sorted({seed for arm in table.arms for seed in arm.values})
        for seed in seeds:
            held = [(place, arm.values[seed]) for place, arm in enumerate(table.arms) if seed in arm.values]
            axes.plot(*zip(*held, strict=True), color=GUESS, linewidth=0.7, marker="o", markersize=4, alpha=0.8)
        for place, arm in enumerate(table.arms):
            if not math.isnan(arm.mean):
                axes.plot([place - 0.2, place + 0.2], [arm.mean] * 2, color=COLOURS[0], linewidth=2.5)
        axes.set_xticks(
            range(len(table.arms)), [arm.name for arm in table.arms], rotation=20 if len(table.arms) > 3 else 0
        )
        axes.set(title=f"{table.measure} by arm (bars: means)")
        axes.grid(axis="x", visible=False)
        return to_svg(figure, f"{table.measure} of each run by arm")


def _multiples(study: Study, records: dict[Task, Record], measure: str) -> str:
    """A small plot of the measure over updates for each arm, all with the same axes."""
    name, valid = measure.removeprefix("valid."), measure.startswith("valid.")
    across = min(_ACROSS, len(study.arms))
    down = -(-len(study.arms) // across)
    with drawing(3.0 * across, 0.4 + 2.0 * down) as figure:
        grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, arm in zip(grid, study.arms, strict=False):
            for shown, colour in ((study.baseline, GUESS), (arm, COLOURS[0])):
                for seed in study.seeds:
                    record = records.get(Task(shown, seed))
                    if record is not None:
                        axes.plot(*record.series(name, valid), color=colour, linewidth=1.0, alpha=0.8)
            axes.set_title(arm)
        for axes in grid[len(study.arms) :]:
            axes.set_visible(False)
        return to_svg(figure, f"{measure} over updates, by arm")


def markdown(study: Study, folder: Path, tables: Sequence[Table]) -> str:
    """The tables and findings as Markdown."""
    return to_markdown(tables, [*(f"* {line}" for line in findings(study, tables)), *notes(study, folder)])

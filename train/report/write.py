"""``nest-fn report RUN [RUN ...] --out report.html``: reads run folders and writes the page."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nest_fn.config import ConfigError
from nest_fn.errors import NestError
from nest_fn.files.inputs import read_plain
from nest_fn.layers.tree import flatten
from nest_fn.train.errors import UsageError
from nest_fn.train.reporter import Reporter
from nest_fn.version import __version__

from . import page, sections
from .drawing import drawing
from .examples import Examples, make_examples
from .record import Record

_PICTURES = {".png": "image/png", ".jpg": "image/jpeg"}
_ROWS = 400  # of a table of an analysis
_FEW = 12  # values that are shown at once


def make_report(
    records: Sequence[Record], overrides: Sequence[str], utterances: int, analyses: Sequence[Path], reporter: Reporter
) -> str:
    """The page of one or several runs. What cannot be read, as data that is elsewhere, is told in its place.

    Raises ``UsageError`` if matplotlib is missing, ``ConfigError`` for wrong ``overrides``.
    """
    with drawing():  # so that a missing matplotlib ends the command before it works
        pass
    examples = {record.name: _examples(record, overrides, utterances, reporter) for record in records}
    made = {name: found for name, found in examples.items() if isinstance(found, Examples)}
    return page.page(
        f"Report: {', '.join(record.name for record in records)}",
        (
            _head(records),
            sections.verdict_section(records),
            sections.learning_section(records),
            sections.codes_section(records, made),
            sections.utterances_section(records, examples),
            sections.optimisation_section(records),
            sections.data_section(records, overrides),
            sections.time_section(records),
            sections.settings_section(records),
            page.section("Analyses", *_analyses(analyses)),
            sections.warnings_section(records),
            sections.reproducibility_section(records),
        ),
    )


def _head(records: Sequence[Record]) -> str:
    if len(records) == 1:
        record = records[0]
        encoder = record.cfg.encoder
        told = (
            f"Pre-training with {encoder.n_layers} layers of width {encoder.d_model}, {record.cfg.num_classes:,} "
            f"codes, seed {record.cfg.trainer.seed}. Made by nest_fn {__version__}."
        )
        return f"<h1>Run {page.text(record.name)}</h1>{page.paragraph(told, soft=True)}"
    told = f"{', '.join(record.name for record in records)}. Made by nest_fn {__version__}."
    return f"<h1>{len(records)} runs compared</h1>{page.paragraph(told, soft=True)}"


def _examples(record: Record, overrides: Sequence[str], number: int, reporter: Reporter) -> Examples | str:
    """What the newest model does with some utterances, or why that cannot be shown."""
    if number == 0:
        return "no utterances were asked for (--utterances 0)."
    if overrides:
        record.cfg.override(*overrides)  # a wrong one ends the command
    reporter.say(f"{record.name}: applying its newest checkpoint to {number} utterances")
    try:
        return make_examples(record, overrides, number)
    except (NestError, ConfigError, OSError) as error:
        return str(error)


def _analyses(paths: Sequence[Path]) -> Iterator[str]:
    """What ``nest-fn analyse`` or another command left: tables of JSON files, and pictures."""
    for path in paths:
        if not path.exists():
            raise UsageError(f"report: {path} is not there; give files or folders that an analysis wrote.")
        files = sorted(child for child in path.rglob("*") if child.is_file()) if path.is_dir() else [path]
        for file in files:
            if not file.name.startswith(".") and file.name != "origin.json":
                yield _analysis(file)


def _analysis(file: Path) -> str:
    if file.suffix in _PICTURES:
        data = base64.b64encode(read_plain(file)).decode()
        return page.figure(
            f'<img alt="{page.text(file.stem)}" src="data:{_PICTURES[file.suffix]};base64,{data}">', file.stem
        )
    if file.suffix != ".json":
        return ""
    try:
        found = json.loads(read_plain(file))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"report: {file} is no JSON: {error}.") from error
    return f"<h3>{page.text(file.stem)}</h3>{_values(found)}"


def _values(found: Any) -> str:
    """Values of JSON as a table: of rows with the same columns, or of all values by their paths."""
    if isinstance(found, dict) and all(isinstance(row, dict) and row for row in found.values()):
        columns = list(dict.fromkeys(name for row in found.values() for name in row))
        plain = not any(isinstance(value, dict | list) for row in found.values() for value in row.values())
        if found and plain and len(columns) <= 8 and all(len(row) == len(columns) for row in found.values()):
            rows = [(name, *(page.number(row[column]) for column in columns)) for name, row in found.items()]
            return page.table(("", *columns), rows[:_ROWS], numbers=range(1, len(columns) + 1))
    values = [(name, page.number(value)) for name, value in flatten(found).items()]
    told = page.table(("quantity", "value"), values[:_ROWS], numbers=(1,))
    return told if len(values) <= _FEW else page.details(f"{len(values):,} values", told)


def origin_of(records: Sequence[Record], overrides: Sequence[str], utterances: int) -> dict[str, Any]:
    """What a report was made of: it is made again once a run has gone on."""
    runs = [[str(record.folder.absolute()), record.done, len(record.steps), len(record.log)] for record in records]
    return {
        "command": "report", "version": __version__, "runs": runs, "settings": list(overrides), "utterances": utterances
    }  # fmt: skip

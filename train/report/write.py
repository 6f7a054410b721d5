"""``nest-fn report RUN [RUN ...] --out report.html``: reads run folders and writes the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nest_fn.config import ConfigError
from nest_fn.errors import NestError
from nest_fn.train.reporter import Reporter
from nest_fn.version import __version__

from . import page, sections
from .analyses import layers_section, noise_floors, tables_section
from .drawing import drawing
from .examples import Examples, make_examples
from .record import Record


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
            sections.learning_section(records, noise_floors(analyses)),
            sections.codes_section(records, made),
            sections.utterances_section(records, examples),
            sections.optimisation_section(records),
            sections.data_section(records, overrides),
            sections.time_section(records),
            sections.settings_section(records),
            layers_section(analyses),
            tables_section(analyses),
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


def origin_of(records: Sequence[Record], overrides: Sequence[str], utterances: int) -> dict[str, Any]:
    """What a report was made of: it is made again once a run has gone on."""
    runs = [[str(record.folder.absolute()), record.done, len(record.steps), len(record.log)] for record in records]
    return {
        "command": "report", "version": __version__, "runs": runs, "settings": list(overrides), "utterances": utterances
    }  # fmt: skip

"""Curves over updates: loss and accuracy with what guessing reaches, codebook, gradient norm, speed. Runs overlay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, log
from statistics import median
from typing import Any

from .analyses import NoiseFloor
from .drawing import COLOURS, GUESS, drawing, to_svg
from .record import Record

Values = tuple[Sequence[int], Sequence[float]]


def loss_curve(records: Sequence[Record]) -> str:
    """Cross-entropy of masked tokens, and what guessing by the tokens' frequencies would cost."""

    def guess(record: Record, valid: bool) -> Values:
        steps, values = record.series("perplexity", valid)
        return steps, [log(value) if value >= 1 else 0.0 for value in values]

    return _trained_and_validated(records, "loss", "loss, nats per masked token", guess, "by frequency")


def accuracy_curve(records: Sequence[Record], floors: Sequence[NoiseFloor] = ()) -> str:
    """Share of masked tokens that are right, and of the commonest one; and of the targets that noise leaves."""
    bounds = [(f"noise floor{f' ({one.name})' if len(floors) > 1 else ''}", one.as_mixed) for one in floors]
    return _trained_and_validated(
        records, "accuracy", "share of masked tokens that are right",
        lambda record, valid: record.series("unigram_accuracy", valid), "the commonest", bounds,
    )  # fmt: skip


def _trained_and_validated(
    records: Sequence[Record], name: str, label: str, guess: Callable[[Record, bool], Values], guessed: str,
    floors: Sequence[tuple[str, float]] = (),
) -> str:  # fmt: skip
    several = len(records) > 1
    with drawing() as figure:
        axes = figure.subplots()
        for record, colour in zip(records, _cycle(len(records)), strict=True):
            trained, valid = record.series(name), record.series(name, True)
            entry = "training" if not several else record.name if not record.valid else None
            axes.plot(*trained, color=colour, alpha=0.45, linewidth=1.0, marker=_alone(trained), label=entry)
            if record.valid:
                axes.plot(
                    *valid, color=colour, marker="o", markersize=3, label=record.name if several else "validation"
                )
            _, bounds = guess(record, bool(record.valid))
            if bounds:  # of the validation data one number, for its masks are always the same
                level, entry = median(bounds), None if several else guessed
                axes.axhline(level, color=colour if several else GUESS, linestyle=":", label=entry)
        for entry, level in floors:
            axes.axhline(level, color=GUESS, linestyle="-.", label=entry)
        axes.set(xlabel="updates", title=label)
        _within(axes, [value for r in records for valid in (False, True) for value in r.series(name, valid)[1]])
        axes.legend()
        return to_svg(figure, label)


def _alone(values: Values) -> str | None:
    """A marker where one point makes no line."""
    return "o" if len(values[0]) == 1 else None


def _within(axes: Any, values: Sequence[float]) -> None:
    """Limits that a single wild value does not set: up to the 95th percentile, doubled."""
    finite = sorted(value for value in values if isfinite(value))
    if len(finite) > 20 and finite[-1] > 3 * finite[int(0.95 * len(finite))]:
        axes.set_ylim(min(0.0, finite[0]), 2 * finite[int(0.95 * len(finite))])


def codebook_curve(records: Sequence[Record]) -> str:
    """Perplexity and share of the codes in use, over training."""
    several = len(records) > 1
    with drawing() as figure:
        axes = figure.subplots()
        share = axes.twinx()
        share.grid(False)
        for record, colour in zip(records, _cycle(len(records)), strict=True):
            perplexity, used = record.series("perplexity"), record.series("coverage")
            entry = record.name if several else "perplexity (left)"
            axes.plot(*perplexity, color=colour, marker=_alone(perplexity), label=entry)
            share.plot(*used, color=colour, linestyle="--", alpha=0.6, label="share in use (right)")
        axes.set(xlabel="updates", title="codes of a window of training batches")
        axes.set_ylim(bottom=0)
        share.set_ylim(0, 1.02)
        share.spines["right"].set_visible(True)
        lines = [*axes.get_lines(), *share.get_lines()[:1]]
        axes.legend(lines, [line.get_label() for line in lines], loc="lower right")
        return to_svg(figure, "codebook perplexity and coverage over training")


def usage_curve(counts: dict[str, Sequence[Any]]) -> str:
    """How often each code is a target, sorted, for the books of each run."""
    with drawing() as figure:
        axes = figure.subplots()
        for (name, books), colour in zip(counts.items(), _cycle(len(counts)), strict=True):
            for book in books:
                total = max(sum(book), 1)
                shares = sorted((count / total for count in book if count), reverse=True)
                axes.plot(range(1, len(shares) + 1), shares, color=colour, label=name)
                name = f"_{name}"  # one entry of the legend for all books
            axes.axhline(1 / len(books[0]), color=GUESS, linestyle=":", label="all equally")
        axes.set(xscale="log", yscale="log", xlabel="rank of the code", title="share of the targets")
        _legend_once(axes)
        return to_svg(figure, "codebook usage, sorted")


def gradient_curve(records: Sequence[Record]) -> str:
    """Norm of the gradient before clipping, where it is clipped, and which windows skipped updates."""
    with drawing() as figure:
        axes = figure.subplots()
        for record, colour in zip(records, _cycle(len(records)), strict=True):
            steps, norms = record.series("grad_norm")
            entry = record.name if len(records) > 1 else "norm"
            axes.plot(steps, norms, color=colour, linewidth=1.0, marker=_alone((steps, norms)), label=entry)
            skipped = [step for step, count in zip(*record.series("skipped"), strict=True) if count]
            if skipped:
                axes.plot(skipped, [1.0] * len(skipped), "x", color=colour, transform=axes.get_xaxis_transform(),
                          clip_on=False, label="updates skipped")  # fmt: skip
            clip = record.cfg.trainer.clip_norm
            if clip > 0:
                axes.axhline(clip, color=GUESS, linestyle=":", label=f"clipped at {clip:g}")
        if any(norm > 0 for record in records for norm in record.series("grad_norm")[1]):
            axes.set_yscale("log")
        axes.set(xlabel="updates", title="gradient norm (last update of each window)")
        _legend_once(axes)
        return to_svg(figure, "gradient norm over training")


def rate_curve(records: Sequence[Record]) -> str:
    """The learning rate, and the norm of all parameters."""
    with drawing() as figure:
        rate, norm = figure.subplots(2, 1, sharex=True)
        for record, colour in zip(records, _cycle(len(records)), strict=True):
            for axes, name in ((rate, "lr"), (norm, "param_norm")):
                values = record.series(name)
                axes.plot(*values, color=colour, marker=_alone(values))
        for axes, name in ((rate, "lr"), (norm, "param_norm")):
            _log_if_wide(axes, [record.series(name)[1] for record in records])
        rate.set(title="learning rate")
        norm.set(title="norm of all parameters", xlabel="updates")
        return to_svg(figure, "learning rate and parameter norm")


def speed_curve(records: Sequence[Record]) -> str:
    """Seconds of audio a second, over training."""
    with drawing() as figure:
        axes = figure.subplots()
        for record, colour in zip(records, _cycle(len(records)), strict=True):
            timed = [line for line in record.steps if "time" in line]
            rates = [line["time"]["audio_seconds_per_second"] for line in timed]
            axes.plot([line["step"] for line in timed], rates, color=colour, linewidth=1.0, label=record.name)
        axes.set(xlabel="updates", title="seconds of audio a second, of all ranks")
        axes.set_ylim(bottom=0)
        if len(records) > 1:
            axes.legend()
        return to_svg(figure, "speed over training")


def time_bars(parts: dict[str, dict[str, float]]) -> str:
    """Minutes of each run by what it did in them."""
    with drawing(height=0.9 + 0.35 * len(parts)) as figure:
        axes = figure.subplots()
        left = [0.0] * len(parts)
        for kind, colour in zip(next(iter(parts.values()), {}), ("#1f5fa8", "#8fb4dc", "#d5d9df"), strict=False):
            values = [found[kind] / 60 for found in parts.values()]
            axes.barh(list(parts), values, left=left, color=colour, label=kind, height=0.6)
            left = [before + value for before, value in zip(left, values, strict=True)]
        axes.set(xlabel="minutes")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        return to_svg(figure, "time by part")


def _log_if_wide(axes: Any, runs: Sequence[Sequence[float]]) -> None:
    """A logarithmic scale where the runs are orders of magnitude apart."""
    most = [max(finite) for values in runs if (finite := [v for v in values if isfinite(v) and v > 0])]
    if most and max(most) > 100 * min(most):
        axes.set_yscale("log")


def _legend_once(axes: Any) -> None:
    """A legend without repetitions."""
    handles, labels = axes.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    if len(found) > 1:
        axes.legend(list(found.values()), list(found))


def _cycle(number: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(number)]

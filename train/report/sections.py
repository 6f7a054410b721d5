"""The sections of a report, each from what the runs recorded: a function from records to HTML text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.checkpoint import retention
from nest_fn.config import Config, ConfigError
from nest_fn.errors import CheckpointError, NestError
from nest_fn.layers.tree import flatten
from nest_fn.train.data.dataset import Dataset, open_dataset
from nest_fn.train.rerun.compare import changed_entries

from . import curves, page, pictures
from .analyses import NoiseFloor
from .examples import Examples
from .record import Record
from .verdict import verdict

_UNLISTED = ("data.train", "data.valid", "data.noise", "data.rir")  # paths, which the section on data names
_SHOWN = 30
_SPLITS = {"train": "training", "valid": "validation"}


def verdict_section(records: Sequence[Record]) -> str:
    """Each run in words."""
    parts = []
    for record in records:
        sentences = "".join(f'<li class="{one.kind}">{page.text(one.text)}</li>' for one in verdict(record))
        name = f"<h3>{page.text(record.name)}</h3>" if len(records) > 1 else ""
        parts.append(f'{name}<ul class="verdict">{sentences}</ul>')
    return page.section("Verdict", *parts)


def learning_section(records: Sequence[Record], floors: Sequence[NoiseFloor] = ()) -> str:
    """Loss and accuracy, with what guessing reaches, and the quantizer's noise floors where they were computed."""
    begun = [record for record in records if record.steps]
    if not begun:
        return ""
    told = ["Faint: training. Dotted: always guessing the commonest masked token.", *(one.told for one in floors)]
    return page.section(
        "What it has learnt",
        page.figures(
            page.figure(
                curves.loss_curve(begun),
                "Faint: training. Dotted: guessing each token by its frequency (the logarithm of the perplexity).",
            ),
            page.figure(curves.accuracy_curve(begun, floors), " ".join(told)),
        ),
        _last_numbers(begun),
    )


def _last_numbers(records: Sequence[Record]) -> str:
    names = ("loss", "accuracy", "unigram_accuracy", "unmasked_accuracy", "coverage", "perplexity")
    rows = []
    for record in records:
        for valid, kind in ((False, "training"), (True, "validation")):
            values = [record.last(name, valid) for name in names]
            if any(value is not None for value in values):
                rows.append([record.name, kind, *("" if value is None else page.number(value) for value in values)])
    head = ("run", "last line of", "loss", "accuracy", "commonest", "unmasked", "codes used", "perplexity")
    return page.table(head, rows, numbers=range(2, 8))


def codes_section(records: Sequence[Record], examples: dict[str, Examples]) -> str:
    """The codebook: over training, and sorted."""
    begun = [record for record in records if record.steps]
    counts = {name: made.counts.tolist() for name, made in examples.items() if made.counts.sum()}
    told = "; ".join(
        f"{f'{name}: ' if len(records) > 1 else ''}{made.counted_s:.0f} s of {_SPLITS[made.split]} data"
        for name, made in examples.items()
    )
    return page.section(
        "Codes of the quantizer",
        page.figures(
            page.figure(curves.codebook_curve(begun)) if begun else "",
            page.figure(curves.usage_curve(counts), f"Counted over {told}.") if counts else "",
        ),
    )


def utterances_section(records: Sequence[Record], examples: dict[str, Examples | str]) -> str:
    """Three utterances of each run: what the model hears, is to guess and guesses."""
    parts = []
    for record in records:
        made = examples.get(record.name)
        name = f"{record.name}: " if len(records) > 1 else ""
        if isinstance(made, str):
            parts.append(page.paragraph(f"{name}not shown: {made}", soft=True))
        elif made is not None:
            parts.append(page.paragraph(
                f"{name}The model of step {made.step:,}, on utterances of the {_SPLITS[made.split]} data, with the "
                "masks and the noise of validation.", soft=True,
            ))  # fmt: skip
            parts += [_utterance(one, record.cfg) for one in made.utterances]
    return page.section("Utterances", *parts)


def _utterance(one: Any, cfg: Config) -> str:
    right = (one.targets == one.guesses) & one.masked
    told = f"{one.name} ({one.seconds:.2f} s): {right.sum()} of {one.masked.sum()} hidden tokens right"
    if one.masked.any():
        told += f", geometric mean of the targets' probabilities {_geometric_mean(one.chance[one.masked]):.3f}"
    sounds = (("clean", one.audio), ("as heard", one.noisy))
    players = "".join(page.sound(label, samples, cfg.sample_rate) for label, samples in sounds)
    rows = [
        (index, "yes" if hidden else "", target, guess, f"{chance:.3f}")
        for index, (hidden, target, guess, chance) in enumerate(
            zip(one.masked.tolist(), one.targets.tolist(), one.guesses.tolist(), one.chance.tolist(), strict=True)
        )
    ]
    head = ("token", "hidden", "target", "guess", "probability of the target")
    return (
        f"<h3>{page.text(told)}</h3>" + page.figure(pictures.utterance_picture(one, cfg), wide=True)
        + f'<div class="sound">{players}</div>'
        + page.details("its tokens as numbers", page.table(head, rows, numbers=(0, 2, 3, 4)))
    )  # fmt: skip


def _geometric_mean(chance: Any) -> float:
    return float(np.exp(np.log(np.maximum(chance, 1e-12)).mean()))


def optimisation_section(records: Sequence[Record]) -> str:
    """Gradient norm, learning rate, parameter norm."""
    begun = [record for record in records if record.steps]
    if not begun:
        return ""
    figures = page.figures(page.figure(curves.gradient_curve(begun)), page.figure(curves.rate_curve(begun)))
    return page.section("Gradients and steps", figures)


def data_section(records: Sequence[Record], overrides: Sequence[str]) -> str:
    """Hours, durations and padding of each run's training data."""
    parts: list[str] = []
    seen: dict[str, str] = {}  # names of runs by the digest of their data
    for record in records:
        try:
            cfg = record.cfg.override(*overrides) if overrides else record.cfg
            dataset = open_dataset(cfg.data, cfg.trainer.seed, sample_rate=cfg.sample_rate)
        except (NestError, ConfigError, OSError) as error:
            parts.append(page.paragraph(f"{record.name}: the data cannot be read here: {error}", soft=True))
            continue
        name = seen.setdefault(dataset.digest, record.name)
        told = _data(dataset) if name == record.name else page.paragraph(f"The same data in the same order as {name}.")
        parts.append((f"<h3>{page.text(record.name)}</h3>" if len(records) > 1 else "") + told)
    return page.section("Data", *parts)


def _data(dataset: Dataset) -> str:
    plan, rate = dataset.plan(0), dataset.sample_rate
    by_bucket = []
    for place, width in enumerate(dataset.shapes.width.tolist()):
        batches = np.flatnonzero(plan.shape == place)
        computed = len(batches) * int(dataset.shapes.rows[place]) * width / rate / 3600
        held = sum(int(dataset.length[plan.index[plan.start[b] : plan.start[b + 1]]].sum()) for b in batches)
        by_bucket.append((width / rate, held / rate / 3600, computed - held / rate / 3600))
    duration = dataset.manifest.duration
    least, middle, most = np.quantile(duration, (0.0, 0.5, 1.0)).tolist()
    left_out = "".join(f"; {count:,} left out {rule}" for rule, count in dataset.manifest.dropped)
    told = (
        f"{len(duration):,} utterances, {duration.sum() / 3600:.2f} hours, from {least:.2f} s over {middle:.2f} s "
        f"(median) to {most:.2f} s{left_out}. {len(plan):,} batches an epoch in {len(by_bucket)} shapes; "
        f"{1 - plan.efficiency(dataset.length):.1%} of the computed samples are padding."
    )
    return page.paragraph(told) + page.figures(
        page.figure(pictures.duration_histogram(dataset, [one[0] for one in by_bucket])),
        page.figure(pictures.padding_bars([one for one in by_bucket if one[1] + one[2] > 0])),
    )


def time_section(records: Sequence[Record]) -> str:
    """Where the time went, and how fast it was."""
    begun = [record for record in records if record.steps]
    if not begun:
        return ""
    parts: dict[str, dict[str, float]] = {}
    for record in begun:
        steps = sum(line.get("time", {}).get("seconds", 0.0) for line in record.steps)
        valid = sum(line.get("time", {}).get("seconds", 0.0) for line in record.valid)
        rest = max(record.seconds - steps - valid, 0.0)
        parts[record.name] = {"updates": steps, "validation": valid, "start, saving, the rest": rest}
    return page.section(
        "Time",
        page.figures(page.figure(curves.speed_curve(begun)), page.figure(curves.time_bars(parts))),
        page.paragraph("The parts of one step: nest-fn bench step.", soft=True),
    )


def settings_section(records: Sequence[Record]) -> str:
    """Each run's settings as the difference to the preset that is nearest to them; then the runs' to each other."""
    parts = []
    for record in records:
        name, changed = nearest_preset(record.cfg)
        told = f"{record.name}: as the preset {name}" + (", but for:" if changed else ".")
        rows = [(key, *value.split(" -> ", 1)) for key, _, value in (line.partition(": ") for line in changed)]
        parts += [page.paragraph(told), page.table(("setting", "preset", "here"), rows[:200])]
    if len(records) > 1:
        trees = [flatten(record.cfg.to_dict()) for record in records]
        keys = list(dict.fromkeys(key for tree in trees for key in tree))
        values = {key: [str(tree.get(key)) for tree in trees] for key in keys}
        other = [(key, *found) for key, found in values.items() if len(set(found)) > 1]
        parts.append(page.table(("setting that differs", *(record.name for record in records)), other))
    return page.section("Settings", *parts)


def nearest_preset(cfg: Config) -> tuple[str, list[str]]:
    """The preset with the fewest other settings, and these as ``key: preset -> here``; paths of data do not count."""
    here = flatten(cfg.to_dict())
    found = []
    for file in sorted(resources.files("nest_fn.configs").iterdir(), key=lambda file: file.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            there = flatten(Config.preset(name).to_dict())
            kept = [{k: v for k, v in tree.items() if not k.startswith(_UNLISTED)} for tree in (there, here)]
            found.append((name, changed_entries(*kept)))
    return min(found, key=lambda one: len(one[1]))


def warnings_section(records: Sequence[Record]) -> str:
    """What the runs warned of."""
    parts = []
    for record in records:
        told = list(dict.fromkeys(record.warnings))
        shown = "".join(f"<li>{page.text(line)}</li>" for line in told[:_SHOWN])
        more = (
            page.paragraph(f"and {len(told) - _SHOWN} more, in {record.folder}/log.txt") if len(told) > _SHOWN else ""
        )
        if told:
            parts.append(page.details(f"{record.name}: {len(told)} different warnings", f"<ul>{shown}</ul>{more}"))
    return page.section("Warnings", *parts)


def reproducibility_section(records: Sequence[Record]) -> str:
    """Seed, digests, versions, command and machine, so that a run can be made again."""
    return page.section("To make it again", *(_reproducibility(record, len(records) > 1) for record in records))


def _reproducibility(record: Record, named: bool) -> str:
    rows: list[tuple[str, Any]] = [("seed", record.cfg.trainer.seed)]
    rows += [(f"data, {split}", _digest_of(entry)) for split, entry in record.data.items()]
    names = {"code": "code (SHA-256)", "torch": "PyTorch", "nest_fn": "nest_fn", "python": "Python"}
    for name, value in record.environment.items():
        if name != "executable" and value != []:
            rows.append((names.get(name, name), ", ".join(value) if isinstance(value, list) else value))
    if record.checkpoints:
        rows.append(("newest checkpoint", _checkpoint(record.checkpoints[-1])))
    rows.append(("run folder", record.folder))
    lines = [record.command] if record.command else []
    lines.append(f"nest-fn verify {shlex.quote(str(record.folder))}   # a part of it again, compared to the last bit")
    head = f"<h3>{page.text(record.name)}</h3>" if named else ""
    told = "".join(f"{line}\n" for line in lines)
    return f"{head}{page.table((), rows)}<pre>{page.text(told)}</pre>"


def _digest_of(entry: Any) -> str:
    if not isinstance(entry, dict):
        return str(entry)
    return f"{entry.get('digest', '?')}  ({', '.join(Path(str(file)).name for file in entry.get('files', ()))})"


def _checkpoint(path: Path) -> str:
    try:
        files = checkpoint_folder.read_meta(path)["files"]
    except CheckpointError as error:
        return str(error)
    params = next((entry["sha256"] for name, entry in files.items() if name.startswith("params.")), "?")
    return f"step {retention.step_of(path):,}, parameters {params}"

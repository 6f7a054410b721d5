"""What ``nest-fn analyse`` found: probes and CKA by layer, the quantizer's noise floor, tables of the rest."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nest_fn.files.inputs import read_plain
from nest_fn.layers.tree import flatten
from nest_fn.train.errors import UsageError

from . import page
from .drawing import COLOURS, GUESS, drawing, to_svg

_PICTURES = {".png": "image/png", ".jpg": "image/jpeg"}
_ROWS = 400  # of a table
_FEW = 12  # values that are shown at once
_DRAWN = ("probes_", "representations_cka.")  # pictures of which the page draws its own
_BASES = (("log_mel", "log-mel", "--"), ("commonest", "the commonest class", ":"))


class NoiseFloor(NamedTuple):
    """How many target tokens noise leaves as they are, of an analysis ``stability``."""

    name: str  # the analysis's folder
    as_mixed: float  # with the noise of validation
    by_snr: dict[float, float]  # by dB

    @property
    def told(self) -> str:
        """In words, with what it bounds."""
        some = {snr: kept for snr, kept in self.by_snr.items() if snr in (0.0, 10.0, 20.0)}
        more = "".join(f", {kept:.1%} at {snr:g} dB" for snr, kept in some.items())
        return (
            f"Dash-dotted: quantizing what the model hears, with nothing hidden, gets {self.as_mixed:.1%} of the "
            f"targets right under the noise of validation{more}: a bound for a model that reads tokens off its input, "
            "not for one that undoes the noise."
        )


def noise_floors(paths: Sequence[Path]) -> list[NoiseFloor]:
    """The noise floors that were computed, if ``stability`` is among the analyses."""
    return [
        NoiseFloor(file.parent.name, float(one["kept_as_mixed"]),
                   dict(zip(map(float, one["snr_db"]), map(float, one["kept_by_snr"]), strict=True)))
        for file, one in _named(paths, "stability", ("kept_as_mixed", "snr_db", "kept_by_snr"))
    ]  # fmt: skip


def layers_section(paths: Sequence[Path]) -> str:
    """Probes and CKA by layer, where they were computed."""
    shown = []
    for _, found in _named(paths, "probes", ()):
        shown += [_probe(label, one) for label, one in found.items() if isinstance(one, dict) and "layers" in one]
    for _, found in _named(paths, "representations", ("cka", "cka_with")):
        shown.append(page.figure(_cka(found["cka"]), _about_cka(found)))
    return page.section("Layers", page.figures(*shown)) if shown else ""


def _probe(label: str, found: dict[str, Any]) -> str:
    with drawing() as figure:
        axes = figure.subplots()
        for (name, values), colour in zip(found["layers"].items(), COLOURS, strict=False):
            axes.plot(range(len(values)), values, color=colour, marker="o", markersize=3, label=name)
        for key, name, style in _BASES:
            axes.axhline(found[key], color=GUESS, linestyle=style, label=name)
        axes.set(xlabel="layer", title=f"linear probe for {label}: accuracy")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()
        drawn = to_svg(figure, f"accuracy of a linear probe for {label} by layer")
    others = "" if found["held_back_by"] == found["of"] else f", of other {found['held_back_by']}"
    return page.figure(
        drawn, f"{found['classes']} classes; fitted on {found['fitted_on']:,} {found['of']}, scored on "
        f"{found['held_back']:,} held back{others}.",
    )  # fmt: skip


def _cka(values: Sequence[Sequence[float]]) -> str:
    with drawing() as figure:
        axes = figure.subplots()
        axes.grid(False)
        cells = axes.pcolormesh(values, vmin=0, vmax=1, cmap="viridis")
        cells.set_edgecolor("face")
        figure.colorbar(cells, ax=axes)
        middles = [0.5, len(values) - 0.5]
        axes.set(xlabel="layer", ylabel="layer", title="likeness of layers (linear CKA)", aspect="equal")
        for axis, last in ((axes.xaxis, len(values[0]) - 1), (axes.yaxis, len(values) - 1)):
            axis.set_ticks([middles[0], last + 0.5], ["0", str(last)])
        return to_svg(figure, "linear CKA between layers")


def _about_cka(found: dict[str, Any]) -> str:
    of = "this model and of the other" if found["cka_with"] == "against" else "one model"
    return f"1: the same up to a rotation and a scale. Layers of {of}, {found.get('frames', 0):,} frames."


def _named(paths: Sequence[Path], name: str, keys: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The JSON files that an analysis of this name wrote, with what they hold."""
    for file in _files(paths):
        if file.name == f"{name}.json":
            found = _read(file)
            if isinstance(found, dict) and "about" in found and all(key in found for key in keys):
                yield file, found


def tables_section(paths: Sequence[Path]) -> str:
    """Tables of all JSON files, and the pictures that the page does not draw itself."""
    return page.section("Analyses", *(_analysis(file) for file in _files(paths)))


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.exists():
            raise UsageError(f"report: {path} is not there; give files or folders that an analysis wrote.")
        files = sorted(child for child in path.rglob("*") if child.is_file()) if path.is_dir() else [path]
        yield from (file for file in files if not file.name.startswith(".") and file.name != "origin.json")


def _analysis(file: Path) -> str:
    if file.suffix in _PICTURES and not file.name.startswith(_DRAWN):
        data = base64.b64encode(read_plain(file)).decode()
        return page.figure(
            f'<img alt="{page.text(file.stem)}" src="data:{_PICTURES[file.suffix]};base64,{data}">', file.stem
        )
    if file.suffix != ".json":
        return ""
    return f"<h3>{page.text(file.stem)}</h3>{_values(_read(file))}"


def _read(file: Path) -> Any:
    try:
        return json.loads(read_plain(file))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"report: {file} is no JSON: {error}.") from error


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

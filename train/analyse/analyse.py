"""``nest-fn analyse RUN WHAT...``: runs analyses of a model and writes what they find, one after another.

Each analysis writes ``NAME.json`` (what was measured, and its figures), ``NAME.npz`` (arrays) and, with matplotlib,
pictures ``NAME_*.png``. A second call of the same command makes only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nest_fn.analysis.paths import check_targets
from nest_fn.config import Config
from nest_fn.encoder import LOCAL
from nest_fn.extras import has_extra
from nest_fn.files.atomic import anything, atomic_write
from nest_fn.files.outputs import begin, claim, finish
from nest_fn.interop.convert import model_digest
from nest_fn.train.data.dataset import Dataset
from nest_fn.train.downstream.inference import Model
from nest_fn.train.downstream.settings import model_alone
from nest_fn.train.errors import MemoryExhausted, UsageError, is_out_of_memory
from nest_fn.version import versions

from .of_labels import analyse_probes, probes_obstacle
from .of_parameters import analyse_curvature, analyse_gradients, analyse_path, analyse_randomness
from .of_signals import (
    analyse_attention,
    analyse_codes,
    analyse_representations,
    analyse_sensitivity,
    analyse_stability,
)
from .pictures import draw
from .result import Result, plain
from .subject import Subject

ANALYSES: dict[str, Callable[[Subject], Result]] = {
    "attention": analyse_attention,
    "codes": analyse_codes,
    "curvature": analyse_curvature,
    "gradients": analyse_gradients,
    "path": analyse_path,
    "probes": analyse_probes,
    "randomness": analyse_randomness,
    "representations": analyse_representations,
    "sensitivity": analyse_sensitivity,
    "stability": analyse_stability,
}


def analyse(
    subject: Subject, dataset: Dataset, what: Sequence[str], out: Path, settings: Mapping[str, Any], *,
    inputs: Sequence[str], overwrite: bool = False,
) -> Iterator[str]:  # fmt: skip
    """Run the analyses ``what`` and write into the folder ``out``; yields a line about each.

    ``all`` stands for those that are possible. ``settings`` are what else the findings depend on. Raises
    ``UsageError``, ``OutputError``, ``MemoryExhausted``.
    """
    pictures = has_extra("matplotlib")
    obstacles = {name: _obstacle(name, subject) for name in (ANALYSES if "all" in what else sorted(set(what)))}
    for name, obstacle in obstacles.items():
        if obstacle is not None and "all" not in what:
            raise UsageError(f"analyse {name}: {obstacle}")
    names = [name for name, obstacle in obstacles.items() if obstacle is None]
    origin = {
        "command": "analyse", "what": names, "model": _digest(subject.model), "data": dataset.manifest.digest,
        "against": None if subject.against is None else _digest(subject.against), "pictures": pictures,
        "reading": _reading(subject.model.cfg), **settings, **versions(),
    }  # fmt: skip
    place = claim(out, origin, folder=True, inputs=inputs, overwrite=overwrite)
    if place.done:
        yield f"{out} holds the same analyses, finished"
        return
    begin(place)
    files: list[str] = []
    for name in names:
        made = _made(out, name)
        if made is None:
            made = _write(out, name, _explained(name, subject), pictures)
        files += made
        yield f"{name}: {', '.join(made)}"
    finish(place, files)
    yield from (f"left out {name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle is not None)
    if not pictures:
        yield "no pictures were drawn, for matplotlib is not installed: pip install 'nest-fn[analysis]'"


def _digest(model: Model) -> str:
    return model_digest(model.params, model.state, model_alone(model.cfg))


def _reading(cfg: Config) -> dict[str, Any]:
    """How utterances were chosen, read, batched and mixed; where files lie does not matter."""
    paths = ("train", "valid", "root", "remote_cache", "train_shards", "valid_shards")
    return {name: value for name, value in cfg.to_dict()["data"].items() if name not in paths}


def _obstacle(name: str, subject: Subject) -> str | None:
    """Why an analysis is not possible; None if it is."""
    if name == "attention" and subject.model.cfg.encoder.self_attention_model == LOCAL:
        return "local attention has no weight for every two frames; its window bounds the span."
    if name == "path" and subject.against is None and not subject.earlier:
        return "there is no other model; name one with --against, or give a run with more checkpoints."
    if name in ("probes", "representations") and subject.model.cfg.encoder.reduction is not None:
        return "the layers have lengths of their own (encoder.reduction), so that their frames do not pair."
    if name == "probes":
        return probes_obstacle(subject)
    if name == "path" and subject.against is not None:
        try:
            check_targets(subject.model.state, subject.against.state)
        except ValueError as error:
            return f"--against: {error}"
    return None


def _explained(name: str, subject: Subject) -> Result:
    """The analysis; an out-of-memory error says what to do."""
    try:
        return ANALYSES[name](subject)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhausted(
            f"out of memory in {name}; lower --memory, data.batch_seconds or data.max_batch_size. What was written "
            "stays; --overwrite it, or choose another folder."
        ) from None


def _made(out: Path, name: str) -> list[str] | None:
    """The files of an analysis that an earlier call finished: its JSON, written last, lists them."""
    try:
        return [str(file) for file in json.loads((out / f"{name}.json").read_text(encoding="utf-8"))["files"]]
    except (OSError, ValueError, KeyError):
        return None


def _write(out: Path, name: str, result: Result, pictures: bool) -> list[str]:
    files = [f"{name}.npz", f"{name}.json"]
    arrays: dict[str, NDArray[Any]] = {key: leaf.cpu().numpy() for key, leaf in result.arrays.items()}
    with atomic_write(out / files[0], 0, replaces=anything) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    for picture in result.pictures if pictures else ():
        files.append(f"{name}_{picture.name}.png")
        draw(picture, out / files[-1])
    content = {"about": " ".join(result.about.split()), **plain(result.summary), "files": files}
    with atomic_write(out / f"{name}.json", 0, replaces=anything) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return files

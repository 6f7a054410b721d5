"""Translates the reference's YAML to ours: sections that differ, keys that are ignored, keys that are refused.

Translated: ``train_ds``, ``validation_ds`` and ``batch_augmentor`` (to ``data``), a Lightning ``trainer``, ``_target_``
keys, ``normalize`` with fixed statistics, ``NoamAnnealing`` and ``CosineAnnealing``. Ignored, with a remark in
``Config.advice``: exactly the keys that ``nemo_keys`` lists. All data sections of the reference become the one section
``data``, so that validation uses the noise and augmentation of the training set, ``test_ds`` is not read, and
``batch_size`` limits a batch together with ``data.batch_seconds``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .nemo_keys import (
    ALTERNATIVES,
    DATA_COUNTERPARTS,
    DATA_INERT,
    DATA_REFUSED_UNLESS_FALSE,
    MODEL_INERT,
    PRECISIONS,
    REFUSED_UNLESS_FALSE,
    SCHEDULES,
    SECTION_INERT,
    SECTIONS,
    SILENT,
    TARGETS,
    TOP_LEVEL_INERT,
    TRAINER_COUNTERPARTS,
    TRAINER_INERT,
)
from .problems import Problems

Tree = dict[str, Any]


def read_dialect(tree: Mapping[str, Any], problems: Problems) -> Tree:
    """Translate a whole file, ours or the reference's, to our flat mapping (model keys, ``data``, ``trainer``).

    Problems are recorded in ``problems``, and also the paths of keys in the user's file.
    """
    root = {key: value for key, value in tree.items() if key not in TOP_LEVEL_INERT}
    _without_effect("", tree, TOP_LEVEL_INERT, problems)
    if isinstance(root.get("model"), Mapping):
        model = dict(root.pop("model"))
        problems.written[""] = "model"
        for key in root:
            problems.written[key] = key
            if key in model:
                problems.add(key, f"stands both at the top level and in 'model'; keep one '{key}'")
    else:
        if root.get("model", 0) is None:
            root.pop("model")
        model, root = root, {}
    flat = {key: value for key, value in {**model, **root}.items() if key not in MODEL_INERT}
    _without_effect("", model, MODEL_INERT, problems)
    _check_target(flat, "target", "model", "target", problems)
    for name in SECTIONS:
        if isinstance(flat.get(name), Mapping):
            flat[name] = _section(name, flat[name], name, problems)
    _spec_augment(flat.pop("spec_augment", None), problems)
    _skip_nan(flat, problems)
    _translate_off_and_fixed(flat)
    _optim(flat, problems)
    _data(flat, problems)
    _trainer(flat, problems)
    _inherit(flat)
    return flat


def _without_effect(section: str, given: Mapping[str, Any], inert: set[str], problems: Problems) -> None:
    """Record those inert keys that are given and not off (false or null)."""
    asked = [key for key, value in given.items() if key in inert - SILENT and value not in (None, False)]
    problems.without_effect(section, asked, ALTERNATIVES)


def _check_target(section: Tree, key: str, name: str, path: str, problems: Problems) -> None:
    """Drop a class path if it names the class that we implement; record a problem for any other."""
    target = section.pop(key, None)
    expected = TARGETS.get(name, set())
    if target is not None and str(target).rpartition(".")[2] not in expected:
        wanted = f"only {' or '.join(sorted(expected))} is read" if expected else "no class is read"
        problems.add(path, f"names '{target}'; {wanted} here")


def _section(name: str, given: Mapping[str, Any], path: str, problems: Problems) -> Tree:
    """Copy a section without its class path and inert keys."""
    section = {key: value for key, value in given.items() if key not in SECTION_INERT.get(name, ())}
    _check_target(section, "_target_", name, f"{path}._target_", problems)
    for (owner, key), reason in REFUSED_UNLESS_FALSE.items():
        if owner == name and section.pop(key, None):
            problems.add(f"{path}.{key}", reason)
    return section


def _spec_augment(section: Any, problems: Problems) -> None:
    """Check that SpecAugment is off, as in all recipes of the reference."""
    if section is None:
        return
    if not isinstance(section, Mapping):
        problems.add("spec_augment", "wants a mapping")
        return
    rest = _section("spec_augment", section, "spec_augment", problems)
    for key in ("freq_masks", "time_masks"):
        if rest.pop(key, 0):
            problems.add(f"spec_augment.{key}", "must be 0; the input is masked by 'masking'")
    for key in rest.keys() - {"freq_width", "time_width", "rng", "mask_value", "use_numba_kernel"}:
        problems.unknown(f"spec_augment.{key}", ("freq_masks", "time_masks", "freq_width", "time_width"))


def _skip_nan(flat: Tree, problems: Problems) -> None:
    if flat.pop("skip_nan_grad", None):
        problems.add("skip_nan_grad", "is not supported; a batch without masked tokens has loss 0 here")


def _translate_off_and_fixed(flat: Tree) -> None:
    """Translate ``false`` for None, and fixed statistics given as a mapping."""
    section = flat.get("preprocessor")
    if isinstance(section, dict):
        fixed = section.get("normalize")
        if isinstance(fixed, Mapping) and {"fixed_mean", "fixed_std"} == set(fixed):
            section |= {"normalize": "fixed", **fixed}
        elif fixed is False:
            section["normalize"] = None
    encoder = flat.get("encoder")
    if isinstance(encoder, dict) and (encoder.get("subsampling") is False or encoder.get("subsampling") == ""):
        encoder["subsampling"] = None


def _optim(flat: Tree, problems: Problems) -> None:
    optim = flat.get("optim")
    if not isinstance(optim, dict) or not isinstance(optim.get("sched"), Mapping):
        return
    sched = _section("sched", optim["sched"], "optim.sched", problems)
    name = sched.get("name")
    if isinstance(name, str):
        sched["name"] = SCHEDULES.get(name.lower(), name)
    if sched.get("warmup_ratio") is not None:
        sched.setdefault("warmup_steps", None)
    optim["sched"] = sched


def _inherit(flat: Tree) -> None:
    """Copy the sample rate between its two places, and unset seconds of a window that is given in samples."""
    section = flat.setdefault("preprocessor", {})
    if not isinstance(section, dict):
        return
    if section.get("sample_rate") is None:
        section["sample_rate"] = flat.get("sample_rate")
    elif flat.get("sample_rate") is None:
        flat["sample_rate"] = section["sample_rate"]
    for samples, seconds in (("n_window_size", "window_size"), ("n_window_stride", "window_stride")):
        if section.get(samples) is not None:
            section.setdefault(seconds, None)


def _data(flat: Tree, problems: Problems) -> None:
    """Translate ``train_ds`` and ``validation_ds`` to ``data``; values of a given ``data`` section take precedence."""
    found: Tree = {}
    for name in ("train_ds", "validation_ds"):
        given = flat.pop(name, None)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            problems.add(name, "wants a mapping")
            continue
        values = _data_set(name, given, flat.get("sample_rate"), problems)
        inert = DATA_INERT
        if name == "validation_ds":
            inert = inert | {
                key
                for key, ours in DATA_COUNTERPARTS.items()
                if ours != "train" and values.get(ours) != found.get(ours)
            }
            values = {"valid": values["train"]} if "train" in values else {}
            problems.written["data.valid"] = f"{problems.name(name)}.manifest_filepath"
        _without_effect(name, given, inert - {"sample_rate"}, problems)
        found |= values
    own = flat.get("data")
    if found and (own is None or isinstance(own, Mapping)):
        flat["data"] = {**found, **(own or {})}


def _data_set(name: str, given: Mapping[str, Any], sample_rate: Any, problems: Problems) -> Tree:
    values: Tree = {}
    for key, value in given.items():
        path = f"{name}.{key}"
        if key in DATA_COUNTERPARTS:
            if value is not None:
                values[DATA_COUNTERPARTS[key]] = value
            if name == "train_ds":
                problems.written[f"data.{DATA_COUNTERPARTS[key]}"] = problems.name(path)
        elif key in DATA_REFUSED_UNLESS_FALSE:
            problems.require(not value, path, DATA_REFUSED_UNLESS_FALSE[key])
        elif key not in DATA_INERT:
            problems.unknown(path, DATA_COUNTERPARTS)
    rate = given.get("sample_rate")
    problems.require(
        rate is None or sample_rate is None or rate == sample_rate,
        f"{name}.sample_rate",
        f"is {rate}, the model's is {sample_rate}; leave it out",
    )
    if isinstance(values.get("augment"), Mapping):
        values["augment"] = _section("batch_augmentor", values["augment"], f"{name}.batch_augmentor", problems)
    if values.get("channel") in ("average", "avg", "mean"):
        values["channel"] = "mix"
    return values


def _trainer(flat: Tree, problems: Problems) -> None:
    """Translate Lightning's ``trainer`` section; keys without counterpart that are known are dropped."""
    if not isinstance(flat.get("trainer"), Mapping):
        return
    trainer: Tree = {}
    _without_effect("trainer", flat["trainer"], TRAINER_INERT, problems)
    for key, value in flat["trainer"].items():
        ours = TRAINER_COUNTERPARTS.get(key, key)
        if key in TRAINER_INERT:
            continue
        if key == "max_steps" and value == -1:
            problems.without_effect("trainer", ["max_steps"], {"max_steps": "-1, no end, is not offered; set it"})
            continue
        if ours in trainer:
            problems.add("trainer", f"gives '{ours}' twice, once as '{key}'; keep one")
        if key == "gradient_clip_algorithm":
            problems.require(value in (None, "norm"), f"trainer.{key}", "must be 'norm'; clipping is by norm")
            continue
        if key == "precision":
            value = next((own for own, names in PRECISIONS.items() if str(value) in names), value)
        if ours != key:
            problems.written[f"trainer.{ours}"] = problems.name(f"trainer.{key}")
        trainer[ours] = value
    flat["trainer"] = trainer

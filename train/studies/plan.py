"""What a study consists of: ``study.yaml`` to arms and seeds, and each run's config and folder.

    config: demo                          # a preset or a YAML file
    overrides: [data.train=train.jsonl, data.valid=valid.jsonl, trainer.max_steps=2000]
    seeds: [0, 1, 2]
    arms:                                 # or grid: {masking.block_size: [24, 40], optim.lr: [1e-3, 2e-3]}
      240 ms: []
      400 ms: [masking.block_size=40, masking.mask_prob=0.01]
    baseline: 240 ms                      # default: the first arm
    measures: [valid.loss, valid.accuracy]

Runs of one seed have the same initial values, utterances, masks and noise in every arm, as far as the arm's settings
allow, since every draw is a function of the seed and the utterance.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nest_fn.config import Config, ConfigError
from nest_fn.config.parse.yaml_io import read
from nest_fn.files.quoting import shown
from nest_fn.train.errors import UsageError

MEASURES = ("valid.loss", "valid.accuracy")
_KEYS = ("config", "overrides", "seeds", "arms", "grid", "baseline", "measures")
_NAME = re.compile(r"[\w=+,-][\w=+,. -]{0,150}")
_MOST = 10_000  # runs


@dataclass(frozen=True)
class Study:
    """The arms and seeds of a study."""

    config: str
    overrides: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]  # overrides by name
    seeds: tuple[int, ...]
    baseline: str
    measures: tuple[str, ...]  # dotted names within a line of metrics; of validation if they begin with valid.

    @property
    def tasks(self) -> list[Task]:
        """Every run: all arms of the first seed, then of the next, so that comparisons are whole early."""
        return [Task(arm, seed) for seed in self.seeds for arm in self.arms]

    def settings(self, task: Task) -> list[str]:
        """All overrides of a run."""
        return [*self.overrides, *self.arms[task.arm], f"trainer.seed={task.seed}"]

    def cfg(self, task: Task) -> Config:
        """The config of a run. Raises ``ConfigError``."""
        if Path(self.config).is_file() or self.config.endswith((".yaml", ".yml")):
            return Config.from_yaml(self.config, self.settings(task))
        return Config.preset(self.config, self.settings(task))


@dataclass(frozen=True)
class Task:
    """One run of a study."""

    arm: str
    seed: int

    def folder(self, study: Path) -> Path:
        """Its run folder."""
        return study / "runs" / self.arm / f"seed_{self.seed}"

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


def read_study(path: str | Path) -> Study:
    """Read ``study.yaml`` and check every run's config. Raises ``UsageError``, ``ConfigError``."""
    study = _study(str(path), read(path))
    for task in study.tasks:
        try:
            study.cfg(task)
        except ConfigError as error:
            raise UsageError(f"{path}: {task}: {error}") from error
    return study


def _study(where: str, found: dict[str, Any]) -> Study:
    unknown = [key for key in found if key not in _KEYS]
    if unknown:
        raise UsageError(f"{where}: {shown(unknown[0])} is no key of a study; want {', '.join(_KEYS)}.")
    if ("arms" in found) == ("grid" in found):
        raise UsageError(f"{where}: want either arms (overrides by name) or grid (values by setting).")
    arms = _arms(where, found["arms"]) if "arms" in found else _grid(where, found["grid"])
    seeds = _seeds(where, found.get("seeds", [0, 1, 2]))
    baseline = str(found.get("baseline", next(iter(arms))))
    if baseline not in arms:
        raise UsageError(f"{where}: baseline {shown(baseline)} is no arm; want one of {', '.join(arms)}.")
    if len(arms) * len(seeds) > _MOST:
        raise UsageError(f"{where}: {len(arms)} arms x {len(seeds)} seeds are more than {_MOST:,} runs; want fewer.")
    overrides = _texts(where, "overrides", found.get("overrides", []))
    for text in [*overrides, *itertools.chain.from_iterable(arms.values())]:
        if text.partition("=")[0].strip() == "trainer.seed":
            raise UsageError(f"{where}: {shown(text)}: the seeds of a study stand under seeds.")
    measures = _texts(where, "measures", found.get("measures", list(MEASURES)))
    return Study(str(found.get("config", "nest_large")), overrides, arms, seeds, baseline, measures)


def _arms(where: str, found: Any) -> dict[str, tuple[str, ...]]:
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{where}: arms is {shown(found)}; want a list of overrides for each name.")
    return {_name(where, str(name)): _texts(where, f"arms.{name}", texts or []) for name, texts in found.items()}


def _grid(where: str, found: Any) -> dict[str, tuple[str, ...]]:
    """An arm for each combination of the values."""
    if not isinstance(found, dict) or not found or not all(isinstance(v, list) and v for v in found.values()):
        raise UsageError(f"{where}: grid is {shown(found)}; want a list of values for each setting.")
    arms = {}
    for values in itertools.product(*found.values()):
        texts = [f"{key}={_written(value)}" for key, value in zip(found, values, strict=True)]
        varied = [text for key, text in zip(found, texts, strict=True) if len(found[key]) > 1]
        arms[_name(where, ", ".join(varied or texts))] = tuple(texts)
    return arms


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _name(where: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{where}: {shown(name)} names an arm and its folder; want letters, digits and any of = + , . - _ and "
            "spaces; give the arms by name, under arms."
        )
    return name


def _texts(where: str, key: str, found: Any) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise UsageError(f"{where}: {key} is {shown(found)}; want a list of texts, as [optim.lr=1e-3].")
    return tuple(found)


def _seeds(where: str, found: Any) -> tuple[int, ...]:
    whole = isinstance(found, list) and all(isinstance(seed, int) and not isinstance(seed, bool) for seed in found)
    if not whole or not found or len(set(found)) < len(found):
        raise UsageError(f"{where}: seeds is {shown(found)}; want different whole numbers, as [0, 1, 2].")
    return tuple(found)


def command_of(study: Study, task: Task, folder: Path) -> Sequence[str]:
    """The words with which one run can be started alone."""
    return ["nest-fn", "pretrain", "-c", study.config, "--folder", str(task.folder(folder)), *study.settings(task)]

"""Every number of a configuration has a range, and what lies outside is refused by its own name, on one short line."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from nest_fn.config import Config, ConfigError, TrainerConfig
from nest_fn.config.limits import LIMITS

TUPLES = ("optim.betas", "data.weights", "encoder.att_context_size", "encoder.att_context_probs",
          "encoder.conv_context_size", "preprocessor.fixed_mean", "preprocessor.fixed_std")  # fmt: skip


def numbers(section: Any, path: str = "") -> Iterator[str]:
    """Paths of the settings whose type holds a number."""
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{path}{field.name}.")
        elif {"int", "float"} & set(str(hints[field.name]).replace("'>", " ").replace("[", " ").replace(",", " ")
                                    .replace("]", " ").replace("<class '", " ").split()):  # fmt: skip
            yield f"{path}{field.name}"


def test_every_number_has_a_range() -> None:
    assert sorted(numbers(Config())) == sorted(LIMITS)


@pytest.mark.parametrize("path", LIMITS)
def test_what_lies_outside_is_refused(path: str) -> None:
    limit = LIMITS[path]
    below = limit.low if limit.open_low else limit.low - max(1.0, abs(limit.low) * 1e-3)
    above = limit.high if limit.open_high else limit.high * 1.01 + 1
    for value in (below, above, math.nan, 10**40):
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
        for written in (text, f"[{text},{text}]") if path in TUPLES else (text,):
            with pytest.raises(ConfigError) as caught:
                Config().override(f"{path}={written}")
            first, *others = caught.value.problems
            assert first.startswith(f"'{path}' ") and len(first) < 300
            assert not others or path == "sample_rate"
            assert str(caught.value).startswith(f"override {path}={written}: ")


def test_a_section_that_is_none() -> None:
    with pytest.raises(TypeError, match="Config: trainer is a dict; pass a TrainerConfig, or use Config.from_dict"):
        Config(trainer={})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'trainer.max_steps' wants a number, got '7'"):
        Config(trainer=TrainerConfig(max_steps="7"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"'trainer.clip_norm' must lie in \[0, 1e\+30\]; got nan"):
        Config(trainer=TrainerConfig(clip_norm=math.nan))


def test_blame(tmp_path: Any) -> None:
    """Who wrote a value is who is named: the file, or the override that stands on top of it."""
    path = tmp_path / "my.yaml"
    path.write_text("encoder: {n_heads: 7}\n")
    for overrides, start in (
        ((), f"{path}: 'encoder.n_heads' must divide"),
        (("trainer.max_steps=5",), f"{path}: 'encoder.n_heads' must divide"),
        (("encoder.n_heads=8", "trainer.accumulate=0"), "override trainer.accumulate=0: 'trainer.accumulate' must"),
        (("encoder.n_heads=8", "encoder.d_model=30"), "override encoder.n_heads=8: 'encoder.n_heads' must divide"),
        (("encoder.n_heads=8", "model.encoder.x=1"), "override model.encoder.x=1: unknown key 'encoder.x'"),
        (
            ("encoder.n_heads=8", "optim.sched.name=cosine", "optim.sched.warmup_steps=200", "trainer.max_steps=40"),
            "override optim.sched.name=cosine optim.sched.warmup_steps=200 trainer.max_steps=40: 'optim.sched.max",
        ),
        (("encoder.n_heads=8", "augment.prob=0", "trainer.seed=1"), "override augment.prob=0: unknown key 'augment'"),
        (("encoder.n_heads=8", "nonsense"), "overrides: override 'nonsense' wants the form"),
    ):
        with pytest.raises(ConfigError) as caught:
            Config.from_yaml(path, overrides)
        assert str(caught.value).startswith(start), caught.value


@pytest.mark.parametrize("text", ["encoder: {%s: 1}", "%s: 1", "encoder: {subsampling: %s}", "trainer: {device: %s}",
                                  "encoder: {n_layers: %s}", "encoder: %s", "a: ${%s}"])  # fmt: skip
def test_long_values_are_quoted_short(tmp_path: Any, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text % ("x" * 900_000))
    with pytest.raises(ConfigError) as caught:
        Config.from_yaml(path)
    assert len(str(caught.value)) < 1000 + len(str(path))


def test_a_thousand_problems_are_counted(tmp_path: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.from_dict({"encoder": {f"key{number}": 0 for number in range(1000)}})
    assert len(str(caught.value).splitlines()) == 22 and "and 980 more" in str(caught.value)

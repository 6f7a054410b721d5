"""``repr`` of a configuration: what differs from the defaults, as a call that makes an equal object."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nest_fn import config as configs
from nest_fn.config import Config, DataConfig, EncoderConfig, OptimConfig, PreprocessorConfig, SchedConfig

NAMES = {name: getattr(configs, name) for name in configs.__all__}
CLASSES = [kind for kind in NAMES.values() if dataclasses.is_dataclass(kind)]
PRESETS = ("tiny", "demo", "nest_small", "nest_large", "nest_xxlarge")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_defaults_are_not_shown(kind: Any) -> None:
    assert repr(kind()) == f"{kind.__name__}()"


def test_only_what_differs_is_shown() -> None:
    assert repr(EncoderConfig(n_layers=4, d_model=144)) == "EncoderConfig(n_layers=4, d_model=144)"
    assert repr(Config(encoder=EncoderConfig(n_layers=4))) == "Config(encoder=EncoderConfig(n_layers=4))"
    assert repr(PreprocessorConfig(highfreq=None, mel_norm=None)) == "PreprocessorConfig(mel_norm=None)"
    assert repr(OptimConfig(sched=None)) == "OptimConfig(sched=None)"
    assert repr(DataConfig(train=("a.jsonl",))) == "DataConfig(train=('a.jsonl',))"


def test_derived_values_are_shown_by_a_section_alone_and_not_by_the_whole() -> None:
    config = Config.preset("tiny", ["mask_position=post_conv", "trainer.max_steps=7"])
    assert "feat_in=80" in repr(config.encoder)
    assert "max_steps=7" in repr(config.optim.sched)
    assert "feat_in" not in repr(config)
    assert repr(config).count("max_steps=7") == 1


@pytest.mark.parametrize(
    "config",
    [
        *map(Config.preset, PRESETS),
        Config(compat="legacy"),
        Config.from_dict({"sample_rate": 8000, "preprocessor": {"highfreq": 4000}}),
        Config.preset("tiny", ["mask_position=post_conv"]),
        Config.preset("tiny", ["encoder.subsampling=null", "masking.block_size=1"]),
        Config(optim=OptimConfig(sched=None)),
        Config(optim=OptimConfig(sched=SchedConfig(max_steps=50_000))),
    ],
    ids=lambda config: repr(config)[:40],
)
def test_it_evaluates_to_an_equal_config(config: Config) -> None:
    assert eval(repr(config), dict(NAMES)) == config

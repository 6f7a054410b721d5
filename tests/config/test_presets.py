"""The shipped files: they load, and hold the published sizes (reference 10)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nest_fn.config import Config, ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# d_model, heads, layers, kernel, weight decay, scaling and biases, parameters in total and in the encoder
SIZES = {
    "nest_small": (176, 4, 16, 9, 0.0, True, 14_191_616, 12_600_240),
    "nest_medium": (256, 4, 16, 9, 1e-3, True, 28_375_376, 26_128_640),
    "nest_large": (512, 8, 17, 9, 1e-3, True, 113_106_000, 108_762_112),
    "nest_xlarge": (1024, 8, 24, 9, 1e-3, False, 615_844_944, 607_306_752),
    "nest_xxlarge": (1024, 8, 42, 5, 1e-3, False, 1_069_081_680, 1_060_543_488),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    config = Config.preset(name)
    width, heads, layers, kernel, decay, flag, total, in_encoder = SIZES[name]
    encoder = config.encoder
    assert (encoder.d_model, encoder.n_heads, encoder.n_layers, encoder.conv_kernel_size) == (
        width,
        heads,
        layers,
        kernel,
    )
    assert (encoder.xscaling, encoder.use_bias, config.optim.weight_decay) == (flag, flag, decay)
    assert (encoder.dropout_emb, encoder.dropout_att, config.optim.lr, config.num_classes) == (0.0, 0.1, 5.0, 8192)
    assert config.advice == ()
    head = (CONFIGS / f"{name}.yaml").read_text()
    assert f"{total:,} parameters" in head
    assert f"{in_encoder:,} of them in the encoder" in head


def test_large_is_the_default() -> None:
    assert Config.preset("nest_large", ["trainer.max_steps=100000"]) == Config()


def test_tiny() -> None:
    config = Config.preset("tiny")
    encoder = config.encoder
    assert (encoder.d_model, encoder.n_layers, encoder.n_heads, encoder.subsampling_conv_channels) == (32, 2, 4, 16)
    assert config.num_classes == 64
    assert config.override("trainer.max_steps=2").optim.sched is not None


def test_every_file_loads_and_names_paper_and_command() -> None:
    files = sorted(CONFIGS.glob("*.yaml"))
    assert {file.stem for file in files} >= {*SIZES, "tiny"}
    for file in files:
        assert Config.from_yaml(file) == Config.preset(file.stem)
        head = file.read_text().partition("\nmodel:")[0]
        assert "arXiv 2408.13106" in head
        assert re.search(rf"nest-fn pretrain -c {file.stem} ", head)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'nest_huge'; there are .*nest_large"):
        Config.preset("nest_huge")

"""The golden numbers (reference 12) that ``test_golden.py`` leaves out: subsampling, and variants of the encoder."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nest_fn.config import Config
from nest_fn.config.model import Compat, EncoderConfig
from nest_fn.encoder import encode, init_encoder, subsample_features
from nest_fn.frontend import log_mel
from nest_fn.interop import nemo
from nest_fn.layers import random
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Params, State
from tests import golden

BASE = EncoderConfig(feat_in=80, n_layers=2, d_model=32, n_heads=4, subsampling_conv_channels=16, conv_kernel_size=5)


def features() -> tuple[torch.Tensor, torch.Tensor]:
    """Current features, from which all of the encoder's numbers were taken, the legacy ones too."""
    return log_mel(*golden.audio(), dataclasses.replace(Config().preprocessor, dither=0.0))


def trees(cfg: EncoderConfig) -> tuple[Params, State]:
    """The encoder with weights made from their names."""
    config = Config(encoder=dataclasses.replace(cfg, compat="current"))  # names do not depend on it
    params, state = init_encoder(random.key(0), cfg)
    shapes = nemo.rename(flatten({"encoder": params}) | flatten({"encoder": state}), config)
    made = {name: golden.weight(name.removeprefix("encoder."), leaf.shape) for name, leaf in shapes.items()}
    all_params, all_state = nemo.from_state_dict(made, config, parts=("encoder",))
    return all_params["encoder"], all_state["encoder"]


@pytest.mark.parametrize(
    "compat,numbers",
    [
        (
            "current",
            {(0, 0, 0): 0.07747, (0, 5, 3): -0.05147, (0, 12, 31): -0.04838, (1, 9, 17): 0.06668, (1, 13, 0): 0.09866},
        ),
        ("legacy", {(0, 12, 31): -0.05968, (1, 9, 17): 0.06780, (1, 13, 0): 0.08303}),
    ],
)
def test_subsampling(compat: Compat, numbers: dict[tuple[int, ...], float]) -> None:
    cfg = dataclasses.replace(BASE, compat=compat)
    x, lengths = subsample_features(trees(cfg)[0], *features(), cfg)
    assert x.shape == (2, 14, 32)
    assert lengths.tolist() == [13, 10]
    golden.check(x, numbers)
    if compat == "current":
        assert x.abs().mean().item() == pytest.approx(0.065359, abs=2e-6)


def test_mean_over_valid_frames() -> None:
    x, lengths, _ = encode(*trees(BASE), *features(), BASE)
    valid = valid_mask(lengths, x.shape[2])[:, None].expand_as(x)
    assert x[valid].abs().mean().item() == pytest.approx(0.847004, abs=2e-5)


def test_without_biases_and_scaling() -> None:
    cfg = dataclasses.replace(BASE, use_bias=False, xscaling=False)
    x, _, _ = encode(*trees(cfg), *features(), cfg)
    golden.check(x, {(0, 0, 0): 1.50179, (0, 5, 3): -1.28858, (0, 31, 12): 0.56849})
    assert x.abs().mean().item() == pytest.approx(0.864855, abs=2e-5)

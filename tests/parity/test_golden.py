"""The golden numbers (reference 12): features, tokens, encoder, decoder and loss of one fixed signal."""

from __future__ import annotations

import pytest
import torch

from nest_fn.config import Config
from nest_fn.config.model import (
    Compat,
    DecoderConfig,
    EncoderConfig,
    LossConfig,
    PreprocessorConfig,
    QuantizerConfig,
)
from nest_fn.decoder import log_probs
from nest_fn.encoder import encode, init_encoder
from nest_fn.frontend import log_mel
from nest_fn.interop import nemo
from nest_fn.layers import random
from nest_fn.layers.linear import LinearParams
from nest_fn.layers.tree import flatten
from nest_fn.losses import masked_cross_entropy, masked_token_loss, token_mask
from nest_fn.quantizer import QuantizerState, quantize_features
from tests import golden

ENTRIES = [(0, 0, 0), (0, 0, 1), (0, 0, 99), (0, 10, 50), (0, 40, 7), (0, 79, 99), (1, 5, 74), (1, 40, 10), (1, 79, 0)]
NORMALISED = [6.97757, 1.91914, 3.58466, -0.76616, 0.41896, -0.22522, 0.02618, -0.29933, -8.25203]
LOG_MEL = [-7.49494, -11.83480, -10.40587, -13.17057, -10.14746, -8.41340, -3.00815, -11.88993, -10.50618]
LEGACY = [5.49800, 0.91614, 2.40198, -0.79989, 0.61600, -0.81923, 0.11244, -0.27443, 6.72319]
TOKENS = [  # row, then book; the last ones are those of padding
    ["18 36 61 1 23 30 46 56 42 61 62 26 24 0", "33 48 3 7 38 45 61 62 57 3 1 41 39 50"],
    ["21 36 61 62 8 27 46 59 54 1 0 0 0 0", "33 51 0 1 23 39 61 1 63 10 50 50 50 50"],
]
ENCODER = EncoderConfig(feat_in=80, n_layers=2, d_model=32, n_heads=4, subsampling_conv_channels=16, conv_kernel_size=5)


def features(compat: Compat = "current", normalize: str | None = "per_feature") -> tuple[torch.Tensor, torch.Tensor]:
    return log_mel(*golden.audio(), PreprocessorConfig(compat=compat, normalize=normalize, dither=0.0))


def tokens() -> torch.Tensor:
    weight = (
        torch.sin(0.37 * torch.arange(32 * 640, dtype=torch.float64) + 0.11).to(torch.float32).double().reshape(32, 640)
    )
    codes = torch.sin(1.7 * torch.arange(2 * 64 * 16, dtype=torch.float64) + 0.3).reshape(2, 64, 16)
    state: QuantizerState = {"projection": {"weight": weight}, "codebooks": codes / codes.norm(dim=-1, keepdim=True)}
    cfg = QuantizerConfig(code_dim=16, num_classes=64, num_books=2, combine_time_steps=8, feat_in=80)
    return quantize_features(state, features()[0], cfg)


def encoded(cfg: EncoderConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder output ``[B, D, T]`` in eval mode, lengths."""
    config = Config(encoder=cfg)
    params, state = init_encoder(random.key(0), cfg)
    shapes = nemo.rename(flatten({"encoder": params}) | flatten({"encoder": state}), config)
    made = {name: golden.weight(name.removeprefix("encoder."), leaf.shape) for name, leaf in shapes.items()}
    trees = nemo.from_state_dict(made, config, parts=("encoder",))
    return encode(trees[0]["encoder"], trees[1]["encoder"], *features(), cfg)[:2]


@pytest.mark.parametrize(
    "compat,normalize,wanted",
    [("current", "per_feature", NORMALISED), ("current", None, LOG_MEL), ("legacy", "per_feature", LEGACY)],
)
def test_features(compat: Compat, normalize: str | None, wanted: list[float]) -> None:
    x, _ = features(compat, normalize)
    # Their float32 run is right to about 1e-4 where a bin is near silence (tests/parity/rounding.py).
    golden.check(x, dict(zip(ENTRIES, wanted, strict=True)), tolerance=1e-4)


def test_features_as_a_whole() -> None:
    x, lengths = features()
    assert x.shape == (2, 80, 112) and lengths.tolist() == [100, 75]
    assert x.abs().mean().item() == pytest.approx(0.442017, abs=2e-6)
    assert x.square().mean().item() == pytest.approx(0.772232, abs=2e-6)
    assert x[0, 0, 100] == 0 and x[1, 0, 75] == 0


def test_legacy_features_as_a_whole() -> None:
    x, lengths = features("legacy")
    assert lengths.tolist() == [101, 76]
    assert x.abs().mean().item() == pytest.approx(0.453084, abs=2e-6)
    golden.check(x, {(0, 0, 100): 6.66057, (1, 0, 75): 0.41932})


def test_tokens() -> None:
    wanted = [[[int(number) for number in book.split()] for book in row] for row in TOKENS]
    assert tokens().transpose(1, 2).tolist() == wanted


def test_encoder() -> None:
    x, lengths = encoded(ENCODER)
    assert x.shape == (2, 32, 14) and lengths.tolist() == [13, 10]
    golden.check(x, {(0, 0, 0): 1.42885, (0, 5, 3): 0.15091, (0, 31, 12): 0.65342, (1, 0, 0): 1.42971})
    golden.check(x, {(1, 17, 9): 0.81061, (1, 3, 13): -1.03543})
    assert x.abs().mean().item() == pytest.approx(0.845406, abs=2e-5)


def test_decoder_and_loss() -> None:
    x = encoded(ENCODER)[0].transpose(1, 2)
    cfg = DecoderConfig(feat_in=32, num_classes=64, num_decoders=2)
    params: LinearParams = {
        "weight": golden.weight("decoder_layers.0.weight", (128, 32, 1))[..., 0],
        "bias": golden.weight("decoder_layers.0.bias", (128,)),
    }
    scores = log_probs(params, x, cfg)
    golden.check(scores, {(0, 0, 0, 0): -4.06190, (0, 0, 63, 1): -3.27919, (1, 9, 10, 0): -7.37246})
    mask = torch.zeros(2, 112, dtype=torch.bool)
    mask[:, 8:40] = True
    mask[1, 60:66] = True
    counted = token_mask(mask, LossConfig(combine_time_steps=8))
    assert counted.nonzero().tolist() == [[row, t] for row in (0, 1) for t in (1, 2, 3, 4)]
    assert masked_cross_entropy(scores, tokens(), counted).item() == pytest.approx(4.570978, abs=2e-5)
    fast = masked_token_loss(params, x, tokens(), counted, cfg)
    assert (fast.loss_sum / fast.count).item() == pytest.approx(4.570978, abs=2e-5)

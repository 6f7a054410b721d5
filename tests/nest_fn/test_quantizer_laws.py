"""The quantizer: brute force as oracle, invariances, transforms, initial values, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from nest_fn.config.model import QuantizerConfig
from nest_fn.layers import random
from nest_fn.layers.types import Tensor
from nest_fn.quantizer import QuantizerState, code_vectors, init_quantizer, quantize_features

CFG = QuantizerConfig(code_dim=16, num_classes=512, num_books=2, combine_time_steps=8, feat_in=20)


def state(cfg: QuantizerConfig = CFG) -> QuantizerState:
    return init_quantizer(random.key(0), cfg)


def features(batch: int = 3, frames: int = 160, seed: int = 0) -> Tensor:
    return torch.randn(batch, 20, frames, generator=torch.Generator().manual_seed(seed))


def brute_force(weights: QuantizerState, x: Tensor, combine: int) -> Tensor:
    """Every distance to every code in float64: ``[B, T, K]``."""
    stacked = torch.stack([piece.transpose(1, 2).flatten(1) for piece in x.split(combine, dim=2)], 1)
    books, _, dim = weights["codebooks"].shape
    z = (stacked @ weights["projection"]["weight"].T).reshape(*stacked.shape[:2], books, dim)
    z = (z / z.norm(dim=-1, keepdim=True)).double()
    return (z[:, :, :, None, :] - weights["codebooks"]).norm(dim=-1).argmin(-1)


@pytest.mark.parametrize("dist_fn", ["l2", "cosine"])
def test_nearest_code(dist_fn: str) -> None:
    x = features(frames=8 * 500)  # 1500 tokens: more than one piece
    assert torch.equal(quantize_features(state(), x, replace(CFG, dist_fn=dist_fn)), brute_force(state(), x, 8))


def test_codes_of_any_length() -> None:
    """L2 is not cosine once the codes are not unit vectors, as after a cast to half precision."""
    weights = state()
    weights = {**weights, "codebooks": weights["codebooks"] * torch.linspace(0.5, 1.5, 512)[:, None]}
    got = quantize_features(weights, features(), CFG)
    assert torch.equal(got, brute_force(weights, features(), 8))
    assert not torch.equal(got, quantize_features(weights, features(), replace(CFG, dist_fn="cosine")))


def test_float32_search_finds_the_same_codes() -> None:
    x = features(frames=8 * 500)
    same = quantize_features(state(), x, replace(CFG, precision="float32")) == quantize_features(state(), x, CFG)
    assert same.float().mean() > 0.999


def test_chosen_codes_are_the_nearest_of_their_book() -> None:
    weights, x = state(), features()
    tokens = quantize_features(weights, x, CFG)
    chosen = code_vectors(weights, tokens, CFG)
    assert chosen.shape == (3, 16, 20, 2) and chosen.dtype == torch.float64
    for b, t, k in [(0, 0, 0), (2, 19, 1), (1, 7, 1)]:
        assert torch.equal(chosen[b, :, t, k], weights["codebooks"][k, tokens[b, t, k]])


def test_input_norm_makes_tokens_blind_to_gain_and_offset() -> None:
    x, cfg = features(), replace(CFG, input_norm=True)
    assert torch.equal(quantize_features(state(), 3 * x + 5, cfg), quantize_features(state(), x, cfg))
    assert not torch.equal(quantize_features(state(), 3 * x + 5, CFG), quantize_features(state(), x, CFG))


def test_squeeze_single() -> None:
    cfg = replace(CFG, num_books=1)
    full, squeezed = (quantize_features(state(cfg), features(), replace(cfg, squeeze_single=s)) for s in (False, True))
    assert full.shape == (3, 20, 1) and torch.equal(full[..., 0], squeezed)
    assert torch.equal(code_vectors(state(cfg), squeezed, cfg), code_vectors(state(cfg), full, cfg)[..., 0])
    assert quantize_features(state(), features(), replace(CFG, squeeze_single=True)).shape == (3, 20, 2)


def test_a_token_depends_on_its_own_frames_only() -> None:
    x = features()
    tokens = quantize_features(state(), x, CFG)
    assert torch.equal(quantize_features(state(), x[1:2, :, 80:], CFG), tokens[1:2, 10:])
    changed = x.clone()
    changed[:, :, :8] = -changed[:, :, :8]
    assert torch.equal(quantize_features(state(), changed, CFG)[:, 1:], tokens[:, 1:])


@pytest.mark.parametrize("dist_fn", ["l2", "cosine"])
def test_padding_has_one_token(dist_fn: str) -> None:
    weights, cfg = state(), replace(CFG, dist_fn=dist_fn)
    x = features()
    x[:, :, 80:] = 0
    tokens = quantize_features(weights, x, cfg)[:, 10:]
    wanted = weights["codebooks"].norm(dim=-1).argmin(-1) if dist_fn == "l2" else torch.zeros(2, dtype=torch.int64)
    assert (tokens == wanted).all()


def test_vmap_is_the_loop() -> None:
    x = features()
    mapped = torch.vmap(lambda row: quantize_features(state(), row[None], CFG)[0])(x)
    assert torch.equal(mapped, quantize_features(state(), x, CFG))


def test_compiled_is_eager() -> None:
    torch.compiler.reset()
    compiled = torch.compile(quantize_features, fullgraph=True, backend="aot_eager")
    x = features(frames=8 * 500)
    assert torch.equal(compiled(state(), x, CFG), quantize_features(state(), x, CFG))


def test_precision_of_features() -> None:
    x = features()
    tokens = quantize_features(state(), x, CFG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantize_features(state(), x, CFG), tokens)
    half = x.bfloat16()
    assert torch.equal(quantize_features(state(), half, CFG), quantize_features(state(), half.float(), CFG))
    assert (quantize_features(state(), x.double(), CFG) == quantize_features(state(), x, CFG)).float().mean() > 0.99


def test_initial_values() -> None:
    cfg = replace(CFG, num_classes=8192, num_books=1, feat_in=80)
    weights = state(cfg)
    projection, codes = weights["projection"]["weight"], weights["codebooks"]
    assert projection.shape == (16, 640) and projection.dtype == torch.float32
    assert projection.std().item() == pytest.approx((2 / (640 + 16)) ** 0.5, rel=0.02)
    assert projection.mean().abs() < 2e-3
    assert codes.shape == (1, 8192, 16) and codes.dtype == torch.float64
    torch.testing.assert_close(codes.norm(dim=-1), torch.ones(1, 8192, dtype=torch.float64))
    assert codes.mean((0, 1)).abs().max() < 0.02
    again = init_quantizer(random.key(0), cfg)
    assert torch.equal(again["codebooks"], codes)
    assert not torch.equal(init_quantizer(random.key(1), cfg)["codebooks"], codes)


ERRORS: list[tuple[str, Callable[[], object]]] = [
    ("82 frames are no multiple of combine_time_steps 8", lambda: quantize_features(state(), features(frames=82), CFG)),
    ("do not fit the projection", lambda: quantize_features(state(), features()[:, :19], CFG)),
    ("do not fit the projection", lambda: quantize_features(state(), features()[0], CFG)),
    ("unknown dist_fn 'l1'", lambda: quantize_features(state(), features(), replace(CFG, dist_fn="l1"))),
    ("unknown precision", lambda: quantize_features(state(), features(), replace(CFG, precision="bf16"))),
    ("quantizer.feat_in is None", lambda: init_quantizer(random.key(0), replace(CFG, feat_in=None))),
    ("do not fit 2 books", lambda: code_vectors(state(), torch.zeros(1, 3, 1, dtype=torch.int64), CFG)),
]


@pytest.mark.parametrize("message,call", ERRORS)
def test_errors_say_what_came(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()

"""Decoder and loss: torch's cross-entropy as oracle, the fixed room, empty masks, transforms, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nest_fn.config.model import DecoderConfig, LossConfig
from nest_fn.decoder import INIT_MODES, init_decoder, log_probs, logits
from nest_fn.layers import random
from nest_fn.layers.types import Tensor
from nest_fn.losses import MaskedLoss, _pad_to_capacity, masked_cross_entropy, masked_token_loss, token_mask

CFG = DecoderConfig(feat_in=8, num_classes=11, num_decoders=2)
B, T = 3, 300  # 900 tokens: more than the least room


def params(cfg: DecoderConfig = CFG) -> Any:
    return init_decoder(random.key(0), cfg)


def batch(share: float = 0.3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    encoded = torch.randn(B, T, 8, generator=generator).to(dtype)
    tokens = torch.randint(0, 11, (B, T, 2), generator=generator)
    return encoded, tokens, torch.rand(B, T, generator=generator) < share


def mean(result: MaskedLoss) -> Tensor:
    return result.loss_sum / result.count.clamp(min=1)


def test_class_major_layout() -> None:
    encoded, _, _ = batch()
    plain = encoded @ params()["weight"].T + params()["bias"]
    got = logits(params(), encoded, CFG)
    for c, k in [(0, 0), (0, 1), (7, 1), (10, 0)]:
        torch.testing.assert_close(got[..., c, k], plain[..., c * 2 + k])
    torch.testing.assert_close(log_probs(params(), encoded, CFG).exp().sum(2), torch.ones(B, T, 2))


def test_squeeze_single() -> None:
    one, encoded = replace(CFG, num_decoders=1), batch()[0]
    full = log_probs(params(one), encoded, one)
    assert full.shape == (B, T, 11, 1)
    squeezed = log_probs(params(one), encoded, replace(one, squeeze_single=True))
    torch.testing.assert_close(squeezed, full[..., 0], atol=1e-6, rtol=0)


def test_both_forms_are_torch_s_cross_entropy() -> None:
    encoded, tokens, mask = batch()
    scores = logits(params(), encoded, CFG)
    wanted = torch.stack([F.cross_entropy(scores[mask][..., k], tokens[mask][:, k]) for k in (0, 1)]).mean()
    fast = masked_token_loss(params(), encoded, tokens, mask, CFG)
    torch.testing.assert_close(mean(fast), wanted)
    torch.testing.assert_close(masked_cross_entropy(log_probs(params(), encoded, CFG), tokens, mask), wanted)
    assert fast.count == 2 * mask.sum() and fast.overflow == 0
    assert fast.correct == (scores.argmax(2) == tokens)[mask].sum() > 0


def test_tokens_without_book_axis() -> None:
    one = replace(CFG, num_decoders=1, squeeze_single=True)
    encoded, tokens, mask = batch()
    weights, scores = params(one), log_probs(params(one), encoded, one)
    a = mean(masked_token_loss(weights, encoded, tokens[..., 0], mask, one))
    b = mean(masked_token_loss(weights, encoded, tokens[..., :1], mask, one))
    torch.testing.assert_close(a, masked_cross_entropy(scores, tokens[..., 0], mask))
    assert torch.equal(a, b)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_compiled_is_eager(share: float) -> None:
    torch.compiler.reset()
    compiled = torch.compile(masked_token_loss, fullgraph=True, backend="aot_eager")
    got, wanted = (f(params(), *batch(share), CFG, 1.0) for f in (compiled, masked_token_loss))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tokens_beyond_the_room_are_counted() -> None:
    torch.compiler.reset()
    compiled = torch.compile(masked_token_loss, fullgraph=True, backend="aot_eager")
    encoded, tokens, mask = batch(0.9)
    got = compiled(params(), encoded, tokens, mask, CFG, 0.6)
    first = mask & (mask.flatten().cumsum(0) <= 540).view(B, T)  # 0.6 of 900
    wanted = masked_token_loss(params(), encoded, tokens, first, CFG)
    torch.testing.assert_close(got.loss_sum, wanted.loss_sum)
    assert got.count == wanted.count == 2 * 540 and got.correct == wanted.correct
    assert got.overflow == 2 * (mask.sum() - 540) > 0


def test_a_small_batch_always_has_room() -> None:
    index, filled = _pad_to_capacity(torch.ones(500, dtype=torch.bool), 0.01)
    assert filled.all() and torch.equal(index, torch.arange(500))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_empty_mask_gives_zero_with_zero_gradients(compiled: bool) -> None:
    torch.compiler.reset()
    f = torch.compile(masked_token_loss, fullgraph=True, backend="aot_eager") if compiled else masked_token_loss
    encoded, tokens, mask = batch(0.0)
    leaves = [encoded.requires_grad_(), *(leaf.requires_grad_() for leaf in params().values())]
    result = f({"weight": leaves[1], "bias": leaves[2]}, leaves[0], tokens, mask, CFG)
    assert result.loss_sum == 0 and result.count == 0
    for gradient in torch.autograd.grad(mean(result), leaves):
        assert (gradient == 0).all()


@pytest.mark.parametrize("form", ["reference", "fast"])
def test_gradient(form: str) -> None:
    encoded, tokens, mask = (part[:, :6] for part in batch(0.5, torch.float64))
    weights = {name: leaf.double().requires_grad_() for name, leaf in params().items()}

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        p: Any = {"weight": weight, "bias": bias}
        if form == "reference":
            return masked_cross_entropy(log_probs(p, x, CFG), tokens, mask)
        return mean(masked_token_loss(p, x, tokens, mask, CFG))

    assert torch.autograd.gradcheck(loss, (encoded.clone().requires_grad_(), weights["weight"], weights["bias"]))


def test_per_example_gradients_are_the_loop_s() -> None:
    encoded, tokens, mask = batch()

    def loss(p: Any, x: Tensor, t: Tensor, m: Tensor) -> Tensor:
        return mean(masked_token_loss(p, x[None], t[None], m[None], CFG))

    mapped = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(params(), encoded, tokens, mask)
    for b in range(B):
        leaf = params()["weight"].requires_grad_()
        value = loss({**params(), "weight": leaf}, encoded[b], tokens[b], mask[b])
        torch.testing.assert_close(mapped["weight"][b], torch.autograd.grad(value, leaf)[0], atol=1e-6, rtol=1e-5)


def test_loss_is_float32_or_better() -> None:
    encoded, tokens, mask = batch(dtype=torch.bfloat16)
    half = {name: leaf.bfloat16() for name, leaf in params().items()}
    low = masked_token_loss(half, encoded, tokens, mask, CFG)  # type: ignore[arg-type]
    assert low.loss_sum.dtype == torch.float32 and log_probs(half, encoded, CFG).dtype == torch.float32  # type: ignore[arg-type]
    assert mean(low).item() == pytest.approx(mean(masked_token_loss(params(), *batch(), CFG)).item(), rel=0.01)
    double = {name: leaf.double() for name, leaf in params().items()}
    assert masked_token_loss(double, encoded.double(), tokens, mask, CFG).loss_sum.dtype == torch.float64  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_not_masked_does_not_matter(compiled: bool, share: float) -> None:
    torch.compiler.reset()
    f = torch.compile(masked_token_loss, fullgraph=True, backend="aot_eager") if compiled else masked_token_loss
    encoded, tokens, mask = batch(share)
    garbage = torch.where(mask[..., None], encoded, torch.nan).requires_grad_()
    result = f(params(), garbage, tokens, mask, CFG)
    torch.testing.assert_close(result.loss_sum, masked_token_loss(params(), encoded, tokens, mask, CFG).loss_sum)
    assert torch.autograd.grad(result.loss_sum, garbage)[0].isfinite().all()


@pytest.mark.parametrize("combine,threshold,wanted", [(8, 0.8, 7), (8, 0.5, 5), (5, 0.8, 5), (1, 0.8, 1), (4, 0.0, 1)])
def test_least_number_of_masked_frames(combine: int, threshold: float, wanted: int) -> None:
    cfg = LossConfig(threshold, combine)
    counts = [n for n in range(combine + 1) if token_mask(torch.arange(combine)[None] < n, cfg)]
    assert min(counts) == wanted


@pytest.mark.parametrize("mode", INIT_MODES)
def test_initial_values_are_torch_s(mode: str) -> None:
    cfg = DecoderConfig(feat_in=256, num_classes=512, num_decoders=2, init_mode=mode)
    made, theirs = init_decoder(random.key(0), cfg), torch.empty(1024, 256)
    kind = {"nonlinearity": "relu"} if mode.startswith("kaiming") else {}
    getattr(torch.nn.init, f"{mode}_")(theirs, generator=torch.Generator().manual_seed(0), **kind)
    assert made["weight"].std().item() == pytest.approx(theirs.std().item(), rel=0.01)
    assert made["weight"].abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.2)
    assert made["bias"].abs().max() <= 1 / 16 and made["bias"].std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.1)
    assert "bias" not in init_decoder(random.key(0), replace(cfg, use_bias=False))


ENCODED, TOKENS, MASK = batch()
SCORES = log_probs(params(), ENCODED, CFG)
ERRORS: list[tuple[str, Callable[[], object]]] = [
    ("10 frames are no multiple of combine_time_steps 8", lambda: token_mask(torch.ones(1, 10), LossConfig(0.8, 8))),
    ("mask wants \\[B, F\\]", lambda: token_mask(torch.ones(1, 4, 16), LossConfig(0.8, 8))),
    ("loss.combine_time_steps is None", lambda: token_mask(torch.ones(1, 16), LossConfig())),
    ("equally long", lambda: masked_cross_entropy(SCORES, TOKENS[:, 1:], MASK)),
    ("token_mask wants bool", lambda: masked_cross_entropy(SCORES, TOKENS, MASK.float())),
    ("equally long", lambda: masked_token_loss(params(), ENCODED, TOKENS[:, 1:], MASK, CFG)),
    ("token_mask wants bool", lambda: masked_token_loss(params(), ENCODED, TOKENS, MASK[:, 1:], CFG)),
    ("unknown init_mode", lambda: init_decoder(random.key(0), replace(CFG, init_mode="zeros"))),
    ("want 24 outputs", lambda: logits(params(), ENCODED, replace(CFG, num_classes=12))),
    ("wants 8", lambda: logits(params(), ENCODED[..., 1:], CFG)),
]


@pytest.mark.parametrize("message,call", ERRORS)
def test_errors_say_what_came(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()

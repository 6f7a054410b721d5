"""The model as a whole: shapes of the original forward, masks given and drawn, rows by name, what learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn import Config, abstract, encode, fold_in, forward, init, key, log_mel, loss, loss_sum, quantize
from nest_fn.layers import random
from nest_fn.layers.tree import check_same, fill, flatten, tree_map
from nest_fn.losses import masked_cross_entropy, token_mask

PLAIN = ("encoder.conv_norm_type=layer_norm",)  # a row does not depend on its batch, in training either


def tiny(*overrides: str) -> Config:
    return Config.preset("tiny", ["masking.mask_prob=0.03", "masking.force_block=true", *overrides])


def batch(rows: int = 4, seconds: float = 1.0) -> dict[str, torch.Tensor]:
    width = int(16000 * seconds)
    clean = 0.1 * random.normal(key(5), (rows, width))
    lengths = torch.tensor([width - 1600 * (row % 4) for row in range(rows)])
    noisy = clean + 0.05 * random.normal(key(6), (rows, width))
    return {"audio": clean, "audio_len": lengths, "noisy_audio": noisy, "noisy_audio_len": lengths.clone()}


def gradients(params: Any, f: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in flatten(params).items()}
    value = f(fill(params, leaves))
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize(
    "overrides,books,single",
    [((), 1, False), (("num_books=2",), 2, False), (("squeeze_single=true",), 1, True)],
)
def test_forward_has_the_shapes_of_the_seed(overrides: tuple[str, ...], books: int, single: bool) -> None:
    cfg = tiny(*overrides)
    params, state = init(key(0), cfg)
    out, new_state = forward(params, state, batch(), cfg, key=key(1))
    tail = () if single else (books,)
    assert out.log_probs.shape == (4, 14, 64, *tail)
    assert out.encoded_len.tolist() == [13, 12, 10, 9]
    assert out.masks.shape == (4, 80, 112)
    assert out.tokens.shape == (4, 14, *tail)
    assert out.tokens.dtype == torch.int64
    torch.testing.assert_close(out.log_probs.exp().sum(2), torch.ones(4, 14, *tail))
    assert set(out.masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(out.masks, out.masks[:, :1].expand_as(out.masks))
    check_same("state", new_state, state)


def test_forward_under_post_conv() -> None:
    cfg = tiny("mask_position=post_conv")
    params, state = init(key(0), cfg)
    out, _ = forward(params, state, batch(), cfg, key=key(1))
    assert out.masks.shape == (4, 32, 14)
    assert out.log_probs.shape == (4, 14, 64, 1)
    assert out.tokens.shape == (4, 14, 1)


def test_without_mask_nothing_is_drawn() -> None:
    cfg = tiny()
    params, state = init(key(0), cfg)
    out, _ = forward(params, state, batch(), cfg, apply_mask=False)
    again, _ = forward(params, state, batch(), cfg, key=key(9), apply_mask=False)
    assert out.masks.sum() == 0
    assert torch.equal(out.log_probs, again.log_probs)


def test_a_given_mask_is_taken() -> None:
    cfg = tiny()
    params, state = init(key(0), cfg)
    drawn, _ = forward(params, state, batch(), cfg, key=key(1))
    mask = drawn.masks[:, 0].bool()
    given, _ = forward(params, state, batch(), cfg, mask=mask)
    assert torch.equal(given.masks, drawn.masks)
    assert torch.equal(given.log_probs, drawn.log_probs)


def test_the_encoder_does_not_see_masked_frames() -> None:
    cfg = tiny()
    params, state = init(key(0), cfg)
    mask = torch.zeros(4, 112, dtype=torch.bool)
    mask[:, 30:70] = True
    data, other = batch(), batch()
    other["noisy_audio"] = other["noisy_audio"].clone()
    other["noisy_audio"][:, 40 * 160 : 60 * 160] += 0.3
    # Normalisation spreads what is heard anywhere over all frames.
    plain = tiny("preprocessor.normalize=null")
    out, _ = forward(params, state, data, plain, mask=mask)
    heard, _ = forward(params, state, other, plain, mask=mask)
    assert torch.equal(out.log_probs, heard.log_probs)
    assert not torch.equal(
        forward(params, state, data, cfg, apply_mask=False)[0].log_probs,
        forward(params, state, other, cfg, apply_mask=False)[0].log_probs,
    )


def test_targets_come_from_the_clean_signal() -> None:
    cfg = tiny()
    params, state = init(key(0), cfg)
    data = batch()
    out, _ = forward(params, state, data, cfg, apply_mask=False)
    features, _ = log_mel(data["audio"], data["audio_len"], cfg.preprocessor)
    assert torch.equal(out.tokens, quantize(state, features, cfg))
    noisy, lengths = log_mel(data["noisy_audio"], data["noisy_audio_len"], cfg.preprocessor)
    encoded, encoded_len, _ = encode(params, state, noisy, lengths, cfg)
    assert encoded.shape == (4, 32, 14)
    assert torch.equal(encoded_len, out.encoded_len)
    assert not torch.equal(out.tokens, quantize(state, noisy, cfg))


def test_loss_is_the_cross_entropy_of_forward() -> None:
    cfg = tiny("num_books=2")
    params, state = init(key(0), cfg)
    out, _ = forward(params, state, batch(), cfg, key=key(1))
    value, (metrics, _) = loss(params, state, batch(), cfg, key=key(1), train=False)
    counted = token_mask(out.masks[:, 0].bool(), cfg.loss)
    torch.testing.assert_close(value, masked_cross_entropy(out.log_probs, out.tokens, counted), atol=1e-5, rtol=1e-5)
    assert int(metrics["masked_tokens"]) == 2 * int(counted.sum())
    torch.testing.assert_close(metrics["loss_sum"] / metrics["masked_tokens"], value)
    assert int(metrics["valid_tokens"]) == int(out.encoded_len.sum())
    assert metrics["token_counts"].shape == (2, 64)
    assert metrics["token_counts"].sum() == 2 * metrics["valid_tokens"]
    assert metrics["masked_token_counts"].sum() == metrics["masked_tokens"]
    assert int(metrics["overflow"]) == 0


def test_the_first_loss_is_that_of_guessing() -> None:
    cfg = tiny()
    params, state = init(key(0), cfg)
    value, _ = loss(params, state, batch(), cfg, key=key(1), train=False)
    assert 3.7 < float(value) < 5.2  # ln 64 = 4.16


@pytest.mark.parametrize("overrides", [(), ("mask_position=post_conv",)], ids=str)
def test_an_empty_mask_is_no_loss_and_no_gradient(overrides: tuple[str, ...]) -> None:
    cfg = tiny(*overrides)
    params, state = init(key(0), cfg)
    mask = torch.zeros(4, 14 if overrides else 112, dtype=torch.bool)
    value, grads = gradients(params, lambda p: loss(p, state, batch(), cfg, key=key(1), mask=mask)[0])
    _, (metrics, _) = loss(params, state, batch(), cfg, key=key(1), mask=mask)
    assert float(value) == 0
    assert int(metrics["masked_tokens"]) == 0
    assert all(grad is not None and bool((grad == 0).all()) for grad in grads.values())


def test_post_conv_trains_the_subsampling_unless_told_otherwise() -> None:
    """Q18: the reference detaches there, so that its subsampling keeps its initial values for ever."""
    for detach in (False, True):
        cfg = tiny("mask_position=post_conv", f"encoder.detach_subsampling={detach}")
        params, state = init(key(0), cfg)
        _, grads = gradients(params, lambda p, s=state, c=cfg: loss(p, s, batch(), c, key=key(1))[0])
        for path, grad in grads.items():
            if path.startswith("encoder.subsampling."):
                assert (grad is None) if detach else bool(grad is not None and grad.abs().max() > 0), path


def test_a_trained_mask_embedding_is_a_parameter() -> None:
    params, state = init(key(0), tiny())
    assert "masking" not in params and state["masking"]["embedding"].shape == (80,)
    params, state = init(key(0), tiny("masking.freeze=false"))
    assert "masking" not in state and params["masking"]["embedding"].shape == (80,)


@pytest.mark.parametrize("position", ["pre_conv", "post_conv"])
def test_a_batch_in_parts_draws_the_same(position: str) -> None:
    """Rows are named, so that parts of a batch (on several ranks, or in turn) have its masks, dither and dropout."""
    cfg = tiny(*PLAIN, f"mask_position={position}", "preprocessor.dither=0.01")
    params, state = init(key(0), cfg)
    data = batch() | {"row": torch.tensor([10, 11, 12, 13])}
    parts = [{name: value[rows] for name, value in data.items()} for rows in ([0, 1], [3], [2])]

    def summed(p: Any, given: Any) -> torch.Tensor:
        return loss_sum(p, state, given, cfg, key=key(1))[0]

    whole, grads = gradients(params, lambda p: summed(p, data))
    pieces = [gradients(params, lambda p, one=part: summed(p, one)) for part in parts]
    torch.testing.assert_close(torch.stack([value for value, _ in pieces]).sum(), whole, atol=1e-4, rtol=1e-5)
    for path, grad in grads.items():
        assert grad is not None
        total = torch.stack([part[path] for _, part in pieces]).sum(0)  # type: ignore[misc]
        torch.testing.assert_close(total, grad, atol=2e-3 * float(grad.abs().max()) + 1e-5, rtol=0, msg=path)
    counts = [loss_sum(params, state, part, cfg, key=key(1))[1][0]["masked_tokens"] for part in parts]
    assert sum(counts) == loss_sum(params, state, data, cfg, key=key(1))[1][0]["masked_tokens"]


def test_other_names_draw_other_masks() -> None:
    cfg = tiny()
    params, state = init(key(0), cfg)
    one, _ = forward(params, state, batch(), cfg, key=key(1))
    same, _ = forward(params, state, batch() | {"row": torch.arange(4)}, cfg, key=key(1))
    other, _ = forward(params, state, batch() | {"row": torch.arange(4) + 1}, cfg, key=key(1))
    assert torch.equal(one.masks, same.masks)
    assert not torch.equal(one.masks, other.masks)


def test_rows_of_weight_0_do_not_count() -> None:
    """A batch filled up to a fixed size, in eval: the fill is not in the loss or in any count."""
    cfg = tiny()
    params, state = init(key(0), cfg)
    data = batch() | {"row": torch.arange(4)}
    weighted = data | {"weight": torch.tensor([1.0, 0.0, 1.0, 0.0])}
    kept = {name: value[[0, 2]] for name, value in data.items()}
    value, (metrics, _) = loss(params, state, weighted, cfg, key=key(1), train=False)
    wanted, (wanted_metrics, _) = loss(params, state, kept, cfg, key=key(1), train=False)
    torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
    for name in ("masked_tokens", "valid_tokens", "token_counts", "masked_token_counts", "correct"):
        assert torch.equal(metrics[name], wanted_metrics[name]), name


def test_init_follows_the_key() -> None:
    one, again, other = (init(key(seed), tiny())[0] for seed in (3, 3, 4))
    for path, leaf in flatten(one).items():
        assert torch.equal(leaf, flatten(again)[path])
        constant = bool((leaf == leaf.flatten()[0]).all())  # norms, and the biases u and v
        assert constant or not torch.equal(leaf, flatten(other)[path]), path


@pytest.mark.parametrize(
    "overrides", [(), ("mask_position=post_conv", "masking.freeze=false"), ("num_books=3",)], ids=str
)
def test_abstract_is_init_without_numbers(overrides: tuple[str, ...]) -> None:
    cfg = tiny(*overrides)
    for meta, real in zip(abstract(cfg), init(key(0), cfg), strict=True):
        assert all(leaf.is_meta for leaf in flatten(meta).values())
        check_same("tree", meta, real)
        check_same("tree", real, meta)


def test_codebooks_lie_on_the_sphere_in_float64() -> None:
    codebooks = init(key(0), tiny())[1]["quantizer"]["codebooks"]
    assert codebooks.dtype == torch.float64
    torch.testing.assert_close(codebooks.norm(dim=-1), torch.ones(1, 64, dtype=torch.float64))


def test_lengths_beyond_the_width_count_as_the_width() -> None:
    """They cannot be refused without reading a tensor on the host."""
    cfg = tiny()
    params, state = init(key(0), cfg)
    data, beyond = batch(), batch()
    data["audio_len"] = data["noisy_audio_len"] = torch.full((4,), 16000)
    beyond["audio_len"] = beyond["noisy_audio_len"] = torch.full((4,), 99999)
    one, _ = forward(params, state, data, cfg, key=key(1))
    other, _ = forward(params, state, beyond, cfg, key=key(1))
    assert torch.equal(one.encoded_len, other.encoded_len)
    assert torch.equal(one.log_probs, other.log_probs)
    features = random.normal(key(2), (2, 80, 104))
    y, lengths, _ = encode(params, state, features, torch.tensor([104, 104]), cfg)
    z, wider, _ = encode(params, state, features, torch.tensor([104, 900], dtype=torch.int32), cfg)
    assert torch.equal(lengths, wider)
    assert torch.equal(y, z)


def test_two_steps_of_training_lower_the_loss() -> None:
    """The gradient points the right way, through everything."""
    cfg = tiny()
    params, state = init(key(0), cfg)

    def value_of(p: Any) -> torch.Tensor:
        return loss(p, state, batch(), cfg, key=fold_in(key(1), 0))[0]

    before, grads = gradients(params, value_of)
    slopes = fill(params, {path: torch.zeros(()) if grad is None else grad for path, grad in grads.items()})
    after = value_of(tree_map(lambda leaf, slope: leaf - 0.02 * slope, params, slopes))
    assert float(after) < float(before) - 0.005

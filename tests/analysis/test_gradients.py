"""Gradients of single rows: against a loop of autograd, and noise scales against their definitions."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from nest_fn import Config, key, loss, loss_sum
from nest_fn.analysis import gradients, noise_scale
from nest_fn.analysis.by_row.row_gradients import Product
from nest_fn.analysis.by_row.rows import chunks, name_rows, row_losses, rows_within, saved_bytes
from nest_fn.analysis.by_row.taps import backward_by_row
from nest_fn.layers import random
from nest_fn.layers.tree import fill, flatten
from tests.analysis.models import small_batch, small_model

KEY = key(5)
LOCAL = ("encoder.self_attention_model=rel_pos_local_attn", "encoder.att_context_size=[2,2]")
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "absolute": ("encoder.self_attention_model=abs_pos", "encoder.conv_norm_type=layer_norm"),
    "local": (*LOCAL, "encoder.global_tokens=1", "encoder.conv_norm_type=group_norm4"),
    "tied": ("encoder.untie_biases=false", "masking.freeze=false", "encoder.conv_norm_type=fused_batch_norm"),
    "post_conv": ("mask_position=post_conv", "num_books=2", "encoder.feat_out=12"),
    "striding": ("encoder.subsampling=striding", "encoder.reduction=striding", "encoder.reduction_factor=2",
                 "encoder.reduction_position=0", "loss.combine_time_steps=16", "quantizer.combine_time_steps=16"),
    "stacking_norm": ("encoder.subsampling=stacking_norm", "encoder.conv_norm_type=instance_norm"),
}  # fmt: skip


def one_by_one(params: Any, state: Any, batch: Any, cfg: Config, train: bool = False) -> list[dict[str, torch.Tensor]]:
    """The loop of grad."""
    found = []
    for row in chunks(batch, 1):
        leaves = {path: leaf.detach().requires_grad_() for path, leaf in flatten(params).items()}
        total, _ = loss_sum(fill(params, leaves), state, row, cfg, key=KEY, train=train)
        found.append(
            dict(zip(leaves, torch.autograd.grad(total, list(leaves.values()), materialize_grads=True), strict=True))
        )
    return found


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_norms_are_those_of_a_loop(kind: str) -> None:
    params, state, cfg = small_model(*KINDS[kind])
    batch = small_batch()
    loop = one_by_one(params, state, batch, cfg)
    each = flatten(gradients.per_example_gradients(params, state, batch, cfg, key=KEY, chunk=2))
    norms = gradients.per_example_norms(params, state, batch, cfg, key=KEY)
    assert each.keys() == norms.squared.keys() == flatten(params).keys()
    for path, leaf in each.items():
        wanted = torch.stack([row[path] for row in loop])
        assert_close(leaf, wanted)
        assert_close(norms.squared[path], wanted.flatten(1).square().sum(dim=1))
    sums, tokens = row_losses(params, state, batch, cfg, key=KEY)
    assert_close(norms.loss, sums)
    assert float(norms.norm.min()) > 0 and float(norms.loss.min()) > 0
    total, (metrics, _) = loss_sum(params, state, batch, cfg, key=KEY, train=False)
    assert_close(sums.sum(), total)
    assert int(tokens.sum()) == int(metrics["masked_tokens"])


def test_vmap_gives_the_same_and_so_does_dropout() -> None:
    params, state, cfg = small_model("encoder.conv_norm_type=layer_norm")
    batch = small_batch()
    for train in (False, True):
        one, two = (
            flatten(gradients.per_example_gradients(params, state, batch, cfg, key=KEY, train=train, method=method))
            for method in ("taps", "vmap")
        )
        for path in one:
            assert_close(one[path], two[path])


@pytest.mark.parametrize("shape", [(5, 40, 30), (50, 4, 3)])
def test_a_product_has_one_norm_by_either_way(shape: tuple[int, int, int]) -> None:
    n, p, q = shape
    left, right = random.normal(key(1), (3, n, p), torch.float64), random.normal(key(2), (3, n, q), torch.float64)
    product = Product(left, right, torch.Size((p, q)))
    assert_close(product.squared_norm(), torch.einsum("bnp,bnq->bpq", left, right).square().sum(dim=(1, 2)))


def test_nothing_is_held_when_the_gradients_are_there() -> None:
    """No tensor of the backward pass survives it, with the collector of circles switched off."""
    params, state, cfg = small_model()

    def alive() -> int:
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(3):
            gradients.per_example_norms(params, state, small_batch(), cfg, key=KEY)
            counts.append(alive())
    finally:
        gc.enable()
    assert counts[0] == counts[1] == counts[2]


def test_data_without_their_rows_are_refused_not_taken_for_constants() -> None:
    x, params = random.normal(key(1), (3, 4, 5)), {"w": torch.ones(5, 2), "v": torch.ones(2, 1)}

    def at_the_start(p: Any) -> torch.Tensor:
        return (x.flatten(0, 1) @ p["w"]).unflatten(0, (3, 4)).sum(dim=(1, 2))

    def later(p: Any) -> torch.Tensor:
        return ((x @ p["w"]).flatten(0, 1) @ p["v"]).unflatten(0, (3, 4)).sum(dim=(1, 2))

    for f in (at_the_start, later):
        with pytest.raises(ValueError, match="axis of rows"):
            backward_by_row(f, params, 3, lambda path, row: None)


def test_batch_norm_in_training_mode_is_refused() -> None:
    params, state, cfg = small_model()
    with pytest.raises(ValueError, match="batch norm"):
        gradients.per_example_norms(params, state, small_batch(), cfg, key=KEY, train=True)


def test_influence_and_dots_are_inner_products() -> None:
    params, state, cfg = small_model()
    batch, other = small_batch(3), small_batch(2, seed=9)
    train, test = (
        torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in one_by_one(params, state, b, cfg)])
        for b in (batch, other)
    )
    found = gradients.influence(params, state, batch, other, cfg, key=KEY, rate=0.5, chunk=2)
    assert_close(found, 0.5 * train @ test.t())
    dots = sum(gradients.gradient_dots(params, state, batch, cfg, key=KEY).values())
    assert_close(dots, train @ train.t())
    assert_close(gradients.cosines(dots), torch.nn.functional.cosine_similarity(train[:, None], train[None], dim=-1))


def test_influence_foretells_the_loss_after_a_small_step() -> None:
    params, state, cfg = small_model()
    batch, other = small_batch(1), small_batch(1, seed=9)
    step = 1e-8
    gradient = fill(params, one_by_one(params, state, batch, cfg)[0])
    moved = fill(params, {p: leaf - step * flatten(gradient)[p] for p, leaf in flatten(params).items()})
    before, after = (loss_sum(p, state, other, cfg, key=KEY, train=False)[0] for p in (params, moved))
    found = gradients.influence(params, state, batch, other, cfg, key=KEY, rate=step)[0, 0]
    torch.testing.assert_close(before - after, found, rtol=1e-4, atol=0.0)


def test_noise_scale_is_the_trace_of_the_covariance_over_the_squared_norm() -> None:
    params, state, cfg = small_model()
    batch = small_batch(4)
    rows = torch.stack(
        [torch.cat([g.flatten() for g in row.values()]) for row in one_by_one(params, state, batch, cfg)]
    )
    _, (metrics, _) = loss(params, state, batch, cfg, key=KEY, train=False)
    rows = rows * 4 / metrics["masked_tokens"]
    variance = float(rows.var(dim=0, correction=1).sum())
    squared = float(rows.mean(dim=0).square().sum()) - variance / 4
    found = noise_scale.noise_scale_of_examples(params, state, batch, cfg, key=KEY, chunk=3)
    assert found.variance == pytest.approx(variance, rel=1e-9)
    assert found.squared_norm == pytest.approx(squared, rel=1e-9)


def test_noise_scale_from_two_batch_sizes() -> None:
    """Of gradients G + noise / sqrt(B), whose expected squared norm is |G|^2 + tr(S) / B."""
    norms = {size: 4.0 + 30.0 / size for size in (8, 64)}
    found = noise_scale.noise_scale_of_batches(norms[8], norms[64], 8, 64)
    assert found.variance == pytest.approx(30.0)
    assert found.simple == pytest.approx(7.5)
    with pytest.raises(ValueError, match="0 < small < big"):
        noise_scale.noise_scale_of_batches(1.0, 1.0, 8, 8)


def test_rows_keep_their_draws_in_chunks_and_memory_is_counted() -> None:
    params, state, cfg = small_model()
    batch = small_batch(4)
    whole = row_losses(params, state, name_rows(batch), cfg, key=KEY)[0]
    parts = torch.cat([row_losses(params, state, part, cfg, key=KEY)[0] for part in chunks(batch, 3)])
    assert_close(parts, whole)
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)
    assert saved_bytes(lambda: (x.exp() * 2).sin().sum()) == 2 * 8000  # the results of exp and of * 2
    assert rows_within(1000, 300) == 3
    assert rows_within(10, 300) == 1


def test_layer_cosines_and_modules() -> None:
    tree = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])}
    assert_close(gradients.layer_cosines(tree)[0, 1].double(), torch.tensor(0.5**0.5).double())
    summed = gradients.by_module({"a.b.c": torch.ones(2), "a.b.d": torch.ones(2), "e": torch.ones(2)}, depth=2)
    assert {name: float(value[0]) for name, value in summed.items()} == {"a.b": 2.0, "e": 1.0}

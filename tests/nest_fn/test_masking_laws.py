"""Masking: what holds for every draw, invariances, transforms, options, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn.config.model import MaskingConfig
from nest_fn.layers import random
from nest_fn.masking import apply_mask, draw_mask, init_masking

OVERLAP = MaskingConfig(feat_in=4)
SEPARATE = MaskingConfig(feat_in=4, allow_overlap=False, mask_prob=0.5)
BOTH = pytest.mark.parametrize("cfg", [OVERLAP, SEPARATE], ids=["overlap", "separate"])
LENGTHS = torch.tensor([300, 200, 45, 5, 0, 51])
KEYS = random.split(random.key(0), 6)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    block=st.integers(1, 60),
    probability=st.floats(0, 1),
    overlap=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_draw(lengths: list[int], block: int, probability: float, overlap: bool, seed: int) -> None:
    """Nothing at or beyond a length; short utterances lose their first 8 frames; runs are made of whole blocks."""
    cfg = MaskingConfig(allow_overlap=overlap, mask_prob=probability)
    mask = draw_mask(random.key(seed), torch.tensor(lengths), 150, cfg, block)
    assert mask.shape == (len(lengths), 150) and mask.dtype == torch.bool
    for row, length in zip(mask.tolist(), lengths, strict=True):
        assert not any(row[length:])
        if block >= 0.8 * length:
            assert row[:length] == [t < 8 for t in range(length)]
        elif overlap:
            assert not row[length - 1]  # Q13
            starts = [t for t in range(length) if row[t] and not (t and row[t - 1])]
            assert all(all(row[t : t + block]) for t in starts)


@BOTH
def test_neither_width_nor_company_matters(cfg: MaskingConfig) -> None:
    together = draw_mask(KEYS, LENGTHS, 300, cfg, 40)
    wide = draw_mask(KEYS, LENGTHS, 1000, cfg, 40)
    assert torch.equal(wide[:, :300], together) and not wide[:, 300:].any()
    for b in range(6):
        alone = draw_mask(KEYS[b : b + 1], LENGTHS[b : b + 1], max(int(LENGTHS[b]), 1), cfg, 40)
        assert torch.equal(alone[0], together[b, : alone.shape[1]])


@BOTH
def test_one_key_is_split_over_the_rows(cfg: MaskingConfig) -> None:
    assert torch.equal(draw_mask(random.key(0), LENGTHS, 300, cfg, 40), draw_mask(KEYS, LENGTHS, 300, cfg, 40))
    same = torch.full((6,), 300)
    rows = {tuple(row) for row in draw_mask(KEYS, same, 300, cfg, 40).tolist()}
    assert len(rows) > 3


@BOTH
def test_vmap_is_the_loop(cfg: MaskingConfig) -> None:
    mapped = torch.vmap(lambda key, n: draw_mask(key[None], n[None], 300, cfg, 40)[0])(KEYS, LENGTHS)
    assert torch.equal(mapped, draw_mask(KEYS, LENGTHS, 300, cfg, 40))


@BOTH
def test_compiled_is_eager(cfg: MaskingConfig) -> None:
    torch.compiler.reset()
    cfg = replace(cfg, force_block=True)
    compiled = torch.compile(draw_mask, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(KEYS, LENGTHS, 300, cfg, 40), draw_mask(KEYS, LENGTHS, 300, cfg, 40))


def test_separate_blocks_have_the_wanted_number_and_size() -> None:
    """At length 1000, p 0.65 and block 40: 17 blocks of 40 frames, each on one grid."""
    cfg = MaskingConfig(allow_overlap=False, mask_prob=0.65)
    mask = draw_mask(random.key(0), torch.full((100,), 1000), 1000, cfg, 40)
    assert (mask.sum(1) == 17 * 40).all()
    starts = (mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]).nonzero()
    for row in range(100):
        assert len({int(t) % 40 for r, t in starts.tolist() if r == row}) == 1


def test_force_block_masks_every_utterance_once() -> None:
    lengths = torch.full((500,), 60)
    keys = random.split(random.key(5), 500)
    free = draw_mask(keys, lengths, 60, OVERLAP, 40)
    forced = draw_mask(keys, lengths, 60, replace(OVERLAP, force_block=True), 40)
    empty = ~free.any(1)
    assert 300 < empty.sum() < 480  # 0.99^20 of 500
    assert torch.equal(forced[~empty], free[~empty])
    assert (forced[empty].sum(1) == 40).all()
    first = forced[empty].int().argmax(1)
    assert set(first.tolist()) == set(range(20))


@pytest.mark.parametrize("probability,share", [(0.0, 0.0), (1.0, 1.0)])
def test_extreme_probabilities(probability: float, share: float) -> None:
    mask = draw_mask(random.key(0), torch.tensor([200]), 200, replace(OVERLAP, mask_prob=probability), 40)
    assert mask[0, :199].float().mean() == share and not mask[0, 199]


def test_lengths_beyond_the_width_count_as_the_width() -> None:
    wide = draw_mask(KEYS[:1], torch.tensor([999]), 300, OVERLAP, 40)
    assert torch.equal(wide, draw_mask(KEYS[:1], torch.tensor([300]), 300, OVERLAP, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masked_frames_become_the_embedding(dtype: torch.dtype) -> None:
    x = torch.randn(6, 4, 300).to(dtype)
    mask, embedding = draw_mask(KEYS, LENGTHS, 300, OVERLAP, 40), torch.tensor([1.0, 2.0, 3.0, 4.0])
    y = apply_mask(x, mask, embedding)
    assert y.dtype == dtype  # Q17
    frames = y.transpose(1, 2)
    assert (frames[mask] == embedding).all() and torch.equal(frames[~mask], x.transpose(1, 2)[~mask])


def test_gradients_reach_the_embedding_and_the_unmasked_frames() -> None:
    x = torch.randn(2, 4, 10, dtype=torch.float64).requires_grad_()
    embedding = torch.randn(4, dtype=torch.float64).requires_grad_()
    mask = torch.arange(10).expand(2, 10) % 3 == 0
    assert torch.autograd.gradcheck(lambda a, e: apply_mask(a, mask, e), (x, embedding))


def test_where_the_embedding_lives() -> None:
    wide = replace(OVERLAP, feat_in=4096)
    params, state = init_masking(random.key(0), wide)
    assert params == {} and state["embedding"].std().item() == pytest.approx(0.1, rel=0.05)
    params, state = init_masking(random.key(0), replace(wide, freeze=False))
    assert state == {} and params["embedding"].shape == (4096,)
    params, state = init_masking(random.key(0), replace(OVERLAP, freeze=False, mask_value=-1.5))
    assert params == {} and state["embedding"].tolist() == [-1.5] * 4


X = torch.zeros(2, 4, 10)
ERRORS: list[tuple[str, Callable[[], object]]] = [
    ("want a mask \\[B, F\\]", lambda: apply_mask(X, torch.zeros(2, 9, dtype=torch.bool), torch.zeros(4))),
    ("want an embedding \\[4\\]", lambda: apply_mask(X, torch.zeros(2, 10, dtype=torch.bool), torch.zeros(5))),
    ("block >= 1", lambda: draw_mask(KEYS, LENGTHS, 300, OVERLAP, 0)),
    ("mask_prob in \\[0, 1\\]", lambda: draw_mask(KEYS, LENGTHS, 300, replace(OVERLAP, mask_prob=1.5), 40)),
    ("max_mask_ratio", lambda: draw_mask(KEYS, LENGTHS, 300, replace(OVERLAP, max_mask_ratio=0.0), 40)),
    ("pass integers", lambda: draw_mask(KEYS, LENGTHS.float(), 300, OVERLAP, 40)),
    ("draw_mask: keys", lambda: draw_mask(LENGTHS, LENGTHS, 300, OVERLAP, 40)),
    ("masking.feat_in is None", lambda: init_masking(random.key(0), MaskingConfig())),
]


@pytest.mark.parametrize("message,call", ERRORS)
def test_errors_say_what_came(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_masks_are_drawn_without_a_loop() -> None:
    """The number of operations does not grow with the batch."""

    def operations(rows: int) -> int:
        graph = torch.fx.experimental.proxy_tensor.make_fx(
            lambda keys, lengths: draw_mask(keys, lengths, 100, OVERLAP, 10)
        )(random.split(random.key(0), rows), torch.full((rows,), 100))
        return len(graph.graph.nodes)

    assert operations(2) == operations(5)

"""Masks against 20000 draws of the reference for each length, and its masked features."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from nest_fn.config.model import MaskingConfig
from nest_fn.layers import random
from nest_fn.masking import apply_mask, draw_mask
from tests.reference_cases import load

STATISTICS = ["masking_overlap_bs40", "masking_overlap_bs5", "masking_nonoverlap_bs40"]
CASES = [(name, length) for name in STATISTICS for length in load(name).config["lengths"]]
# Where the reference masks beyond the length (Q16), its counts are not ours; frame by frame we agree up to the length.
CLAMPED = [("masking_nonoverlap_bs40", 51), ("masking_nonoverlap_bs40", 64)]
DRAWS = 20000
LEAST_P = 1e-3  # keys are fixed, so these tests pass or fail for ever


@cache
def masks(name: str, length: int) -> torch.Tensor:
    """bool [20000, length + 8]"""
    settings = load(name).config["masking"]
    cfg, lengths = MaskingConfig(**settings), torch.full((2000,), length)
    draws = [
        draw_mask(random.fold_in(random.key(1), i), lengths, length + 8, cfg, cfg.block_size)
        for i in range(DRAWS // 2000)
    ]
    return torch.cat(draws)


def p_value(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Chi-square test that two histograms of equally many draws have one source; rare bins are pooled."""
    size = max(len(ours), len(theirs))
    a, b = (torch.nn.functional.pad(h.to(torch.float64), (0, size - len(h))) for h in (ours, theirs))
    frequent = a + b >= 20
    a, b = (torch.cat((h[frequent], h[~frequent].sum()[None])) for h in (a, b))
    statistic, bins = ((a - b).square() / (a + b).clamp(min=1)).sum(), int((a + b > 0).sum())
    return float(torch.special.gammaincc(torch.tensor(max(bins - 1, 1) / 2.0), statistic.to(torch.float32) / 2))


@pytest.mark.parametrize("name,length", CASES)
def test_every_frame_is_masked_as_often(name: str, length: int) -> None:
    ours = masks(name, length).to(torch.float64).mean(0)
    theirs = load(name).tensors[f"out/T{length}/prob_frame_masked"].to(torch.float64)
    assert (ours[length:] == 0).all()
    p = (ours + theirs[: len(ours)])[:length] / 2
    deviation = (2 * p * (1 - p) / DRAWS).sqrt()
    z = (ours[:length] - theirs[:length]).abs() / deviation.clamp(min=1e-9)
    assert torch.equal(ours[:length][deviation == 0], theirs[:length].round(decimals=6)[deviation == 0])
    assert z[deviation > 0].max() < 4.5 if (deviation > 0).any() else True


@pytest.mark.parametrize("name,length", [case for case in CASES if case not in CLAMPED])
def test_number_of_masked_frames_and_runs(name: str, length: int) -> None:
    drawn, case = masks(name, length), load(name)
    assert case.tensors[f"out/T{length}/fraction_raised_when_buffer_is_T"] == 0
    frames = torch.bincount(drawn.sum(1))
    starts = drawn[:, 1:] & ~drawn[:, :-1]
    runs = torch.bincount(starts.sum(1) + drawn[:, 0])
    assert p_value(frames, case.tensors[f"out/T{length}/hist_masked_frames"]) > LEAST_P
    assert p_value(runs, case.tensors[f"out/T{length}/hist_masked_runs"]) > LEAST_P


def test_the_p_value_can_be_small() -> None:
    frames = torch.bincount(masks("masking_overlap_bs5", 125).sum(1))
    assert p_value(frames, frames.roll(1)) < LEAST_P


@pytest.mark.parametrize("name", ["masking_apply_overlap", "masking_apply_nonoverlap"])
def test_masked_features(name: str) -> None:
    t = load(name).tensors
    assert torch.equal(
        apply_mask(t["in/input_feats"], t["in/mask"], t["weights/mask_embedding"]), t["out/masked_feats"]
    )

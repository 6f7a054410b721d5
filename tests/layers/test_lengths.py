"""Length arithmetic is what convolutions do to widths; masks are what lengths say."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from nest_fn.layers import random
from nest_fn.layers.lengths import check_lengths, strided, valid_mask, zero_padding
from nest_fn.layers.subsampling import SubsamplingSpec, init_subsampling, subsample, subsampled_length


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 4))
def test_strided_is_the_width_of_a_convolution(length: int, kernel: int, stride: int, padding: int) -> None:
    if length + 2 * padding < kernel:
        return
    width = F.conv1d(torch.zeros(1, 1, length), torch.zeros(1, 1, kernel), None, stride, padding).shape[-1]
    assert strided(length, kernel, stride, 2 * padding) == width
    assert int(strided(torch.tensor(length), kernel, stride, 2 * padding)) == width


@given(st.integers(2, 60))
def test_strided_with_ceil_is_the_width_of_a_pooling(length: int) -> None:
    assert strided(length, 2, 2, 0, ceil=True) == F.max_pool1d(torch.zeros(1, 1, length), 2, ceil_mode=True).shape[-1]


SPECS = [
    *[SubsamplingSpec("dw_striding", factor, 10, 4, 3) for factor in (2, 4, 8, 16)],
    *[SubsamplingSpec("dw_striding", factor, 10, 4, 3, causal=True) for factor in (2, 4, 8)],
    *[SubsamplingSpec("striding", factor, 10, 4, 3) for factor in (2, 4, 8)],
    SubsamplingSpec("striding", 8, 10, 4, 3, causal=True),
    *[SubsamplingSpec(kind, factor, 10, 4, 3) for kind in ("stacking", "stacking_norm") for factor in (2, 3, 8)],
    SubsamplingSpec(None, 1, 10, 4, 3),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.factor}-{'causal' if s.causal else ''}")
def test_subsampled_length_is_the_width_that_comes_out(spec: SubsamplingSpec) -> None:
    """The longest row fills its batch, for every width."""
    params = init_subsampling(random.key(0), spec)
    for frames in range(1, 50):
        x = torch.zeros(1, frames, 10)
        y, lengths = subsample(params, x, torch.tensor([frames]), spec)
        assert lengths.tolist() == [y.shape[1]] == [subsampled_length(frames, spec, frames)]
        shorter = [subsampled_length(length, spec, frames) for length in range(frames + 1)]
        made = subsampled_length(torch.arange(frames + 1), spec, frames)
        assert torch.equal(torch.as_tensor(made), torch.tensor(shorter))
        assert max(shorter) <= y.shape[1]
        assert shorter == sorted(shorter)


def test_an_even_halving_rounds_up_and_keeps_zero() -> None:
    spec = SubsamplingSpec("dw_striding", 8, 80, 16, 4)
    assert [subsampled_length(n, spec, 200) for n in (0, 1, 8, 9, 100, 104)] == [0, 1, 1, 2, 13, 13]


def test_causal_halving_has_one_frame_more() -> None:
    spec = SubsamplingSpec("dw_striding", 8, 80, 16, 4, causal=True)
    assert subsampled_length(104, spec, 104) == 14


def test_vggnet_pools_tensors_up_and_lengths_down() -> None:
    """As the reference does: the tensor's width is one more than the length of the longest row."""
    spec = SubsamplingSpec("vggnet", 4, 10, 4, 3)
    y, lengths = subsample(init_subsampling(random.key(0), spec), torch.zeros(1, 11, 10), torch.tensor([11]), spec)
    assert (y.shape[1], lengths.tolist()) == (3, [2])


@pytest.mark.parametrize(
    "kind,factor,message",
    [
        ("dw_striding", 6, "dw_striding halves, so factor 6 must be 2, 4, 8, 16"),
        ("striding", 1, "striding halves, so factor 1 must be"),
        ("stacking", 1, "stacking with factor 1 stacks nothing"),
        ("striding_conv1d", 4, "no kind is called 'striding_conv1d'; use one of dw_striding, striding, vggnet"),
    ],
)
def test_unreachable_subsamplings_are_refused(kind: str, factor: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        init_subsampling(random.key(0), SubsamplingSpec(kind, factor, 10, 4, 3))


def test_stacking_is_frames_side_by_side() -> None:
    spec = SubsamplingSpec("stacking", 3, 2, 6, 0)
    params = {"out": {"weight": torch.eye(6), "bias": torch.zeros(6)}}
    x = torch.arange(10.0).reshape(1, 5, 2)
    y, lengths = subsample(params, x, torch.tensor([5]), spec)
    assert y[0].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 0, 0]]
    assert lengths.tolist() == [2]


def test_masks() -> None:
    mask = valid_mask(torch.tensor([0, 2, 9]), 3)
    assert mask.tolist() == [[False] * 3, [True, True, False], [True] * 3]
    x = torch.full((3, 3, 2), torch.nan)
    assert zero_padding(x, mask)[0].eq(0).all()
    assert zero_padding(x, mask)[2].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_check_lengths_takes_integers(dtype: torch.dtype) -> None:
    check_lengths("f", torch.zeros(2, 5), torch.tensor([1, 2], dtype=dtype))

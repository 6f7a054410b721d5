"""The functions that stand in for torchaudio's: equal to them, 1e-12 in float64 and 1e-6 in float32."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nest_fn.audio import functions, plain
from nest_fn.audio.fine import FineResampler
from nest_fn.layers import random
from nest_fn.layers.types import Tensor

torchaudio = pytest.importorskip("torchaudio", reason="torchaudio, the oracle, does not load")
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}


def noise(length: int, dtype: torch.dtype, rows: int = 2) -> Tensor:
    return random.normal(random.key(length), (rows, length), dtype) * 0.1


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("n_fft, length, hop", [(512, 400, 160), (512, 512, 160), (400, 399, 7), (64, 25, 64)])
def test_spectrogram(dtype: torch.dtype, n_fft: int, length: int, hop: int) -> None:
    x, window = noise(4000, dtype), torch.hann_window(length, periodic=False, dtype=dtype)
    wanted = torchaudio.functional.spectrogram(x, 0, window, n_fft, hop, length, None, False, False)
    made = plain.spectrogram(x, window, n_fft, hop)
    assert made.dtype == wanted.dtype
    torch.testing.assert_close(made, wanted, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("rate", [1000, 8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000, 384000])
def test_resampling(dtype: torch.dtype, rate: int) -> None:
    transform = torchaudio.transforms.Resample(rate, 16000, dtype=torch.float64).to(dtype)
    for length in (1, 7, rate // 20 + 1):
        x = noise(length, dtype)
        wanted, made = transform(x), plain.resampler(rate, 16000, dtype)(x)
        assert made.shape == wanted.shape == (2, math.ceil(length * 16000 / rate))
        torch.testing.assert_close(made, wanted, atol=BOUNDS[dtype], rtol=0)
        torch.testing.assert_close(functions.resampler(rate, 16000, dtype)(x), wanted, atol=0, rtol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 500))
def test_resampling_between_any_rates(rate: int, target: int, length: int) -> None:
    x = noise(length, torch.float64)
    wanted = torchaudio.transforms.Resample(rate, target, dtype=torch.float64)(x)
    torch.testing.assert_close(plain.resampler(rate, target, torch.float64)(x), wanted, atol=1e-12, rtol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 500))
def test_filters_computed_one_by_one(rate: int, target: int, length: int) -> None:
    assume(rate != target)
    x = noise(length, torch.float64)
    wanted = plain.resampler(rate, target, torch.float64)(x)
    torch.testing.assert_close(FineResampler(rate, target)(x), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_fine_ratio(dtype: torch.dtype) -> None:
    made, x = functions.resampler(44056, 16000, dtype), noise(5000, dtype, rows=1)
    assert isinstance(made, FineResampler)
    transform = torchaudio.transforms.Resample(44056, 16000, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(made(x), transform(x), atol=BOUNDS[dtype], rtol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text("abcd", max_size=8), st.lists(st.sampled_from("abcd"), max_size=8))
def test_edit_distance(one: str, other: list[str]) -> None:
    wanted = torchaudio.functional.edit_distance(one, other)
    assert plain.edit_distance(one, other) == functions.edit_distance(one, other) == wanted
    assert plain.edit_distance(other, one) == wanted


def test_one_of_them_is_used() -> None:
    assert functions.UNUSED_BECAUSE is None

"""Log-mel features: torchaudio as oracle, invariances, transforms, options, errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torchaudio

from nest_fn import mel
from nest_fn.config.model import PreprocessorConfig
from nest_fn.frontend import frames, log_mel
from nest_fn.layers import random
from nest_fn.layers.types import Tensor

CFG = PreprocessorConfig(dither=0.0)
PLAIN = replace(CFG, normalize=None, pad_to=0)
SMALL = PreprocessorConfig(  # for derivatives: 100 samples a second
    sample_rate=100, n_window_size=8, n_window_stride=4, window_size=None, window_stride=None, n_fft=8, features=3,
    dither=0.0, pad_to=0,
)  # fmt: skip
WIDTH = 4000
LENGTHS = torch.tensor([4000, 2500, 1601])


@pytest.fixture
def audio() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, WIDTH, generator=generator) * 0.1


def test_torchaudio_gives_the_same_log_mel(audio: Tensor) -> None:
    """Against torchaudio's own filters, which are float32 throughout."""
    transform = torchaudio.transforms.MelSpectrogram(
        16000, n_fft=512, win_length=400, hop_length=160, f_min=0, f_max=8000, n_mels=80, power=2.0,
        pad_mode="constant", wkwargs={"periodic": False}, norm="slaney", mel_scale="slaney",
    )  # fmt: skip
    emphasised = torchaudio.functional.preemphasis(audio, 0.97)
    wanted = torch.log(transform(emphasised) + 2.0**-24)
    got, lengths = log_mel(audio, torch.full((3,), WIDTH), PLAIN)
    n = int(lengths[0])
    assert n == WIDTH // 160
    torch.testing.assert_close(got[..., :n], wanted[..., :n], atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    "rate,n_fft,bins,low,high", [(16000, 512, 80, 0, 8000), (16000, 512, 40, 300, 4000), (8000, 256, 23, 20, 3800)]
)
def test_filters_are_torchaudio_s(rate: int, n_fft: int, bins: int, low: float, high: float) -> None:
    for norm in ("slaney", None):
        theirs = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, low, high, bins, rate, norm, "slaney").T
        ours = mel.mel_filters(rate, n_fft, bins, low, high, norm)
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.max()), rtol=0)


def test_filters_have_the_documented_sum() -> None:
    filters = mel.mel_filters(16000, 512, 80, 0.0, 8000.0)
    assert filters.sum() == pytest.approx(2.5582607, abs=1e-6) and filters.max() == pytest.approx(0.026406592, abs=1e-8)


@pytest.mark.parametrize("samples,count,width", [(16000, 100, 112), (40960, 256, 272), (48000, 300, 304)])
def test_frame_law(samples: int, count: int, width: int) -> None:
    x, lengths = log_mel(torch.zeros(1, samples), torch.tensor([samples]), CFG)
    assert frames(samples, CFG) == count == int(lengths) and x.shape[2] == width
    assert frames(torch.tensor([0, 159, 160]), CFG).tolist() == [0, 0, 1]
    legacy = replace(CFG, compat="legacy")
    assert frames(samples, legacy) == count + 1 and frames(0, legacy) == 0


def test_statistics_are_those_of_valid_frames(audio: Tensor) -> None:
    x, lengths = log_mel(audio, LENGTHS, CFG)
    for row, n in zip(x, lengths.tolist(), strict=True):
        torch.testing.assert_close(row[:, :n].mean(1), torch.zeros(80), atol=1e-4, rtol=0)
        torch.testing.assert_close(row[:, :n].std(1), torch.ones(80), atol=1e-3, rtol=0)
        assert (row[:, n:] == 0).all()
    whole, _ = log_mel(audio, LENGTHS, replace(CFG, normalize="all_features"))
    for row, n in zip(whole, lengths.tolist(), strict=True):
        assert row[:, :n].mean().abs() < 1e-4 and (row[:, :n].std() - 1).abs() < 1e-3


@pytest.mark.parametrize("key", [None, random.key(7)])
def test_neither_padding_nor_company_matters(audio: Tensor, key: Tensor | None) -> None:
    cfg = replace(CFG, dither=1e-3, nb_augmentation_prob=0.5)
    keys = None if key is None else random.split(key, 3)
    train = key is not None
    together, lengths = log_mel(audio, LENGTHS, cfg, key=keys, train=train)
    wide = torch.nn.functional.pad(audio, (0, 999), value=5.0)
    wider, _ = log_mel(wide, LENGTHS, cfg, key=keys, train=train)
    for b, n in enumerate(lengths.tolist()):
        one_key = None if keys is None else keys[b : b + 1]
        alone, _ = log_mel(audio[b : b + 1, : LENGTHS[b]], LENGTHS[b : b + 1], cfg, key=one_key, train=train)
        torch.testing.assert_close(alone[0, :, :n], together[b, :, :n], atol=1e-4, rtol=0)
        torch.testing.assert_close(wider[b, :, :n], together[b, :, :n], atol=1e-4, rtol=0)


def test_one_key_is_split_over_the_rows(audio: Tensor) -> None:
    cfg, key = replace(CFG, dither=0.01), random.key(1)
    one = log_mel(audio, LENGTHS, cfg, key=key, train=True)[0]
    assert torch.equal(one, log_mel(audio, LENGTHS, cfg, key=random.split(key, 3), train=True)[0])
    assert not torch.equal(one, log_mel(audio, LENGTHS, cfg, key=random.key(2), train=True)[0])


def test_dither_is_white_noise_in_training_only() -> None:
    silence, length = torch.zeros(1, 160000), torch.tensor([160000])
    cfg = replace(PLAIN, dither=0.5, preemph=None)
    before = silence.clone()
    noisy, _ = log_mel(silence, length, cfg, key=random.key(0), train=True)
    assert torch.equal(silence, before)  # Q3
    wanted, _ = log_mel(0.5 * torch.randn(1, 160000, generator=torch.Generator().manual_seed(0)), length, cfg)
    torch.testing.assert_close(noisy.mean(2), wanted.mean(2), atol=0.2, rtol=0)
    quiet = log_mel(silence, length, cfg, key=random.key(0))[0][..., :1000]
    assert torch.allclose(quiet, torch.tensor(2.0**-24).log())


def test_narrow_band_rows_lose_their_high_bins(audio: Tensor) -> None:
    cfg = replace(PLAIN, nb_augmentation_prob=1.0, log=False)
    wide, _ = log_mel(audio, LENGTHS, cfg)
    narrow, _ = log_mel(audio, LENGTHS, cfg, key=random.key(0), train=True)
    edge = int((mel.mel_filters(16000, 512, 80, 0, 8000)[:, 128:].sum(1) == 0).sum())  # filters that end below 4000 Hz
    assert torch.equal(narrow[:, :edge], wide[:, :edge])
    assert (narrow[:, -10:] == 0).all() and (wide[0, -10:, 3] > 0).all()
    off = replace(cfg, nb_max_freq=8000.0)
    assert torch.equal(log_mel(audio, LENGTHS, off, train=True)[0], wide)


def test_int16_and_low_precision_audio(audio: Tensor) -> None:
    whole = (audio * 32768).round().clamp(-32768, 32767).to(torch.int16)
    assert torch.equal(log_mel(whole, LENGTHS, CFG)[0], log_mel(whole / 32768, LENGTHS, CFG)[0])
    half = audio.to(torch.bfloat16)
    assert torch.equal(log_mel(half, LENGTHS, CFG)[0], log_mel(half.float(), LENGTHS, CFG)[0])


def test_float64_stays_and_autocast_is_ignored(audio: Tensor) -> None:
    x = log_mel(audio, LENGTHS, CFG)[0]
    double = log_mel(audio.double(), LENGTHS, CFG)[0]
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), x, atol=1e-3, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel(audio, LENGTHS, CFG)[0], x)


def test_fixed_statistics_and_splicing(audio: Tensor) -> None:
    raw, _ = log_mel(audio, LENGTHS, PLAIN)
    means, stds = tuple(float(i) for i in range(80)), tuple(1.0 + i for i in range(80))
    fixed, _ = log_mel(audio, LENGTHS, replace(PLAIN, normalize="fixed", fixed_mean=means, fixed_std=stds))
    torch.testing.assert_close(fixed[1, 7, :15], (raw[1, 7, :15] - 7.0) / 8.0)
    spliced, _ = log_mel(audio, LENGTHS, replace(PLAIN, frame_splicing=3))
    assert torch.equal(spliced, raw.repeat(1, 3, 1))  # Q7


def test_pad_value_fills_padding(audio: Tensor) -> None:
    x, lengths = log_mel(audio, LENGTHS, replace(CFG, pad_value=-7.0))
    for row, n in zip(x, lengths.tolist(), strict=True):
        assert (row[:, n:] == -7).all() and (row[:, :n] != -7).all()


def test_lengths_beyond_the_width_count_as_the_width(audio: Tensor) -> None:
    x, lengths = log_mel(audio, torch.tensor([9999, 4000, -5]), CFG)
    assert lengths.tolist() == [25, 25, 0]
    assert torch.equal(x, log_mel(audio, torch.tensor([4000, 4000, 0]), CFG)[0])


def test_one_frame_is_zero_now_and_nan_in_legacy(audio: Tensor) -> None:
    one = torch.tensor([160, 160, 160])
    assert (log_mel(audio, one, CFG)[0] == 0).all()  # Q4
    x, lengths = log_mel(audio, torch.tensor([159, 159, 0]), replace(CFG, compat="legacy"))
    assert lengths.tolist() == [1, 1, 0] and x[0, :, 0].isnan().all() and (x[2] == 0).all()


@pytest.mark.parametrize("length", [0, 1, 159, 160, 320])
def test_short_and_silent_audio_is_finite(length: int) -> None:
    x, _ = log_mel(torch.zeros(2, max(length, 1)), torch.tensor([length, 0]), CFG)
    assert x.isfinite().all()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch.stft runs row by row under vmap
def test_vmap_is_the_loop(audio: Tensor) -> None:
    cfg, keys = replace(CFG, dither=1e-3), random.split(random.key(3), 3)

    def one(row: Tensor, length: Tensor, key: Tensor) -> Tensor:
        return log_mel(row[None], length[None], cfg, key=key[None], train=True)[0][0]

    wanted = log_mel(audio, LENGTHS, cfg, key=keys, train=True)[0]
    torch.testing.assert_close(torch.vmap(one)(audio, LENGTHS, keys), wanted, atol=1e-5, rtol=0)


def test_compiled_is_eager(audio: Tensor) -> None:
    fixed = replace(
        CFG, normalize="fixed", fixed_mean=(1.0,) * 40, fixed_std=(2.0,) * 40, features=40, window="hamming"
    )
    dithered = replace(CFG, dither=1e-3)

    def both(x: Tensor, lengths: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return log_mel(x, lengths, dithered, key=key, train=True)[0], log_mel(x, lengths, fixed)[0]

    torch.compiler.reset()
    got = torch.compile(both, fullgraph=True, backend="aot_eager")(audio, LENGTHS, random.key(0))
    for ours, wanted in zip(got, both(audio, LENGTHS, random.key(0)), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("context", ["inference", "grad", "vmap"])
def test_gradient_after_a_first_call_in_another_mode(audio: Tensor, context: str) -> None:
    def total(x: Tensor) -> Tensor:
        return log_mel(x, LENGTHS, CFG)[0].square().sum()

    if context == "inference":
        with torch.inference_mode():
            total(audio)
    elif context == "grad":
        torch.func.grad(total)(audio)
    else:
        torch.vmap(total)(audio[None])
    x = audio.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(x), x)
    assert gradient.isfinite().all() and (gradient != 0).any()


@pytest.mark.parametrize("power", [1.0, 2.0, 1.5])
def test_gradient(power: float) -> None:
    x = torch.randn(2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cfg = replace(SMALL, mag_power=power)
    assert torch.autograd.gradcheck(lambda a: log_mel(a, torch.tensor([24, 17]), cfg)[0], (x,), atol=1e-4)


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_gradient_of_silence_is_finite(power: float) -> None:
    x = torch.zeros(1, 800, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_mel(x, torch.tensor([800]), replace(CFG, mag_power=power))[0].sum(), x)
    assert gradient.isfinite().all()


ONE = torch.zeros(1, 800)
ERRORS: list[tuple[str, Callable[[], object]]] = [
    ("audio wants \\[B, N\\]", lambda: log_mel(ONE[0], torch.tensor([800]), CFG)),
    ("float or int16", lambda: log_mel(ONE.to(torch.int32), torch.tensor([800]), CFG)),
    ("one length a row", lambda: log_mel(ONE, torch.tensor([800, 800]), CFG)),
    ("pass integers", lambda: log_mel(ONE, torch.tensor([800.0]), CFG)),
    ("needs key=", lambda: log_mel(ONE, torch.tensor([800]), replace(CFG, dither=1e-5), train=True)),
    ("unknown window 'hanning'", lambda: log_mel(ONE, torch.tensor([800]), replace(CFG, window="hanning"))),
    ("unknown normalize", lambda: log_mel(ONE, torch.tensor([800]), replace(CFG, normalize="per_bin"))),
    ("unknown mel_norm", lambda: log_mel(ONE, torch.tensor([800]), replace(CFG, mel_norm="htk"))),
    ("log_zero_guard_type", lambda: log_mel(ONE, torch.tensor([800]), replace(CFG, log_zero_guard_type="max"))),
    ("log_zero_guard_value", lambda: log_mel(ONE, torch.tensor([800]), replace(CFG, log_zero_guard_value="small"))),
    ("80 numbers in fixed_mean, got none", lambda: log_mel(ONE, torch.tensor([800]), replace(CFG, normalize="fixed"))),
    ("does not fit n_fft 256", lambda: log_mel(ONE, torch.tensor([800]), replace(CFG, n_fft=256))),
    ("lowfreq < highfreq", lambda: log_mel(ONE, torch.tensor([800]), replace(CFG, lowfreq=9000.0))),
    ("even hop", lambda: log_mel(ONE, torch.tensor([800]), replace(CFG, exact_pad=True, window_stride=0.0078125))),
    ("at least 257", lambda: log_mel(ONE[:, :256], torch.tensor([256]), replace(CFG, compat="legacy"))),
]


@pytest.mark.parametrize("message,call", ERRORS)
def test_errors_say_what_came(message: str, call: Callable[[], object]) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()

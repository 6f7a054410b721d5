"""Room responses: convolution against torchaudio, the direct path at its place, loudness, and a measured room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchaudio.functional as AF

from nest_fn.config.training import AugmentConfig, DataConfig
from nest_fn.layers import random
from nest_fn.train.augment.mixing import augment
from nest_fn.train.augment.reverb import _fft_size, reverberate
from nest_fn.train.data.clips import load_clips

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
LENGTH = torch.tensor([800, 500, 0])
AUDIO = torch.where(torch.arange(800) < LENGTH[:, None], random.normal(random.key(0), (3, 800)), 0.0)
RIR = torch.tensor([[0.05, -0.1, 0.9, 0.3, -0.2, 0.1]])  # its direct path comes third


def words(seed: int, rows: int = 3) -> torch.Tensor:
    return random.bits(random.key(seed), (rows, 2))


def test_convolution_aligned_and_as_loud() -> None:
    heard = reverberate(AUDIO, LENGTH, RIR, words(0), 1.0)
    for row, n in enumerate(LENGTH.tolist()):
        whole = AF.fftconvolve(AUDIO[row], RIR[0])[2 : 2 + n]
        wanted = whole * (AUDIO[row].norm() / whole.norm()) if n else whole
        torch.testing.assert_close(heard[row, :n], wanted, rtol=0, atol=1e-5)
        assert (heard[row, n:] == 0).all()


def test_a_pure_delay_changes_nothing() -> None:
    delay = torch.zeros(1, 200)
    delay[0, 150] = -0.5  # nor does its level, but for the sign
    torch.testing.assert_close(reverberate(AUDIO, LENGTH, delay, words(0), 1.0), -AUDIO, rtol=0, atol=1e-5)


def test_a_silent_room_is_no_room() -> None:
    assert torch.equal(reverberate(AUDIO, LENGTH, torch.zeros(1, 5), words(0), 1.0), AUDIO)


def test_rooms_and_rows_are_drawn() -> None:
    rirs = torch.tensor([[1.0, 0.0], [1.0, 0.7], [1.0, -0.7]])
    audio, length = AUDIO[:1].expand(3000, 800)[:, :50], torch.full((3000,), 50)
    heard = reverberate(audio, length, rirs, words(1, 3000), 0.4)
    distance = [(heard - reverberate(audio, length, rir[None], words(1, 3000), 1.0)).abs().amax(-1) for rir in rirs]
    dry, low, high = ((d < 1e-5).double().mean().item() for d in distance)
    assert abs(dry - (0.6 + 0.4 / 3)) < 0.03 and abs(low - 0.4 / 3) < 0.03 and abs(high - 0.4 / 3) < 0.03


def test_targets_stay_dry_and_the_ratio_counts_from_what_is_heard() -> None:
    samples = (AUDIO[:2].clamp(-3, 3) * 5000).to(torch.int16)
    batch = {
        "audio": samples, "audio_len": LENGTH[:2], "noise": samples.flip(-1), "noise_len": LENGTH[:2],
        "row": torch.arange(2), "utterance": torch.arange(2), "weight": torch.ones(2),
    }  # fmt: skip
    batch["noise"] = torch.where(torch.arange(800) < LENGTH[:2, None], samples.roll(1), 0).to(torch.int16)
    cfg = AugmentConfig(prob=1.0, noise_ratio=1.0, min_r_noise=6.0, max_r_noise=6.0, rir_prob=1.0)
    key = random.key(4)
    mixed, dry = augment(batch, cfg, key, RIR), augment(batch, AugmentConfig(prob=0.0), None)
    room = augment(batch, AugmentConfig(prob=0.0, rir_prob=1.0), key, RIR)["noisy_audio"]
    assert torch.equal(mixed["audio"], dry["audio"]) and not torch.equal(room, dry["audio"])
    noise = mixed["noisy_audio"].double() - room
    got = 10 * torch.log10(room.double().square().sum(-1) / noise.square().sum(-1))
    torch.testing.assert_close(got, torch.full_like(got, 6.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 0)])
def test_bad_responses(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="want \\[rooms, samples\\]"):
        reverberate(AUDIO, LENGTH, torch.zeros(shape), words(0), 1.0)


def test_fft_sizes_are_the_smallest_smooth_ones() -> None:
    def smooth(n: int) -> bool:
        for factor in (2, 3, 5):
            while n % factor == 0:
                n //= factor
        return n == 1

    for least in range(1, 700):
        assert _fft_size(least) == next(n for n in range(least, 2 * least + 1) if smooth(n))


@pytest.mark.skipif(not DATA.is_dir(), reason="the real recordings of ../shared/data are absent")
def test_a_measured_room() -> None:
    pytest.importorskip("soundfile")
    pool = load_clips([str(DATA / "rir.jsonl")], DataConfig(num_workers=0))
    rirs = torch.from_numpy(pool.read(0, 0, int(pool.length[0])).copy()).float()[None]
    click = torch.zeros(1, 16000)
    click[0, 3000] = 1.0
    heard = reverberate(click, torch.tensor([16000]), rirs, words(0, 1), 1.0)[0]
    assert heard.abs().argmax() == 3000
    torch.testing.assert_close(heard.norm(), click.norm(), rtol=1e-5, atol=0)
    early, late = heard[3000:3400].norm(), heard[11000:11400].norm()
    assert early > 10 * late > 0  # it dies away

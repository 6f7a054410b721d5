"""Slopes against finite differences, shifts and mixtures against their definitions."""

from __future__ import annotations

import pytest
import torch

from nest_fn import forward, key
from nest_fn.analysis import sensitivity
from nest_fn.frontend import log_mel
from nest_fn.layers import random
from tests.analysis.models import small_batch, small_model

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own jvp
KEY = key(5)


@pytest.mark.parametrize("kind", ["direction", "snr", "shift"])
def test_slopes_are_finite_differences(kind: str) -> None:
    params, state, cfg = small_model()
    batch = small_batch(2)
    noise = random.normal(key(3), tuple(batch["audio"].shape), torch.float64)
    change = {
        "direction": sensitivity.adding(batch["noisy_audio"], noise),
        "snr": sensitivity.louder_noise(batch["audio"], noise, 10.0),
        "shift": sensitivity.shifting(batch["noisy_audio"]),
    }[kind]
    found = sensitivity.slopes(params, state, batch, cfg, change, key=KEY)
    step = 1e-5

    def at(s: float) -> tuple[torch.Tensor, torch.Tensor]:
        noisy = change(torch.full((2,), s, dtype=torch.float64))
        output, _ = forward(params, state, {**batch, "noisy_audio": noisy}, cfg, key=KEY)
        return output.log_probs, log_mel(noisy, batch["noisy_audio_len"], cfg.preprocessor)[0]

    ends = [at(step), at(-step)]
    scores, features = ((one - two) / (2 * step) for one, two in zip(*ends, strict=True))
    wanted = scores if scores.ndim == 4 else scores[..., None]
    torch.testing.assert_close(found.log_probs, wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()))
    torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-6 * float(features.abs().max()))
    assert found.information.shape == wanted[:, :, 0].shape
    assert float(found.information.min()) >= 0


def test_information_is_twice_the_divergence_of_a_small_step() -> None:
    params, state, cfg = small_model()
    batch = small_batch(1)
    noise = random.normal(key(3), tuple(batch["audio"].shape), torch.float64)
    change = sensitivity.adding(batch["noisy_audio"], noise)
    found = sensitivity.slopes(params, state, batch, cfg, change)
    step = 1e-4
    one, two = (
        forward(params, state, {**batch, "noisy_audio": change(torch.full((1,), s).double())}, cfg, apply_mask=False)[0]
        for s in (0.0, step)
    )
    divergence = (one.log_probs.exp() * (one.log_probs - two.log_probs)).sum(dim=2).reshape(-1)
    torch.testing.assert_close(2 * divergence / step**2, found.information.reshape(-1), rtol=0.05, atol=1e-4)


def test_a_mixture_has_its_ratio_and_silence_stays() -> None:
    audio, noise = small_batch()["audio"], random.normal(key(3), (3, 12000), torch.float64)
    noise[2] = 0
    added = sensitivity.at_snr(audio, noise, torch.tensor([0.0, 6.0, 6.0], dtype=torch.float64)) - audio
    ratio = 20 * torch.log10(audio.norm(dim=1) / added.norm(dim=1))
    torch.testing.assert_close(ratio[:2], torch.tensor([0.0, 6.0], dtype=torch.float64))
    assert float(added[2].abs().max()) == 0


def test_a_shift_by_whole_samples_rolls() -> None:
    audio = random.normal(key(3), (2, 501), torch.float64)
    shifted = sensitivity.shifting(audio)(torch.tensor([3.0, -2.0], dtype=torch.float64))
    torch.testing.assert_close(shifted, torch.stack([audio[0].roll(3), audio[1].roll(-2)]))


@pytest.mark.parametrize("position", ["pre_conv", "post_conv"])
def test_stability_falls_from_one_with_the_noise(position: str) -> None:
    wide = "encoder.subsampling_conv_channels=16"  # under post_conv, four random channels are nearly always one token
    params, state, cfg = small_model(f"mask_position={position}", "num_books=2", "num_classes=512", wide, seed=2)
    batch = small_batch()
    noise = random.normal(key(3), (3, 12000), torch.float64)
    found = sensitivity.token_stability(params, state, batch, noise, cfg, [200.0, 20.0, -20.0], chunk=2)
    assert float(found.kept[0]) == 1.0
    assert float(found.kept[0]) > float(found.kept[1]) > float(found.kept[2])
    tokens, lengths = sensitivity.target_tokens(params, state, batch["audio"], batch["audio_len"], cfg)
    mixed = sensitivity.at_snr(batch["audio"], noise, 20.0)
    new, _ = sensitivity.target_tokens(params, state, mixed, batch["audio_len"], cfg)
    row = int(lengths[1])
    assert float(found.by_row[1, 1]) == pytest.approx(float((tokens[1, :row] == new[1, :row]).double().mean()))
    shifts = sensitivity.shift_stability(params, state, batch, cfg, [0.0, 40.0])
    assert float(shifts.kept[0]) == 1.0
    assert float(shifts.kept[1]) < 1.0

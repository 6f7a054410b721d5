"""The three batch formats of the original PureTorchSSLModel interface, and the errors for anything else."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nest_fn.train.facade.batch_formats import as_batch

AUDIO = torch.linspace(-1, 1, 2 * 1600).reshape(2, 1600)
NOISY = AUDIO.flip(1)
LENGTHS = torch.tensor([1600, 800])
FOUR = {"audio": AUDIO, "audio_len": LENGTHS, "noisy_audio": NOISY, "noisy_audio_len": LENGTHS}
SIX = (AUDIO, LENGTHS, AUDIO * 0.1, LENGTHS, NOISY, LENGTHS)


@dataclass
class Noisy:
    """As in the original README, with the fields it calls optional left open."""

    audio: torch.Tensor
    audio_len: torch.Tensor
    noise: torch.Tensor | None
    noise_len: torch.Tensor | None
    noisy_audio: torch.Tensor | None
    noisy_audio_len: torch.Tensor | None


@dataclass
class Reference:
    """NeMo's AudioNoiseBatch: ``sample_id`` comes first."""

    sample_id: list[str] | None
    audio: torch.Tensor
    audio_len: torch.Tensor
    noise: torch.Tensor
    noise_len: torch.Tensor
    noisy_audio: torch.Tensor
    noisy_audio_len: torch.Tensor


Named = namedtuple("Named", ["noisy_audio", "noisy_audio_len", "audio", "audio_len"])  # any order: names decide


@pytest.mark.parametrize(
    "batch",
    [
        Noisy(*SIX),
        Noisy(AUDIO, LENGTHS, None, None, NOISY, LENGTHS),
        Reference(None, *SIX),
        Named(NOISY, LENGTHS, AUDIO, LENGTHS),
        SIX,
        list(SIX),
        (["a", "b"], *SIX),
        (None, *SIX),
        FOUR,
        {**FOUR, "noise": None, "noise_len": None, "ids": ["a", "b"], "epoch": 3},
    ],
    ids=lambda batch: f"{type(batch).__name__}{len(batch) if isinstance(batch, tuple | list | dict) else ''}",
)
def test_every_format_gives_the_same(batch: Any) -> None:
    made = as_batch(batch)
    assert list(made) == list(FOUR)
    assert all(made[name] is FOUR[name] for name in FOUR)  # no copy where nothing is to be moved


def test_names_and_weights_of_rows_pass() -> None:
    row, weight = torch.tensor([7, 9]), torch.tensor([1.0, 0.0])
    made = as_batch({**FOUR, "row": row, "weight": weight})
    assert made["row"] is row
    assert made["weight"] is weight


def test_tensors_are_moved() -> None:
    assert all(value.is_meta for value in as_batch(SIX, torch.device("meta")).values())


@pytest.mark.parametrize(
    "batch,message",
    [
        (SIX[:4], r"batch: a tuple of 4; want an object .* or a tuple \(audio, audio_len, noise"),
        (AUDIO, "batch: a Tensor; want an object with audio, audio_len, noisy_audio, noisy_audio_len"),
        (None, "batch: a NoneType"),
        ("audio", "batch: a str"),
        ({"audio": AUDIO}, "batch: audio_len, noisy_audio, noisy_audio_len missing"),
        (Noisy(*SIX[:4], None, None), "noisy_audio, noisy_audio_len missing. It has not been mixed .* give the clean"),
        ({**FOUR, "audio": AUDIO.numpy()}, "batch: audio is a ndarray; want a tensor"),
        ({**FOUR, "audio_len": [1600, 800]}, "batch: audio_len is a list; want a tensor"),
        ({**FOUR, "audio": AUDIO[0]}, r"batch: audio is torch.float32 \[1600\]; want float or int16 samples \[B, N\]"),
        ({**FOUR, "audio": AUDIO.to(torch.int32)}, "batch: audio is torch.int32"),
        ({**FOUR, "audio_len": LENGTHS / 1600}, r"batch: audio_len is torch.float32 \[2\]; want whole numbers \[2\]"),
        ({**FOUR, "noisy_audio_len": LENGTHS[:1]}, r"noisy_audio_len is torch.int64 \[1\]; want whole numbers \[2\]"),
        ({**FOUR, "weight": torch.ones(3)}, r"weight is torch.float32 \[3\]; want numbers \[2\], one a row"),
        ({**FOUR, "row": torch.ones(2)}, r"row is torch.float32 \[2\]; want whole numbers \[2\]"),
    ],
    ids=range(14),
)
def test_anything_else_is_refused(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_batch(batch)

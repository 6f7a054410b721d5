"""Reverberation: convolves speech with room impulse responses, aligned with the dry speech and of equal energy."""

from __future__ import annotations

import torch

from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.types import Tensor

from .mix_plan import randint_from, unit_uniform


def reverberate(audio: Tensor, length: Tensor, rirs: Tensor, words: Tensor, prob: float) -> Tensor:
    """Convolve each row, with probability ``prob``, with a random room impulse response (RIR).

    audio ``[B, N]``, rirs ``[R, L] -> [B, N]``. ``words`` int64 ``[B, 2]``, uniform in [0, 2^32), decide whether a row
    is convolved and with which RIR. The direct path (the RIR's largest sample) is moved to time 0, so that frames stay
    aligned with the targets; the energy within ``length`` equals that of the dry speech, and samples beyond it are 0.
    Raises ``ValueError`` unless ``rirs`` is ``[R, L]`` with at least one RIR.
    """
    if rirs.ndim != 2 or 0 in rirs.shape:
        raise ValueError(f"reverberate: rirs are {list(rirs.shape)}; want [rooms, samples], at least one of each.")
    response = rirs.to(audio.dtype)[randint_from(words[:, 1], 0, rirs.shape[0])]  # [B, L]
    size = _fft_size(audio.shape[1] + rirs.shape[1] - 1)
    direct = response.abs().argmax(-1, keepdim=True)
    place = (torch.arange(rirs.shape[1], device=audio.device) - direct) % size
    kernel = audio.new_zeros(audio.shape[0], size).scatter(-1, place, response)
    wet = torch.fft.irfft(torch.fft.rfft(audio, size) * torch.fft.rfft(kernel), size)[:, : audio.shape[1]]
    wet = torch.where(valid_mask(length, audio.shape[1]), wet, 0.0)
    loudness = torch.linalg.vector_norm(wet, dim=-1)
    scale = torch.linalg.vector_norm(audio, dim=-1) / torch.where(loudness > 0, loudness, 1.0)
    chosen = (unit_uniform(words[:, 0]) < prob) & (loudness > 0)
    return torch.where(chosen[:, None], wet * scale[:, None], audio)


def _fft_size(least: int) -> int:
    """The smallest size from ``least`` on without a prime factor above 5: FFTs of other sizes are slow."""
    best = 1 << (least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three << max(0, (-(-least // three) - 1).bit_length())
            best = min(best, two)
            three *= 3
        five *= 5
    return best

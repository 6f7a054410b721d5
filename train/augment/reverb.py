"""Reverberation: speech convolved with a room impulse response, aligned with the dry speech and as loud."""

from __future__ import annotations

import torch

from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.types import Tensor

from .mix_plan import randint_from, unit_uniform


def reverberate(audio: Tensor, length: Tensor, rirs: Tensor, words: Tensor, prob: float) -> Tensor:
    """Convolve a fraction ``prob`` of the rows with room responses: audio ``[B, N]``, rirs ``[R, L] -> [B, N]``.

    ``words`` int64 ``[B, 2]``, uniform in [0, 2^32), decide whether and which. The direct path (the response's largest
    sample) is moved to time 0, so that frames stay where the targets are; the energy within ``length`` is the dry
    speech's, and nothing sounds after it. Raises ``ValueError`` unless ``rirs`` is ``[R, L]`` and holds a response.
    """
    if rirs.ndim != 2 or 0 in rirs.shape:
        raise ValueError(f"reverberate: rirs are {list(rirs.shape)}; want [rooms, samples], at least one of each.")
    response = rirs.to(audio.dtype)[randint_from(words[:, 1], 0, rirs.shape[0])]  # [B, L]
    size = _fft_size(audio.shape[1] + rirs.shape[1] - 1)
    direct = response.abs().argmax(-1, keepdim=True)
    place = (torch.arange(rirs.shape[1], device=audio.device) - direct) % size
    kernel = audio.new_zeros(audio.shape[0], size).scatter(-1, place, response)
    heard = torch.fft.irfft(torch.fft.rfft(audio, size) * torch.fft.rfft(kernel), size)[:, : audio.shape[1]]
    heard = torch.where(valid_mask(length, audio.shape[1]), heard, 0.0)
    loudness = torch.linalg.vector_norm(heard, dim=-1)
    scale = torch.linalg.vector_norm(audio, dim=-1) / torch.where(loudness > 0, loudness, 1.0)
    chosen = (unit_uniform(words[:, 0]) < prob) & (loudness > 0)
    return torch.where(chosen[:, None], heard * scale[:, None], audio)


def _fft_size(least: int) -> int:
    """The smallest number from ``least`` on without a prime factor above 5: transforms of others are slow."""
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

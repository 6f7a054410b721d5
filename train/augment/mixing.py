"""Makes the model's input from a batch as it was read: mixes noise and speakers in, and reverberates, on the device.

A pure function of the batch and a key that never synchronises with a GPU and compiles into one graph. Each row draws
from ``fold_in(key, utterance)``; ``mix_plan.py`` defines the draws. Energies are sums over the row's whole length,
including the silence outside the parts, so the signal has exactly the ratio that was drawn. Where the row or the
mixture is silent, nothing is added.

Follows reference 7.5 with these exceptions: rows that are not mixed stay clean (Q32; ``keep_raw_noise`` adds their
noise), the noisy signal is always as long as the clean one (Q34), no split fails (Q33), and rows of weight 0 neither
receive nor contribute a signal. One part with a drawn mix rate corresponds to the reference's single-segment class,
except for its level, which that class computes from the whole source, used or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from nest_fn.config import Config
from nest_fn.config.training import AugmentConfig
from nest_fn.layers import random
from nest_fn.layers.types import Key, Tensor
from nest_fn.train.keys import split_step_key

from .mix_plan import MixPlan, Parts, plan_mix, relocate_sources, words_needed
from .reverb import reverberate

_SCALE = 2.0**-15  # one int16 step, with full scale at 1
_RIR_WORDS = 2


def augment(
    batch: Mapping[str, Tensor],
    cfg: AugmentConfig,
    key: Key | None,
    rirs: Tensor | None = None,
    *,
    pool: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Mix a batch: tensors of a ``RawBatch`` on one device -> the batch that ``nest_fn.model.loss`` takes.

    ``batch`` maps ``audio`` and ``noise`` int16 ``[B, N]`` (zeros beyond their lengths), ``audio_len``, ``noise_len``,
    ``row`` and ``utterance`` int64 ``[B]``, ``weight`` ``[B]``. The result maps ``audio`` and ``noisy_audio`` float32
    ``[B, N]``, their lengths, ``row`` and ``weight``. ``key`` int64 ``[2]`` is the mixing key of the step
    (``train/keys.py``); it may be None if nothing is drawn. ``rirs`` float ``[R, L]`` are room impulse responses at
    the batch's sample rate, for ``cfg.rir_prob``.

    ``pool`` (default: the batch) maps ``audio``, ``audio_len``, ``row``, ``weight`` of the rows from which interfering
    speakers are taken. If a batch is divided over ranks or micro-batches, pass the rows of the whole batch, in any
    order: the mixtures then do not depend on the division. If the pool's ``audio`` holds only the rows that are used,
    its ``place`` int64 ``[P]`` maps each of the ``P`` rows to its row there (``speaker_exchange.py``). Raises
    ``TypeError``, ``ValueError``.
    """
    _check(batch, cfg, key, rirs)
    pool = batch if pool is None else pool
    _check_pool(pool)
    audio = batch["audio"].to(torch.float32).mul_(_SCALE)  # in place on the new tensor: one pass less over memory
    noisy = audio
    if cfg.rir_prob > 0 or cfg.prob > 0 or cfg.keep_raw_noise:
        noisy = _mix(batch, pool, audio, cfg, key, rirs)
    return {
        "audio": audio,
        "audio_len": batch["audio_len"],
        "noisy_audio": noisy,
        "noisy_audio_len": batch["audio_len"],
        "row": batch["row"],
        "weight": batch["weight"],
    }


def _mix(
    batch: Mapping[str, Tensor],
    pool: Mapping[str, Tensor],
    audio: Tensor,
    cfg: AugmentConfig,
    key: Key | None,
    rirs: Tensor | None,
) -> Tensor:
    """The noisy signal ``[B, N]``."""
    if key is None:
        raise ValueError(
            "augment: mixing draws and needs key=; pass one, or set prob, rir_prob and keep_raw_noise off."
        )
    rir_words, words = draw_words(key, batch["utterance"], cfg)
    speech = audio
    if cfg.rir_prob > 0 and rirs is not None:
        speech = reverberate(audio, batch["audio_len"], rirs, rir_words, cfg.rir_prob)
    if cfg.prob == 0 and not cfg.keep_raw_noise:
        return speech
    plan = plan_mix(words, batch, pool, cfg)
    if "place" in pool:
        plan = relocate_sources(plan, pool["place"], speech.shape[0])
    return mix_parts(speech, batch["noise"], pool["audio"], plan)


def prepare_inputs(raw: Mapping[str, Any], cfg: Config, key: Key, rirs: Tensor | None) -> tuple[dict[str, Tensor], Key]:
    """Make the model's batch of a step from ``raw``; also return the model's key of that step."""
    mixing, model = split_step_key(key)
    batch = augment(raw, cfg.data.augment, mixing, rirs, pool=raw.get("pool"))
    batch["row"] = raw["utterance"]
    return batch, model


def draw_words(key: Key, utterance: Tensor, cfg: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Random words of a mixture: utterances int64 ``[B]`` -> words for reverberation and ``plan_mix``, ``[B, ...]``."""
    words = random.bits(random.fold_in(key, utterance), (utterance.shape[0], _RIR_WORDS + words_needed(cfg)))
    return words[:, :_RIR_WORDS], words[:, _RIR_WORDS:]


def mix_parts(speech: Tensor, noise: Tensor, others: Tensor, plan: MixPlan) -> Tensor:
    """Add the planned parts: speech float ``[B, N]``, noise int16 ``[B, N]``, others int16 ``[P, M] -> [B, N]``."""
    norm = torch.linalg.vector_norm(speech, dim=-1)
    if _needs_indices(noise):
        added = _place(noise, others, plan.parts).to(speech.dtype)
        return torch.addcmul(speech, added, _gain(norm, added, plan.mixed, plan.ratio)[:, None])
    # On a CPU, row by row: copying a part is far cheaper than an index for each sample, and stays in the cache.
    noisy = speech.clone()
    for row, listed in enumerate(torch.stack(plan.parts, dim=-1).tolist()):
        parts = [part for part in map(_Part._make, listed) if part.size > 0]
        if parts:
            low, high = min(part.begin for part in parts), max(part.begin + part.size for part in parts)
            added = _place_in_row(noise, others, parts, low, high).to(speech.dtype)
            noisy[row, low:high].addcmul_(added, _gain(norm[row], added, plan.mixed[row], plan.ratio[row]))
    return noisy


class _Part(NamedTuple):
    """One of ``Parts``, on the host."""

    begin: int
    size: int
    source: int
    first: int
    period: int


def _needs_indices(x: Tensor) -> bool:
    """Whether the host cannot read values of ``x``, or only by synchronising with the device."""
    # PyTorch 2.11 has no public test for active grad, vmap or jvp.
    return x.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _gain(speech_norm: Tensor, added: Tensor, mixed: Tensor, ratio: Tensor) -> Tensor:
    """Factor of ``added`` (int16 steps, ``[..., N]``) that puts speech ``ratio`` dB above it; finite (faults A12)."""
    norm = torch.linalg.vector_norm(added, dim=-1)
    exact = speech_norm * torch.pow(10.0, -ratio / 20) / torch.where(norm > 0, norm, 1.0)
    return torch.where(mixed, exact, _SCALE)


def _place(noise: Tensor, others: Tensor, parts: Parts) -> Tensor:
    """The parts at their positions and 0 elsewhere, by an index for each sample: ``[B, N], [P, M] -> [B, N]``."""
    rows, width = noise.shape
    flat = torch.cat((noise.flatten(), others.flatten()))
    start = torch.where(
        parts.source < rows, parts.source * width, rows * width + (parts.source - rows) * others.shape[1]
    )
    time = torch.arange(width, device=noise.device)
    index, inside = torch.zeros_like(time), torch.zeros_like(time, dtype=torch.bool)
    for k in range(parts.size.shape[1]):
        begin, size, _, first, period = (value[:, k, None] for value in parts)
        here = (time >= begin) & (time < begin + size)
        index = torch.where(here, start[:, k, None] + (time - begin + first) % period, index)
        inside = inside | here
    return torch.where(inside, flat[index], 0)


def _place_in_row(noise: Tensor, others: Tensor, parts: list[_Part], low: int, high: int) -> Tensor:
    """Samples ``[low, high)`` of one row of ``_place``, by one copy per part."""
    placed = noise.new_zeros(high - low)
    rows = noise.shape[0]
    for begin, size, source, first, period in parts:
        clip = (noise[source] if source < rows else others[source - rows])[:period]
        if first + size > period:
            clip, first = clip.roll(-first).repeat(-(-size // period)), 0
        placed[begin - low : begin - low + size] = clip[first : first + size]
    return placed


def _check(batch: Mapping[str, Tensor], cfg: AugmentConfig, key: Key | None, rirs: Tensor | None) -> None:
    """Raise unless the batch is a valid raw batch, and RIRs are given if ``cfg.rir_prob`` needs them."""
    names = ("audio", "audio_len", "noise", "noise_len", "row", "utterance", "weight")
    missing = [name for name in names if name not in batch]
    if missing:
        raise ValueError(
            f"augment: {', '.join(missing)} missing; the batch has {', '.join(sorted(batch)) or 'nothing'}."
        )
    audio, noise = batch["audio"], batch["noise"]
    if audio.dtype != torch.int16 or noise.dtype != torch.int16:
        raise TypeError(f"augment: audio is {audio.dtype}, noise {noise.dtype}; pass samples as read, in int16.")
    if audio.ndim != 2 or audio.shape != noise.shape:
        raise ValueError(f"augment: audio is {list(audio.shape)}, noise {list(noise.shape)}; want both [B, N].")
    if key is not None:
        random.check_key(key, "augment: key")
    if cfg.rir_prob > 0 and rirs is None:
        raise ValueError(f"augment: rir_prob {cfg.rir_prob} needs rirs [R, L]; name some in data.rir, or set it to 0.")


def _check_pool(pool: Mapping[str, Tensor]) -> None:
    """Raise unless interfering speakers can be taken from the pool."""
    missing = [name for name in ("audio", "audio_len", "row", "weight") if name not in pool]
    if missing or pool["audio"].dtype != torch.int16 or pool["audio"].ndim != 2:
        got = f"{', '.join(missing)} missing" if missing else f"audio {pool['audio'].dtype} {list(pool['audio'].shape)}"
        raise ValueError(f"augment: pool wants audio int16 [P, M], audio_len, row and weight; got {got}.")

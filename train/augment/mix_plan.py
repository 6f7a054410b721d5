"""The mixture of each utterance (sources, positions, levels): all draws of reference 7.5, as small tensors ``[B, S]``.

The draws of a row are random words of one key derived from its utterance, so they do not depend on worker, rank, order
or batch. Only the utterance to which a drawn speaker index refers depends on the other rows: the index counts the
usable rows of the pool in the order of ``row``. With a pool that holds the whole batch of all ranks and micro-batches,
the mixtures are therefore the same however the batch is divided and in whatever order its rows come.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from nest_fn.config.training import AugmentConfig
from nest_fn.layers.types import Tensor

_FAR = torch.iinfo(torch.int64).max
_ROW_WORDS, _PART_WORDS = 6, 4  # words drawn for a row, and for each of its parts; a word for each speaker follows


class Parts(NamedTuple):
    """Up to ``S`` segments of other signals in each row, int64 ``[B, S]``; they do not overlap."""

    begin: Tensor  # samples from the start of the row
    size: Tensor  # samples; 0: no such part
    source: Tensor  # b < B: the noise of row b; else row b - B of the pool
    first: Tensor  # index of the source sample with which the part begins
    period: Tensor  # samples after which the source repeats; at least 1


class MixPlan(NamedTuple):
    """The parts and their level."""

    parts: Parts
    mixed: Tensor  # bool [B]; False: the parts, if any, keep their own level
    ratio: Tensor  # float32 [B] dB, energy of the row relative to that of all its parts


def words_needed(cfg: AugmentConfig) -> int:
    """The number of random words that ``plan_mix`` needs for each row."""
    return _ROW_WORDS + _PART_WORDS * cfg.max_num_segments + max_speakers(cfg)


def max_speakers(cfg: AugmentConfig) -> int:
    """The most interfering speakers in one row: a row with fewer parts than speakers uses only the first ones."""
    return min(cfg.max_num_speakers, cfg.max_num_segments)


def plan_mix(words: Tensor, batch: Mapping[str, Tensor], pool: Mapping[str, Tensor], cfg: AugmentConfig) -> MixPlan:
    """Draw the mixture of each row: words int64 ``[B, words_needed(cfg)]``, each uniform in [0, 2^32).

    Reads ``audio_len``, ``row``, ``weight`` of both batch and pool, and the batch's ``noise_len``.
    """
    length = batch["audio_len"]
    apply, kind, rate, level, segments, speakers = words[:, :_ROW_WORDS].unbind(-1)
    begins, firsts, again, sizes = words[:, _ROW_WORDS : -max_speakers(cfg)].unflatten(-1, (_PART_WORDS, -1)).unbind(1)
    interfering, others = draw_interfering_speakers(words[:, -max_speakers(cfg) :], batch["row"], pool)

    mixed = (unit_uniform(apply) < cfg.prob) & (batch["weight"] > 0) & (length > 0)
    is_noise = (unit_uniform(kind) < cfg.noise_ratio) | (others == 0)
    mix_rate = uniform_between(rate, cfg.min_mix_rate, cfg.max_mix_rate)
    covered = torch.floor(length * mix_rate).to(torch.int64).clamp(min=1)
    count = torch.minimum(randint_from(segments, cfg.min_num_segments, cfg.max_num_segments + 1), covered)  # Q33
    speaker_count = torch.minimum(randint_from(speakers, cfg.min_num_speakers, cfg.max_num_speakers + 1), others)
    size = _draw_sizes(sizes, covered, count)
    begin = _draw_begins(begins, length - covered, size)

    speech = _speech_parts(firsts, again, interfering, speaker_count, size, pool["audio_len"])
    noise = _noise_parts(batch["noise_len"], size)
    source, first, period = (torch.where(is_noise[:, None], a, b) for a, b in zip(noise, speech, strict=True))
    parts = Parts(begin, torch.where(mixed[:, None] & (period > 0), size, 0), source, first, period.clamp(min=1))
    if cfg.keep_raw_noise:
        parts = _with_raw_noise(parts, mixed, batch)
    in_noise = uniform_between(level, cfg.min_r_noise, cfg.max_r_noise)
    in_speech = uniform_between(level, cfg.min_r_speech, cfg.max_r_speech)
    return MixPlan(parts, mixed, torch.where(is_noise, in_noise, in_speech).to(torch.float32))


def relocate_sources(plan: MixPlan, place: Tensor, rows: int) -> MixPlan:
    """The plan for a pool of which only some rows are held: row ``p`` is at ``place[p]`` of these, int64 ``[P]``."""
    source = plan.parts.source
    found = rows + place[(source - rows).clamp(min=0)]
    return plan._replace(parts=plan.parts._replace(source=torch.where(source < rows, source, found)))


def unit_uniform(word: Tensor) -> Tensor:
    """A word as a float64 in [0, 1)."""
    return word.to(torch.float64) * 2.0**-32


def uniform_between(word: Tensor, low: float, high: float) -> Tensor:
    """Uniform in ``[low, high)``, float64; ``low`` where they are equal."""
    return low + unit_uniform(word) * (high - low)


def randint_from(word: Tensor, low: int, high: int | Tensor) -> Tensor:
    """Uniform integers in ``[low, high)``."""
    return low + ((word * (high - low)) >> 32)


def draw_interfering_speakers(words: Tensor, row: Tensor, pool: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Distinct other rows of the pool, ``[B, K]``, and the number ``n`` of usable other rows, ``[B]``.

    Only the first ``n`` of the ``K`` columns are valid.
    """
    usable = (pool["weight"] > 0) & (pool["audio_len"] > 0)
    # Binary search instead of pairwise comparison: it needs no tensor [B, P], and from 33 rows on Triton refuses the
    # kernel that inductor generates for reductions over one (triton issue 8257).
    names, order = torch.where(usable, pool["row"], _FAR).sort(stable=True)
    row = row.contiguous()
    own = torch.searchsorted(names, row)
    present = torch.searchsorted(names, row, right=True) > own
    others = usable.sum() - present.to(torch.int64)
    # Positions in the order that are taken, ascending: the row itself and the speakers drawn so far.
    taken = torch.where(present, own, _FAR)[:, None]
    drawn = []
    for k in range(words.shape[1]):
        place = randint_from(words[:, k], 0, (others - k).clamp(min=1))
        for t in range(k + 1):
            place = place + (place >= taken[:, t]).to(torch.int64)
        drawn.append(order[place.clamp(max=order.shape[0] - 1)])
        taken = torch.cat((taken, place[:, None]), dim=-1).sort(-1).values
    return torch.stack(drawn, dim=-1), others


def _draw_sizes(words: Tensor, covered: Tensor, count: Tensor) -> Tensor:
    """Sizes of ``count`` parts with ``covered`` samples in all, each sample equally likely in any part: ``[B, S]``.

    The multinomial counts are drawn one after the other from normal approximations of binomials (parts are thousands
    of samples); no part is empty (Q33).
    """
    if words.shape[1] == 1:
        return covered[:, None]
    left, sizes = covered, []
    for k, word in enumerate(words.unbind(-1)):
        rest = (count - k).clamp(min=1)  # parts that remain to be drawn, this one included
        mean = left / rest.to(torch.float64)
        deviation = torch.sqrt(mean * (1 - 1 / rest))
        normal = math.sqrt(2) * torch.erfinv(2 * (unit_uniform(word) + 2.0**-33) - 1)
        drawn = torch.round(mean + deviation * normal).to(torch.int64)
        size = torch.where(k < count, torch.minimum(drawn.clamp(min=1), left - (rest - 1)), 0)
        left = left - size
        sizes.append(size)
    return torch.stack(sizes, dim=-1)


def _draw_begins(words: Tensor, slack: Tensor, size: Tensor) -> Tensor:
    """Start positions of the parts, in order and without overlap; ``slack`` samples stay uncovered: ``[B, S]``."""
    low, high, begins = torch.zeros_like(slack), slack, []
    for k in range(words.shape[1]):
        begin = low + randint_from(words[:, k], 0, (high - low).clamp(min=1))
        low, high = begin + size[:, k], high + size[:, k]
        begins.append(begin)
    return torch.stack(begins, dim=-1)


def _noise_parts(noise_len: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Source, first sample and period of parts of the row's own noise: consecutive segments, repeated if short."""
    rows = torch.arange(size.shape[0], device=size.device)[:, None].expand_as(size)
    return rows, size.cumsum(-1) - size, noise_len[:, None].expand_as(size)


def _speech_parts(
    firsts: Tensor, again: Tensor, interfering: Tensor, speakers: Tensor, size: Tensor, pool_len: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for interfering speakers: each drawn one once, then random ones; long ones are cropped, short repeat."""
    places = torch.arange(size.shape[1], device=size.device)
    anyone = randint_from(again, 0, speakers[:, None].clamp(min=1))
    turn = torch.where(places < speakers[:, None], places, anyone).clamp(max=interfering.shape[1] - 1)
    speaker = interfering.gather(-1, turn)
    period = pool_len[speaker]
    return size.shape[0] + speaker, randint_from(firsts, 0, (period - size).clamp(min=1)), period


def _with_raw_noise(parts: Parts, mixed: Tensor, batch: Mapping[str, Tensor]) -> Parts:
    """Rows that are not mixed get their whole noise, at its own level (Q32)."""
    raw_len = torch.where(batch["weight"] > 0, torch.minimum(batch["noise_len"], batch["audio_len"]), 0)
    rows = torch.arange(raw_len.shape[0], device=raw_len.device)
    zero = torch.zeros_like(raw_len)
    raw = Parts(zero, raw_len, rows, zero, batch["noise_len"].clamp(min=1))
    first = torch.arange(parts.size.shape[1], device=raw_len.device) == 0
    whole = (torch.where(first, value[:, None], 0) for value in raw[:4])
    fields = (*whole, raw.period[:, None].expand_as(parts.period))
    return Parts(*(torch.where(mixed[:, None], a, b) for a, b in zip(parts, fields, strict=True)))

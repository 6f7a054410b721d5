"""Interfering speakers from other ranks: every rank computes which rank needs which rows, and only these are sent.

Which row is mixed into which follows from the key and from a few numbers of each row (``mix_plan.py``). So each rank
gathers these numbers, draws the mixtures of the whole batch, and knows which rows to send to which rank. At the default
settings a quarter of a rank's rows have another row mixed in, on any number of ranks.
"""

from __future__ import annotations

from itertools import chain

import torch

from nest_fn.config.training import AugmentConfig
from nest_fn.layers.types import Key, Tensor
from nest_fn.train.data.dataset import RawBatch
from nest_fn.train.distributed.collectives import Ranks
from nest_fn.train.keys import split_step_key

from .mix_plan import max_speakers, plan_mix
from .mixing import draw_words

_NUMBERS = ("audio_len", "row", "utterance", "noise_len", "weight")


def gather_speaker_pool(
    raw: RawBatch, audio: Tensor, cfg: AugmentConfig, key: Key, ranks: Ranks
) -> dict[str, Tensor] | None:
    """The ``pool`` of ``augment`` for this rank's rows of a batch; None if the rank needs no rows of other ranks.

    ``raw`` is on the CPU, ``audio`` int16 ``[B, N]`` is its audio on the device, ``key`` is the step's key. The pool's
    ``audio`` always has as many rows as ``B`` rows can use at most, so that shapes stay static; ``place`` int64
    ``[W B]`` maps each row of the whole batch to its row there.
    """
    if ranks.is_single or cfg.prob == 0 or cfg.noise_ratio == 1:
        return None
    rows = audio.shape[0]
    whole = _gather_numbers(raw, ranks)
    _, words = draw_words(split_step_key(key.cpu()).mixing, whole["utterance"], cfg)
    parts = plan_mix(words, whole, whole, cfg).parts
    sources = torch.where(parts.size > 0, parts.source - ranks.world * rows, -1).unflatten(0, (ranks.world, rows))
    needed = [sorted(set(of_rank.flatten().tolist()) - {-1}) for of_rank in sources.clamp(min=-1)]
    own, begin = needed[ranks.rank], ranks.rank * rows
    sent = [[place - begin for place in places if place // rows == ranks.rank] for places in needed]
    counts = [sum(place // rows == rank for place in own) for rank in range(ranks.world)]
    received = ranks.all_to_all(audio[list(chain(*sent))], list(map(len, sent)), counts)
    held = audio.new_zeros(rows * max_speakers(cfg), audio.shape[1])
    held[: len(own)] = received
    place = torch.zeros(ranks.world * rows, dtype=torch.int64)
    place[own] = torch.arange(len(own))
    numbers = {name: whole[name].to(audio.device) for name in ("audio_len", "row", "weight")}
    return {"audio": held, "place": place.to(audio.device), **numbers}


def _gather_numbers(raw: RawBatch, ranks: Ranks) -> dict[str, Tensor]:
    """The numbers on which mixtures depend, of the rows of all ranks in rank order: int64 ``[W B]`` each."""
    own = torch.stack([raw[name].to(torch.int64) for name in _NUMBERS])  # type: ignore[literal-required]
    return dict(zip(_NUMBERS, ranks.all_gather(own).transpose(0, 1).flatten(1), strict=True))

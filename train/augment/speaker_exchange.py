"""Speakers mixed in from the rows of other ranks: numbers say who is wanted where, and only those rows travel.

Which row is mixed into which follows from the key and from a few numbers of each row (``mix_plan.py``). So each rank
gathers these, draws the mixtures of the whole batch, and knows what to send to whom. A quarter of a rank's rows want
another one at the default settings, however many ranks there are.
"""

from __future__ import annotations

from itertools import chain

import torch

from nest_fn.config.training import AugmentConfig
from nest_fn.layers.types import Key, Tensor
from nest_fn.train.data.dataset import RawBatch
from nest_fn.train.distributed.collectives import Ranks
from nest_fn.train.keys import split_step_key

from .mix_plan import plan_mix, speakers_heard
from .mixing import draw_words

_NUMBERS = ("audio_len", "row", "utterance", "noise_len", "weight")


def gather_speaker_pool(
    raw: RawBatch, audio: Tensor, cfg: AugmentConfig, key: Key, ranks: Ranks
) -> dict[str, Tensor] | None:
    """The ``pool`` of ``augment`` for this rank's rows of a batch, None where its own rows are all there is to know.

    ``raw`` is on the CPU, ``audio`` int16 ``[B, N]`` is its audio on the device, ``key`` that of the step. The pool's
    ``audio`` always has room for as many rows as ``B`` rows can want, so that shapes stay static; ``place`` int64
    ``[W B]`` says where in it a row of the whole batch stands.
    """
    if ranks.is_single or cfg.prob == 0 or cfg.noise_ratio == 1:
        return None
    rows = audio.shape[0]
    whole = _gather_numbers(raw, ranks)
    _, words = draw_words(split_step_key(key.cpu()).mixing, whole["utterance"], cfg)
    parts = plan_mix(words, whole, whole, cfg).parts
    heard = torch.where(parts.size > 0, parts.source - ranks.world * rows, -1).unflatten(0, (ranks.world, rows))
    wanted = [sorted(set(of_rank.flatten().tolist()) - {-1}) for of_rank in heard.clamp(min=-1)]
    mine, begin = wanted[ranks.rank], ranks.rank * rows
    sent = [[place - begin for place in places if place // rows == ranks.rank] for places in wanted]
    came = [sum(place // rows == rank for place in mine) for rank in range(ranks.world)]
    received = ranks.all_to_all(audio[list(chain(*sent))], list(map(len, sent)), came)
    held = audio.new_zeros(rows * speakers_heard(cfg), audio.shape[1])
    held[: len(mine)] = received
    place = torch.zeros(ranks.world * rows, dtype=torch.int64)
    place[mine] = torch.arange(len(mine))
    numbers = {name: whole[name].to(audio.device) for name in ("audio_len", "row", "weight")}
    return {"audio": held, "place": place.to(audio.device), **numbers}


def _gather_numbers(raw: RawBatch, ranks: Ranks) -> dict[str, Tensor]:
    """What mixtures depend on, of the rows of all ranks in their order: int64 ``[W B]`` each."""
    own = torch.stack([raw[name].to(torch.int64) for name in _NUMBERS])  # type: ignore[literal-required]
    return dict(zip(_NUMBERS, ranks.all_gather(own).transpose(0, 1).flatten(1), strict=True))

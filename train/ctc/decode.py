"""Texts from log-probabilities: greedy, or by beam search, with the times of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from nest_fn.extras import load_extra
from nest_fn.layers.types import Tensor
from nest_fn.train.errors import UsageError

from .tokens import BLANK, Tokenizer


class Hypothesis(NamedTuple):
    """What was recognised in one utterance."""

    numbers: list[int]  # tokens
    frames: list[tuple[int, int]]  # first frame of each token, and the one after its last
    score: float  # log-probability in nats, of the best path or as the beam search scores


Decoder = Callable[[Tensor, Sequence[int]], list[Hypothesis]]
"""``decode(log_probs [B, T, C], lengths)``: a hypothesis for each row."""


def greedy(log_probs: Tensor, lengths: Sequence[int]) -> list[Hypothesis]:
    """The best token of each frame; repeats merged, blanks dropped."""
    scores, best = log_probs.max(dim=-1)
    scores, best = scores.cpu(), best.cpu()
    return [_merged(best[row, :most].tolist(), float(scores[row, :most].sum())) for row, most in enumerate(lengths)]


def _merged(path: Sequence[int], score: float) -> Hypothesis:
    numbers: list[int] = []
    frames: list[tuple[int, int]] = []
    for frame, number in enumerate(path):
        if number == BLANK:
            continue
        if frame and path[frame - 1] == number:
            frames[-1] = (frames[-1][0], frame + 1)
        else:
            numbers.append(number)
            frames.append((frame, frame + 1))
    return Hypothesis(numbers, frames, score)


def beam_search(tokenizer: Tokenizer, width: int) -> Decoder:
    """torchaudio's lexicon-free beam search: a hypothesis sums over the paths that spell it. ``width`` hypotheses.

    A token's frame is the one in which it begins. Raises ``UsageError`` if the package flashlight-text is missing.
    """
    try:
        load_extra("flashlight.lib.text.decoder")
        from torchaudio.models.decoder import ctc_decoder
    except (ImportError, RuntimeError) as error:
        raise UsageError(f"beam search: {error}, or leave --beam out for greedy decoding") from error
    names = [str(number) for number in range(tokenizer.size + 1)]  # tokens of a vocabulary may look alike
    search: Any = ctc_decoder(
        lexicon=None, tokens=names, lm=None, beam_size=width, beam_size_token=min(width, len(names)),
        blank_token=names[BLANK], sil_token=names[BLANK], log_add=True,
    )  # fmt: skip

    def decode(log_probs: Tensor, lengths: Sequence[int]) -> list[Hypothesis]:
        found = search(log_probs.float().cpu().contiguous(), torch.tensor(list(lengths), dtype=torch.int64))
        return [_from_beam(best[0], most) for best, most in zip(found, lengths, strict=True)]

    return decode


def _from_beam(found: Any, length: int) -> Hypothesis:
    """torchaudio counts frames from 1, for the search begins with a state before the first."""
    pairs = zip(found.tokens.tolist(), found.timesteps.tolist(), strict=True)
    kept = [(number, min(max(frame - 1, 0), length - 1)) for number, frame in pairs if number != BLANK]
    return Hypothesis([number for number, _ in kept], [(frame, frame + 1) for _, frame in kept], float(found.score))

"""Sub-word tokens made of the transcripts: a SentencePiece unigram model, of a size at which the texts fit their audio.

Fewer and longer tokens need fewer frames: read speech has 15 characters a second, the encoder 12.5 frames.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import pairwise

from nest_fn.train.errors import DataError

from .tokens import SentencePiece, first_line, optional

SIZES = tuple(step * 2**power for power in range(3, 11) for step in (4, 5, 6, 7))
"""Sizes that are tried, in pieces: 32, 40, 48, 56, 64, 80, ... 7168."""

FITTING = 0.99
"""The fraction of lines that must fit."""

_MOST_LINES = 100_000  # that a model is made of; from a larger corpus, every n-th line is taken


def frames_needed(targets: Sequence[int]) -> int:
    """The fewest frames in which CTC can emit the tokens: one each, and a blank between two equal ones."""
    return len(targets) + sum(first == second for first, second in pairwise(targets))


def train_pieces(texts: Sequence[str], size: int) -> SentencePiece:
    """A unigram model of at most ``size`` pieces. The same texts give the same model.

    Texts are taken as they are, but for spaces. Raises ``DataError`` where SentencePiece cannot make one,
    ``UsageError`` if it is not installed.
    """
    package = optional("sentencepiece")
    made = io.BytesIO()
    try:
        package.SentencePieceTrainer.train(
            sentence_iterator=iter(texts[:: -(-len(texts) // _MOST_LINES)]), model_writer=made, vocab_size=size,
            model_type="unigram", character_coverage=1.0, hard_vocab_limit=False, normalization_rule_name="identity",
            unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1, num_threads=1, max_sentence_length=1 << 20, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise DataError(
            f"tokens: SentencePiece makes no model of {size} pieces from {len(texts)} texts: {first_line(error)}; "
            "choose another size with --pieces, or --tokens characters"
        ) from error
    return SentencePiece(made.getvalue())


def train_fitting_pieces(texts: Sequence[str], frames: Sequence[int]) -> SentencePiece:
    """The smallest model of ``SIZES`` by which ``FITTING`` of the texts fit their numbers of encoder frames.

    The largest one if none does. Raises as ``train_pieces``.
    """
    least = len(set("".join(texts)) - {" "}) + 2  # each character, the space, and the unknown piece
    made = None
    for size in (size for size in SIZES if size >= least or size == SIZES[-1]):
        larger = train_pieces(texts, max(size, least))
        if made is not None and larger.size == made.size:  # the texts have no more pieces
            break
        made = larger
        if share_fitting(made, texts, frames) >= FITTING:
            break
    assert made is not None
    return made


def share_fitting(tokenizer: SentencePiece, texts: Sequence[str], frames: Sequence[int]) -> float:
    """The fraction of the texts that CTC can align with their numbers of encoder frames."""
    fits = [frames_needed(tokenizer.encode(text)) <= most for text, most in zip(texts, frames, strict=True)]
    return sum(fits) / max(len(fits), 1)

"""Error rates of recognised texts: edit distances over all characters or words of a set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple
from unicodedata import normalize

from nest_fn.audio.functions import edit_distance


class Errors(NamedTuple):
    """Counts over a set of utterances."""

    wrong_characters: int = 0
    characters: int = 0
    wrong_words: int = 0
    words: int = 0

    @property
    def cer(self) -> float:
        """Character error rate; it may exceed 1."""
        return self.wrong_characters / max(self.characters, 1)

    @property
    def wer(self) -> float:
        """Word error rate; it may exceed 1."""
        return self.wrong_words / max(self.words, 1)


def count_errors(pairs: Iterable[tuple[str, str]]) -> Errors:
    """Errors of pairs (recognised, spoken); runs of spaces count as one, and so do a letter's spellings in Unicode."""
    total = Errors()
    for recognised, spoken in pairs:
        mine, right = (normalize("NFC", text).split() for text in (recognised, spoken))
        one = Errors(
            edit_distance(" ".join(mine), " ".join(right)), len(" ".join(right)),
            edit_distance(mine, right), len(right),
        )  # fmt: skip
        total = Errors(*(first + second for first, second in zip(total, one, strict=True)))
    return total

"""A small language: words with phones, Zipf-distributed word frequencies, and a first-order word grammar.

A word is followed only by words of certain classes, with preferences among these, so that the words on both sides of a
gap are informative about the missing one: masked prediction can learn this dependence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from .keys import generator

_LANGUAGE_SEED = 20240801  # seed of the word preferences: all corpora share one language, whatever their own seed
_PREFERENCE = 1.6  # standard deviation of the log preferences; larger makes the language more predictable

_WORDS: dict[str, str] = {
    "determiner": "a:ah my:m-ay his:h-ih-z her:h-er our:aa-r no:n-ow",
    "number": "one:w-ah-n two:t-uw four:f-ao-r five:f-ay-v six:s-ih-k-s seven:s-eh-v-ah-n nine:n-ay-n zero:z-ih-r-ow",
    "adjective": "red:r-eh-d small:s-m-ao-l old:ow-l-d happy:h-ae-p-iy yellow:y-eh-l-ow silver:s-ih-l-v-er "
    "cold:k-ow-l-d",
    "noun": "cat:k-ae-t dog:d-ao-g boat:b-ow-t ship:sh-ih-p river:r-ih-v-er fish:f-ih-sh night:n-ay-t bird:b-er-d "
    "tree:t-r-iy moon:m-uw-n window:w-ih-n-d-ow doctor:d-aa-k-t-er letter:l-eh-t-er pilot:p-ay-l-ah-t lion:l-ay-ah-n "
    "goose:g-uw-s",
    "verb": "saw:s-ao met:m-eh-t likes:l-ay-k-s followed:f-aa-l-ow-d heard:h-er-d lost:l-ao-s-t needs:n-iy-d-z "
    "sold:s-ow-l-d gave:g-eh-v keeps:k-iy-p-s",
    "preposition": "near:n-ih-r in:ih-n by:b-ay over:ow-v-er under:ah-n-d-er for:f-ao-r",
    "conjunction": "and:ae-n-d but:b-ah-t so:s-ow",
    "adverb": "slowly:s-l-ow-l-iy quickly:k-w-ih-k-l-iy suddenly:s-ah-d-ah-n-l-iy yearly:y-ih-r-l-iy",
}

START = "<s>"
STOP = "</s>"

_FOLLOWERS: dict[str, dict[str, float]] = {
    START: {"determiner": 0.8, "number": 0.2},
    "determiner": {"noun": 0.6, "adjective": 0.4},
    "number": {"noun": 0.6, "adjective": 0.4},
    "adjective": {"noun": 1.0},
    "noun": {"verb": 0.4, "preposition": 0.15, "adverb": 0.1, STOP: 0.35},
    "verb": {"determiner": 0.7, "number": 0.15, "preposition": 0.15},
    "preposition": {"determiner": 0.8, "number": 0.2},
    "adverb": {"verb": 0.6, STOP: 0.4},
    "conjunction": {"determiner": 0.7, "number": 0.3},
}
LONGEST = 10  # most words of a sentence
_SENTENCES_JOINED = 0.35  # probability that a sentence begins with a conjunction, if it may


@dataclass(frozen=True)
class Lexicon:
    """Words, their phones, and the grammar: ``follow[i, j]`` is P(word j | word i); START and STOP are the last two."""

    words: tuple[str, ...]
    phones: tuple[tuple[str, ...], ...]
    follow: np.ndarray  # [W + 2, W + 2] float64, rows sum to one (that of STOP is all zero)

    @property
    def conditional_entropy(self) -> float:
        """Entropy of the next word given the current one, in bits, under the stationary distribution."""
        chain = self.follow.copy()
        chain[-1] = chain[-2]  # a sentence is followed by another one
        weights = np.linalg.matrix_power(chain, 512)[0]
        surprise = -np.log2(chain, where=chain > 0, out=np.zeros_like(chain))
        return float(weights @ (chain * surprise).sum(1))


@cache
def lexicon() -> Lexicon:
    """The language of every synthetic corpus."""
    entries = [(kind, *entry.split(":")) for kind, text in _WORDS.items() for entry in text.split()]
    words = [word for _, word, _ in entries] + [START, STOP]
    kinds = [kind for kind, _, _ in entries] + [START, STOP]
    frequency = np.ones(len(words))
    for kind in _WORDS:  # Zipf within each class, in the order of the list
        members = [i for i, k in enumerate(kinds) if k == kind]
        frequency[members] = 1.0 / np.arange(1, len(members) + 1)
    rng = generator(_LANGUAGE_SEED, "grammar")
    preference = frequency * np.exp(_PREFERENCE * rng.standard_normal((len(words), len(words))))
    follow = np.zeros_like(preference)
    for i, kind in enumerate(kinds):
        for target, probability in _FOLLOWERS.get(kind, {}).items():
            members = [j for j, k in enumerate(kinds) if k == target]
            follow[i, members] = probability * preference[i, members] / preference[i, members].sum()
    return Lexicon(tuple(words[:-2]), tuple(tuple(phones.split("-")) for _, _, phones in entries), follow)


def sentence(rng: np.random.Generator, join: bool = False) -> list[int]:
    """Draw the word numbers of one sentence from the grammar; with ``join`` it may begin with a conjunction.

    A sentence of more than ``LONGEST`` words is discarded and drawn again.
    """
    book = lexicon()
    begin = len(book.words)  # START
    if join and rng.random() < _SENTENCES_JOINED:
        begin = book.words.index("and") + int(rng.choice(3, p=(0.6, 0.25, 0.15)))
    while True:
        words = [begin] if begin < len(book.words) else []
        current = begin
        while current < len(book.words) or not words:
            current = int(np.searchsorted(np.cumsum(book.follow[current]), rng.random(), side="right"))
            words.append(current)
        if len(words) <= LONGEST + 1:
            return words[:-1]

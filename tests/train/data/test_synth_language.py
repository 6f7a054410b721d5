"""The synthesiser's language and its noises: a grammar that is followed and can be predicted, colours as named."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from nest_fn.train.data.synth import NOISE_KINDS, PHONES, SAMPLE_RATE, SILENCE, lexicon, noise
from nest_fn.train.data.synth.keys import generator
from nest_fn.train.data.synth.lexicon import LONGEST, sentence


def test_language_follows_its_grammar_and_is_predictable() -> None:
    book = lexicon()
    assert set().union(*book.phones) <= set(PHONES)
    assert set(PHONES) - set().union(*book.phones) == {SILENCE}, "every phone occurs in some word"
    np.testing.assert_allclose(book.follow[:-1].sum(1), 1.0)
    rng = generator(0, "sentences")
    sentences = [sentence(rng, join=True) for _ in range(3000)]
    assert max(map(len, sentences)) <= LONGEST
    assert min(map(len, sentences)) >= 2
    assert all(book.follow[a, b] > 0 for words in sentences for a, b in pairwise(words))
    counts = np.bincount(np.concatenate(sentences), minlength=len(book.words))
    share = np.sort(counts)[::-1] / counts.sum()
    unigram = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert share[:6].sum() > 0.25  # few frequent, many rare
    assert np.count_nonzero(counts) == len(book.words)
    assert book.conditional_entropy < unigram - 1.0  # bits: the word before tells much


@pytest.mark.parametrize("kind", NOISE_KINDS)
def test_noises_have_unit_power_and_their_own_colour(kind: str) -> None:
    wave_ = noise(generator(0, kind), kind, 3 * SAMPLE_RATE).astype(np.float64)
    assert wave_.shape == (3 * SAMPLE_RATE,)
    assert np.mean(wave_**2) == pytest.approx(1.0, abs=0.01)
    power = np.abs(np.fft.rfft(wave_)) ** 2
    high = power[np.fft.rfftfreq(len(wave_), 1 / SAMPLE_RATE) > 2000].sum() / power.sum()
    crest = np.abs(wave_).max()
    assert {
        "white": 0.7 < high < 0.8,
        "pink": high < 0.4,
        "babble": high < 0.4 and crest > 3.5,
        "hum": high < 0.05,
        "impulse": crest > 8.0,
        "machine": high < 0.65,
    }[kind]


def test_an_unknown_noise_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown kind 'rain'; choose one of white"):
        noise(generator(0, "x"), "rain", 100)

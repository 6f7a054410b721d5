"""The data side's random words: frozen, uniform, independent."""

from __future__ import annotations

import numpy as np
import pytest

from nest_fn.train.hash_rng import copy_hash, randint_below, random_words, stream_key, uniform, utterance_hashes


def test_golden_words() -> None:
    """SplitMix64 from state 0 (its published first outputs), and this page's own format, never to change."""
    zero = random_words(np.uint64(0), np.array([0]), 3)[0]  # mix(0) is 0, so these are SplitMix64's own
    assert [hex(word) for word in zero.tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]
    assert (int(stream_key(0, "shuffle", 0)), int(utterance_hashes(["a.wav@0.000+1.000"])[0])) == FROZEN


FROZEN = (12209825487362672802, 7314788863215852776)


def test_words_of_one_utterance_do_not_depend_on_the_others() -> None:
    key, many = stream_key(1, "noise_choice", 2), np.arange(1000, dtype=np.int64) * 977
    whole = random_words(key, many, 5)
    assert np.array_equal(random_words(key, many[[7, 3]], 5), whole[[7, 3]])
    assert np.array_equal(random_words(key, many, 2), whole[:, :2])
    assert len(np.unique(whole)) == whole.size


@pytest.mark.parametrize("other", [(2, "noise_choice", 2), (1, "shuffle", 2), (1, "noise_choice", 3)])
def test_keys_differ_in_each_part(other: tuple[int, str, int]) -> None:
    many = np.arange(4000, dtype=np.int64)
    a, b = (uniform(random_words(stream_key(*parts), many, 1)[:, 0]) for parts in ((1, "noise_choice", 2), other))
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(4000)


def test_uniform_and_below() -> None:
    word = random_words(stream_key(0, "test", 0), np.arange(20_000), 1)[:, 0]
    value = np.sort(uniform(word))
    assert np.abs(value - np.arange(20_000) / 20_000).max() < 1.95 / np.sqrt(20_000)  # Kolmogorov-Smirnov, 0.1 %
    counts = np.bincount(randint_below(word, 7), minlength=7)
    assert len(counts) == 7 and ((counts - 20_000 / 7) ** 2 / (20_000 / 7)).sum() < 25
    assert (randint_below(word[:5], np.array([1, 1, 1, 1, 1])) == 0).all()
    assert randint_below(np.array([2**64 - 1], np.uint64), 2**31 - 1)[0] == 2**31 - 2


def test_copies() -> None:
    hashes = utterance_hashes(map(str, range(500)))
    assert (hashes >= 0).all() and len(np.unique(hashes)) == 500
    assert np.array_equal(copy_hash(hashes, np.zeros(500, np.int64)), hashes)
    copies = np.concatenate([copy_hash(hashes, np.full(500, copy)) for copy in range(4)])
    assert (copies >= 0).all() and len(np.unique(copies)) == 2000

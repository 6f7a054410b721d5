"""Random words for data loading: pure functions of (seed, stream, epoch, utterance), 64 bits each.

``stream_key`` hashes the first three with BLAKE2b to 64 bits. Word ``j`` of utterance ``u`` is ``mix(mix(u ^ key) +
(j + 1) * GAMMA)``, where ``mix`` is the finaliser of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
number generators", OOPSLA 2014) and GAMMA its increment. So the draws for an utterance do not depend on worker, rank,
order or earlier draws. The streams in use are ``shuffle``, ``batches``, ``weight``, ``noise_choice``.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK_63 = (1 << 63) - 1


def stream_key(seed: int, stream: str, epoch: int) -> np.uint64:
    """The 64-bit key of one stream in one epoch."""
    digest = blake2b(f"{seed}/{stream}/{epoch}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def random_words(key: np.uint64, utterances: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """Random words: utterance hashes ``[n] -> [n, count]``."""
    with np.errstate(over="ignore"):
        root = _mix(np.asarray(utterances).astype(np.uint64) ^ key)
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GAMMA
        return _mix(root[:, None] + steps)


def randint_below(word: NDArray[np.uint64], bound: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Integers in ``[0, bound)`` for ``0 < bound < 2^31``, from the high 32 bits; the bias is below bound / 2^32."""
    high = (word >> np.uint64(32)).astype(np.int64)
    return (high * bound) >> 32


def uniform(word: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Uniform in [0, 1), multiples of 2^-53."""
    return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53


def utterance_hashes(identities: Iterable[str]) -> NDArray[np.int64]:
    """63 bits of BLAKE2b over each utterance's id, or another text: int64 ``[n]``. Those of ids key the draws."""
    digests = [blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in identities]
    return np.frombuffer(b"".join(digests), "<i8") & _MASK_63


def copy_hash(utterances: NDArray[np.int64], copies: NDArray[np.int64]) -> NDArray[np.int64]:
    """The hash of the second, third, ... copy of an utterance in one epoch; copy 0 keeps the utterance's own."""
    with np.errstate(over="ignore"):
        mixed = _mix(utterances.astype(np.uint64) + copies.astype(np.uint64) * _GAMMA) & np.uint64(_MASK_63)
    return np.where(copies == 0, utterances, mixed.astype(np.int64))


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: a bijection on 64 bits."""
    word = (word ^ (word >> np.uint64(30))) * _MIX_1
    word = (word ^ (word >> np.uint64(27))) * _MIX_2
    return word ^ (word >> np.uint64(31))

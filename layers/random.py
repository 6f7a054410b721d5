"""The only source of bits, from keys that are values: Philox4x32-10 in int64 arithmetic, and a mixer for long draws.

A key is int64 ``[..., 2]`` holding ``(seed, offset)``, both 64-bit patterns. Counter block ``i`` of a key is
``philox(counter=(lo, hi of offset + i, 0, 0), key=(lo, hi of seed))``, four 32-bit words. From these words:

* ``fold_in(key, i)``: block ``i`` read as a new key, seed ``w0 | w1 << 32``, offset ``w2 | w3 << 32``;
* ``split(key, n)[i] = fold_in(key, i)``;
* ``uniform``: element ``4 c + j`` is the low 24 bits of word ``j`` of block ``c``, times 2^-24;
* ``dropout_mask``: element ``4 i + j`` is lane ``j`` (16 bits, low lanes first) of ``mix(i)``, a 64-bit word
  (``layers/mixer.py``), at a tenth of Philox's cost;
* ``normal``: elements ``2 i`` and ``2 i + 1`` are ``radius cos, radius sin``; the radius is from the upper half of
  ``mix(i)``, the angle from the lower.

So the same key must not be used twice: ``split`` reads the words that ``uniform`` would draw from. The bits are equal
eager, compiled, under ``vmap``, on CPU and GPU; golden vectors in ``tests/layers/test_random.py`` freeze this page.
Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import mixer
from .types import Key, Tensor

_M = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_CHUNK = 1 << 16  # counters at a time in eager mode: all of a round's words stay in cache


def key(seed: int, device: torch.device | str | None = None) -> Key:
    """The root key of a run: int64 ``[2]`` for any Python int ``seed`` of at most 64 bits.

    Raises ``TypeError`` for another type, ``ValueError`` for more bits.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"key: seed must be an int, got {type(seed).__name__}; pass e.g. key(0)")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"key: seed {seed} does not fit 64 bits; take it modulo 2**64")
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed, 0], dtype=torch.int64, device=device)


def check_key(key: object, name: str = "key") -> None:
    """Raise ``TypeError`` unless ``key`` is a tensor, ``ValueError`` unless it is int64 ``[..., 2]``."""
    if not isinstance(key, Tensor):
        raise TypeError(f"{name}: want int64 [..., 2] made by key(seed), got {type(key).__name__}")
    if key.dtype != torch.int64 or key.ndim < 1 or key.shape[-1] != 2:
        raise ValueError(f"{name}: want int64 [..., 2] made by key(seed), got {key.dtype} {list(key.shape)}")


def check_one_key(key: object, name: str = "key") -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``key`` is a single key, int64 ``[2]``."""
    check_key(key, name)
    if isinstance(key, Tensor) and key.ndim != 1:
        raise ValueError(f"{name}: want one key [2], got {list(key.shape)}; pass one of them.")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32: four words below 2^32 (int64 ``[...]``) and the 64-bit ``seed`` -> four such words."""
    c0, c1, c2, c3, _ = torch.broadcast_tensors(*counter, seed)
    return _rounds((c0, c1, c2, c3), _round_keys(seed))


def _round_keys(seed: Tensor) -> list[tuple[Tensor, Tensor]]:
    k0, k1 = seed & _M, (seed >> 32) & _M
    return [((k0 + i * _WEYL[0]) & _M, (k1 + i * _WEYL[1]) & _M) for i in range(_ROUNDS)]


def _rounds(counter: tuple[Tensor, ...], round_keys: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = counter
    for k0, k1 in round_keys:
        # A product of two 32-bit words wraps in int64, which keeps all its 64 bits; only c0 and c2 must be masked
        # before the next multiplication. In place on what was just made: a third faster, for it stays in the cache.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_M)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_M)
        c1, c3 = p1, p0
    return c0, c1 & _M, c2, c3 & _M


def _words(key: Key, blocks: Tensor, round_keys: list[tuple[Tensor, Tensor]] | None = None) -> tuple[Tensor, ...]:
    """Words of the given counter blocks: key ``[..., 2]``, blocks ``[n]`` -> four of int64 ``[..., n]``."""
    position = key[..., 1:] + blocks
    zero = torch.zeros_like(position)
    counter = (position & _M, (position >> 32) & _M, zero, zero)
    return _rounds(counter, _round_keys(key[..., :1]) if round_keys is None else round_keys)


def fold_in(key: Key, data: int | Tensor) -> Key:
    """A new key for the number ``data`` (a name, a step, a row): ``[..., 2]``, broadcast with an int64 tensor.

    Raises ``TypeError`` if ``data`` is no whole number, and the errors of ``check_key``.
    """
    check_key(key)
    if isinstance(data, float) or (isinstance(data, Tensor) and data.dtype.is_floating_point):
        raise TypeError("fold_in: want an integer or an int64 tensor, got floats; keys are named by whole numbers.")
    if isinstance(data, Tensor):
        number = data.to(key.device, torch.int64)
    else:  # a fill, not a copy from the host, for which it would have to wait
        number = torch.full((), data, dtype=torch.int64, device=key.device)
    if key.is_meta:
        return _unknown((*torch.broadcast_shapes(key.shape[:-1], number.shape), 2))
    w0, w1, w2, w3 = _words(key, number.unsqueeze(-1))
    return torch.cat((w0 | (w1 << 32), w2 | (w3 << 32)), dim=-1)


def split(key: Key, n: int) -> Key:
    """``n`` new keys: ``[..., 2] -> [n, ..., 2]``; the old one must not be used again.

    Raises ``TypeError`` if ``n`` is no whole number, ``ValueError`` if it is negative, and the errors of ``check_key``.
    """
    check_key(key)
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"split: n must be a whole number, got {type(n).__name__}.")
    if n < 0:
        raise ValueError(f"split: n must be 0 or more, got {n}.")
    if key.is_meta:
        return _unknown((n, *key.shape))
    w0, w1, w2, w3 = _words(key, torch.arange(n, device=key.device))
    return torch.stack((w0 | (w1 << 32), w2 | (w3 << 32)), dim=-1).movedim(-2, 0)


def _unknown(shape: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """What a key on the meta device draws: no numbers, so none is computed; abstract trees are cheap."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _per_key(key: Key, shape: Sequence[int]) -> tuple[int, ...]:
    """The part of ``shape`` that each key draws for itself; the key's leading axes are the shape's."""
    lead = key.shape[:-1]
    if tuple(shape[: len(lead)]) != tuple(lead):
        raise ValueError(
            f"random: keys {list(key.shape)} want a shape that begins with {list(lead)}, got {list(shape)}"
        )
    return tuple(shape[len(lead) :])


def _counters(key: Key, n: int) -> tuple[Tensor, ...]:
    """The numbers ``0..n-1``, in pieces small enough for the cache when eager, whole when compiled."""
    counters = torch.arange(n, device=key.device)
    if torch.compiler.is_compiling() or key.device.type != "cpu":
        return (counters,)
    return counters.split(max(1, _CHUNK // max(1, math.prod(key.shape[:-1]))))


def bits(key: Key, shape: Sequence[int]) -> Tensor:
    """32 random bits an element, int64 in [0, 2^32). Keys ``[..., 2]`` draw ``shape``, which begins with their axes."""
    check_key(key)
    wanted = _per_key(key, shape)
    if key.is_meta:
        return _unknown(shape)
    n = math.prod(wanted)
    round_keys = _round_keys(key[..., :1])
    blocks = [_words(key, piece, round_keys) for piece in _counters(key, -(-n // 4))]
    words = torch.cat([torch.stack(block, dim=-1).flatten(-2) for block in blocks], dim=-1)
    return words[..., :n].reshape(shape)


def uniform(key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [0, 1), multiples of 2^-24: keys ``[..., 2]`` draw ``shape``, which begins with their axes."""
    drawn = bits(key, shape)
    if key.is_meta:
        return _unknown(shape, dtype)
    return (drawn & 0xFFFFFF).to(dtype) * 2.0**-24


def normal(key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal by Box-Muller, equal on two devices but for the last bits of their log, sin and cos.

    Keys ``[..., 2]`` draw ``shape``, which begins with their axes.
    """
    check_key(key)
    wanted = _per_key(key, shape)
    if key.is_meta:
        return _unknown(shape, dtype)
    n = math.prod(wanted)
    pieces = [_box_muller(mixer.words(key, piece)).to(dtype) for piece in _counters(key, -(-n // 2))]
    return torch.cat(pieces, dim=-2).flatten(-2)[..., :n].reshape(shape)


def _box_muller(words: Tensor) -> Tensor:
    """Random words int64 ``[..., n]`` -> pairs of normal numbers, float64 ``[..., n, 2]``, none above 6.7."""
    # In float64 and rounded at the end: in float32, log and cos differ by where in a vector register they are computed.
    radius = torch.sqrt(-2.0 * torch.log((((words >> 32) & _M).to(torch.float64) + 0.5) * 2.0**-32))
    angle = (words & _M).to(torch.float64) * (2.0 * math.pi * 2.0**-32)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)


def dropout_mask(key: Key, rate: float, shape: Sequence[int]) -> Tensor:
    """Bernoulli decisions for dropout: bool ``shape``, True (kept) with probability ``1 - rate``, to 16 bits.

    Keys ``[..., 2]`` decide for ``shape``, which begins with their axes. Raises ``ValueError`` unless 0 <= rate <= 1.
    """
    check_key(key)
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"dropout_mask: rate must lie in [0, 1], got {rate}.")
    wanted = _per_key(key, shape)
    threshold = round(rate * 65536)
    if threshold in (0, 65536):
        return torch.full(tuple(shape), threshold == 0, dtype=torch.bool, device=key.device)
    return mixer.lanes_above(key, threshold - 32769, math.prod(wanted)).reshape(shape)


def dropout_bits(key: Key, rate: float, shape: Sequence[int]) -> Tensor:
    """What ``dropout_mask`` decides, a bit each: keys ``[..., 2]`` -> int32 ``[..., n]``, on CUDA, for kernels.

    Decision ``i`` of a key is bit ``i % 32`` of number ``i // 32``. Raises ``ValueError`` unless 0 <= rate <= 1.
    """
    check_key(key)
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"dropout_bits: rate must lie in [0, 1], got {rate}.")
    count, threshold = math.prod(_per_key(key, shape)), round(rate * 65536)
    if threshold in (0, 65536):
        none, numbers = threshold == 65536, (*key.shape[:-1], (count + 31) // 32)
        return torch.full(numbers, 0 if none else -1, dtype=torch.int32, device=key.device)
    return mixer.packed_lanes_above(key, threshold - 32769, count)


def bernoulli(key: Key, probability: float | Tensor, shape: Sequence[int]) -> Tensor:
    """True with the given probability, to 24 bits: keys ``[..., 2]`` draw ``shape``, which begins with their axes.

    ``probability`` is a number, or a tensor that broadcasts to ``shape``.
    """
    return uniform(key, shape) < probability


def randint(key: Key, low: int | Tensor, high: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Integers from ``low`` to ``high - 1``, int64: keys ``[..., 2]`` draw ``shape``, which begins with their axes.

    The bias is below (high - low) / 2^32. Bounds may be tensors that broadcast to ``shape``.
    """
    return low + ((bits(key, shape) * (high - low)) >> 32)


def permutation(key: Key, n: int) -> Tensor:
    """A random order of ``0..n-1``: int64 ``[..., n]``. Two draws tie with probability n^2 / 2^63, then in order."""
    words = bits(key, (*key.shape[:-1], 2 * n)).unflatten(-1, (n, 2))
    return torch.argsort((words[..., 0] << 31) | (words[..., 1] >> 1), dim=-1, stable=True)

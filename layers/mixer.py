"""Many cheap decisions from one key: a counter through the mixer of SplitMix64, four 16-bit lanes a word.

    z = i * GAMMA + seed            seed, offset: the two numbers of the key
    z = (z ^ z >>a 32) * M1 + offset + C
    z = (z ^ z >>a 29) * M2
    z = z ^ z >> 32                 >>a: with the sign, of which PyTorch's int64 needs one pass less; >>: without

The second number of the key enters between the two multiplications, so that streams whose counters overlap differ;
both numbers must be random, as in every key that ``split`` and ``fold_in`` make. A stream has period 2^64. The last
two lines are bijections, the first maps ``z`` and its complement to one word (``>>a`` loses the highest bit): two of
``n`` words are equal with probability below ``n^2 / 2^63``, twice that of independent ones. Tests of quality:
``tests/layers/test_mixer.py``. The mixer is from Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014; its constants are D. Stafford's variant 13.
"""

from __future__ import annotations

import math

import torch

from .types import Key, Tensor

_GAMMA, _M1, _M2 = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_C = 0x6A09E667F3BCC909  # so that the word of key (0, 0) and counter 0 is not 0
_LOW, _ALL = 0xFFFFFFFF, 2**63 - 1
_CHUNK = 1 << 15  # words at a time in eager mode: they stay in the cache
_LANE, _LANES = 16, 4
_LITTLE_ENDIAN = bool(torch.ones(1, dtype=torch.int64).view(torch.int16)[0])  # the lowest lane of a word comes first


def lanes_above(key: Key, bound: int, count: int) -> Tensor:
    """Which of ``count`` uniform int16 lanes are above ``bound``: keys int64 ``[..., 2]`` -> bool ``[..., count]``."""
    seed, offset = key[..., :1], key[..., 1:] + _C
    eager = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if eager and not key.is_meta and _LITTLE_ENDIAN:
        return _by_chunks(seed, offset, bound, count)
    return _by_shifts(seed, offset, bound, count)


def _by_shifts(seed: Tensor, offset: Tensor, bound: int, count: int) -> Tensor:
    """Arithmetic alone, for ``vmap`` and compilers: each lane is shifted to the top of its word, where it decides.

    Three other ways fail in PyTorch 2.11. Without the mask, which changes nothing, Inductor multiplies in arithmetic
    of indices and overflows. If each element makes its own word, Triton refuses the kernel that fuses it into a layer
    norm ("operand does not dominate this use"; ``make gpu-check``). Shifts in a tensor come out wrong at free sizes.
    """
    counter = torch.arange(-(-count // _LANES), device=seed.device) & _ALL
    word = mix(seed + counter * _GAMMA, offset)
    lanes = torch.stack([word << (64 - _LANE * (lane + 1)) for lane in range(_LANES)], dim=-1)
    return (lanes >= (bound + 1) << (64 - _LANE)).flatten(-2)[..., :count]  # the lanes below it do not matter


def mix(z: Tensor, offset: Tensor) -> Tensor:
    """Counters times GAMMA plus seed -> random words, int64 ``[..., n]``, offset ``[..., 1]``."""
    z = z ^ (z >> 32)
    z = z * _M1 + offset
    z = (z ^ (z >> 29)) * _M2
    return z ^ ((z >> 32) & _LOW)


def _by_chunks(seed: Tensor, offset: Tensor, bound: int, count: int) -> Tensor:
    """The same with few passes over memory: words are read as four lanes, and a chunk of them stays in the cache."""
    words = -(-count // _LANES)
    size = words if seed.device.type != "cpu" else min(words, max(1, _CHUNK // max(1, math.prod(seed.shape))))
    steps = torch.arange(size, device=seed.device) * _GAMMA
    above = torch.empty((*seed.shape[:-1], _LANES * words), dtype=torch.bool, device=seed.device)
    for begin in range(0, words, max(size, 1)):
        end = min(begin + size, words)
        z = steps[: end - begin] + (seed + _wrapped(begin * _GAMMA))
        z.bitwise_xor_(z >> 32)
        z = torch.add(offset, z, alpha=_M1)
        z.bitwise_xor_(z >> 29).mul_(_M2)
        z.bitwise_xor_((z >> 32).bitwise_and_(_LOW))
        # In int16 first: PyTorch's comparisons are vectorised for a result of their own type.
        above[..., _LANES * begin : _LANES * end] = z.view(torch.int16).gt_(bound)
    return above[..., :count]


def _wrapped(number: int) -> int:
    """A whole number modulo 2^64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63

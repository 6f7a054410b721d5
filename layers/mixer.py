"""Many cheap bits from one key: a counter through a 64-bit mixer, a word or four 16-bit lanes each.

    z = ((i + 1) * GAMMA + seed) ^ offset       seed, offset: the two numbers of the key
    z = (z ^ z >> 27) * M1
    z = (z ^ z >> 33) * M2
    z = z ^ z >> 27                             >>: without the sign

Each step is a bijection: no word of a stream comes twice in its period, 2^64, where of ``n`` independent words two
would be equal with probability ``n^2 / 2^65``. Every bit of the counter and of both numbers of the key passes the
whole mixer. Two streams of ``n`` and ``m`` words share ``n m / 2^64`` of them on average, as independent ones do, and
do not run on together where they meet, unless their keys are related: if the seeds differ by ``2^b`` and the offsets
in bit ``b`` alone, half of the words at equal counters are the same, for ``b = 63`` all. ``split`` and ``fold_in``
make such a pair with probability 2^-121, and ``key(n)`` all have offset 0. Tests of quality:
``tests/layers/test_mixer.py``. The counter is from Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014; the mixer is P. Evensen's moremur, 2019.
"""

from __future__ import annotations

import importlib.util
import math

import torch

from .types import Key, Tensor

_GAMMA, _M1, _M2 = 0x9E3779B97F4A7C15 - 2**64, 0x3C79AC492BA7B653, 0x1C69B3F74AC4AE35
_CHUNK = 1 << 15  # words at a time in eager mode: they stay in the cache
_LANE, _LANES = 16, 4
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_LITTLE_ENDIAN = bool(torch.ones(1, dtype=torch.int64).view(torch.int16)[0])  # the lowest lane of a word comes first


def lanes_above(key: Key, bound: int, count: int) -> Tensor:
    """Which of ``count`` uniform int16 lanes are above ``bound``: keys int64 ``[..., 2]`` -> bool ``[..., count]``.

    One operator of PyTorch, ``nest_fn::lanes_above``, so that compilers and transforms see no arithmetic of 64 bits:
    fused by Inductor it costs eight bytes a decision, or is refused by Triton, or wrong at free sizes.
    """
    made: Tensor = (_made if _is_eager(key) else _lanes_above)(key, bound, count)
    return made


def _is_eager(key: Key) -> bool:
    """Whether nothing watches: a call of the operator costs more, the first one a second for PyTorch's compiler."""
    watched = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return not watched and type(key) is torch.Tensor and torch._C._len_torch_dispatch_stack() == 0


@torch.library.custom_op("nest_fn::lanes_above", mutates_args=())
def _lanes_above(key: torch.Tensor, bound: int, count: int) -> torch.Tensor:
    return _made(key, bound, count)


def _made(key: Tensor, bound: int, count: int) -> Tensor:
    if key.device.type == "cuda" and _HAS_TRITON:
        from . import mixer_triton

        return mixer_triton.lanes_above(key, bound, count, (_GAMMA, _M1, _M2))
    if _LITTLE_ENDIAN:
        return _by_chunks(key[..., :1], key[..., 1:], bound, count).contiguous()
    return _by_shifts(key, bound, count)


@_lanes_above.register_fake
def _(key: torch.Tensor, bound: int, count: int) -> torch.Tensor:
    return key.new_empty((*key.shape[:-1], count), dtype=torch.bool)


@_lanes_above.register_vmap
def _(info: object, axes: tuple[int | None, ...], key: torch.Tensor, bound: int, count: int) -> tuple[Tensor, int]:
    """Another axis of keys."""
    assert axes[0] is not None
    return _lanes_above(key.movedim(axes[0], 0), bound, count), 0


def packed_lanes_above(key: Key, bound: int, count: int) -> Tensor:
    """The same decisions, a bit each, for kernels on CUDA: keys int64 ``[..., 2]`` -> int32 ``[..., n]``.

    Decision ``i`` is bit ``i % 32`` of number ``i // 32``; what follows the last one is arbitrary.
    """
    made: Tensor = _packed(key, bound, count)
    return made


@torch.library.custom_op("nest_fn::packed_lanes_above", mutates_args=(), device_types="cuda")
def _packed(key: torch.Tensor, bound: int, count: int) -> torch.Tensor:
    from . import mixer_triton

    return mixer_triton.packed_lanes_above(key, bound, count, (_GAMMA, _M1, _M2))


@_packed.register_fake
def _(key: torch.Tensor, bound: int, count: int) -> torch.Tensor:
    return key.new_empty((*key.shape[:-1], (count + 31) // 32), dtype=torch.int32)


def _by_shifts(key: Key, bound: int, count: int) -> Tensor:
    """Arithmetic alone: each lane is shifted to the top of its word, where it decides."""
    word = words(key, torch.arange(-(-count // _LANES), device=key.device))
    lanes = torch.stack([word << (64 - _LANE * (lane + 1)) for lane in range(_LANES)], dim=-1)
    return (lanes >= (bound + 1) << (64 - _LANE)).flatten(-2)[..., :count]  # the lanes below it do not matter


def words(key: Key, counters: Tensor) -> Tensor:
    """Keys int64 ``[..., 2]``, counters int64 ``[n]`` -> their words, int64 ``[..., n]``."""
    # ``^ 0``: Inductor takes sums and products of counters for indices, which it computes in 32 bits on a GPU.
    return mix((((counters + 1) ^ 0) * _GAMMA + key[..., :1]).bitwise_xor_(key[..., 1:]))


def mix(z: Tensor) -> Tensor:
    """Numbers -> random words, int64 ``[..., n]``. Writes over ``z``, which the caller has just made."""
    z = _fold(z, 27).mul_(_M1)
    z = _fold(z, 33).mul_(_M2)
    return _fold(z, 27)


def _fold(z: Tensor, shift: int) -> Tensor:
    """``z ^ z >> shift`` in place; the copies of the sign that PyTorch shifts in are masked away."""
    return z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def _by_chunks(seed: Tensor, offset: Tensor, bound: int, count: int) -> Tensor:
    """The same with few passes over memory: words are read as four lanes, and a chunk of them stays in the cache."""
    n = -(-count // _LANES)
    size = n if seed.device.type != "cpu" else min(n, max(1, _CHUNK // max(1, math.prod(seed.shape))))
    steps = torch.arange(1, size + 1, device=seed.device) * _GAMMA
    above = torch.empty((*seed.shape[:-1], _LANES * n), dtype=torch.bool, device=seed.device)
    for begin in range(0, n, max(size, 1)):
        end = min(begin + size, n)
        z = steps[: end - begin] + (seed + _wrapped(begin * _GAMMA))
        z = mix(z.bitwise_xor_(offset))
        # In int16 first: PyTorch's comparisons are vectorised for a result of their own type.
        above[..., _LANES * begin : _LANES * end] = z.view(torch.int16).gt_(bound)
    return above[..., :count]


def _wrapped(number: int) -> int:
    """A whole number modulo 2^64, as int64 holds it."""
    return (number + 2**63) % 2**64 - 2**63

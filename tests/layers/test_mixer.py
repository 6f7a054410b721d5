"""Quality of the dropout decisions: uniform, independent along a stream and between streams, and full avalanche.

All keys are fixed, so that a run is a fact and no chance; bounds are those of the exact distributions at about five
standard deviations (a p-value of 1e-6), over some hundred million decisions in all.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nest_fn.layers import mixer, random
from nest_fn.layers.mixer import _GAMMA, lanes_above, mix
from nest_fn.layers.types import Key, Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "random.json"
SIGMAS = 5.0


def words(key: Key, count: int, first: int = 0) -> Tensor:
    """The stream of a key: int64 ``[..., count]`` from counter ``first`` on."""
    counters = torch.arange(first, first + count)
    return mixer.words(key, counters)


def lanes(word: Tensor) -> Tensor:
    """int64 in [0, 65536): ``[..., n] -> [..., n, 4]``."""
    return torch.stack([(word >> shift) & 0xFFFF for shift in (0, 16, 32, 48)], dim=-1)


def excess(counts: Tensor) -> float:
    """Chi-square of equal bins in standard deviations above its mean."""
    expected = counts.sum().double() / counts.numel()
    chi = ((counts - expected).square() / expected).sum()
    return float((chi - (counts.numel() - 1)) / math.sqrt(2 * (counts.numel() - 1)))


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two samples, in standard deviations of independent ones."""
    a, b = a.double(), b.double()
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / (a.std() * b.std()) * math.sqrt(a.numel()))


KEYS = {
    "of a seed": random.key(0),
    "of a split": random.split(random.key(1), 3)[2],
    "all ones": torch.tensor([-1, -1]),
    "a power of two": torch.tensor([1 << 40, 1 << 20]),
}


@pytest.mark.parametrize("name", KEYS)
def test_every_lane_is_uniform(name: str) -> None:
    """2^22 words: all 65,536 values of each lane, and bytes of the whole word in pairs with the next word's."""
    word = words(KEYS[name], 1 << 22)
    found = lanes(word)
    for lane in range(4):
        assert abs(excess(torch.bincount(found[:, lane], minlength=1 << 16))) < SIGMAS
    for shift in (0, 24, 56):
        byte = (word >> shift) & 0xFF
        assert abs(excess(torch.bincount(byte[:-1] * 256 + byte[1:], minlength=1 << 16))) < SIGMAS


@pytest.mark.parametrize("name", KEYS)
def test_every_bit_is_fair_and_bits_do_not_pair(name: str) -> None:
    bits = torch.stack([(words(KEYS[name], 1 << 18) >> bit) & 1 for bit in range(64)]).double() * 2 - 1
    count = bits.shape[1]
    assert (bits.sum(1).abs() < SIGMAS * math.sqrt(count)).all()
    for lag in (0, 1, 2, 4, 64):
        table = bits[:, : count - lag] @ bits[:, lag:].T / math.sqrt(count - lag)
        table = table.fill_diagonal_(0) if lag == 0 else table
        assert table.abs().max() < SIGMAS + 0.5  # the largest of 4,096


def test_decisions_are_as_often_as_the_rate_says() -> None:
    n = 1 << 24
    for rate in (0.1, 0.5, 0.9, 2**-12):
        kept = random.dropout_mask(random.key(5), rate, (n,))
        wanted = 1 - round(rate * 65536) / 65536
        assert abs(float(kept.double().mean()) - wanted) < SIGMAS * math.sqrt(rate * (1 - rate) / n)


def test_gaps_between_dropped_elements_are_geometric() -> None:
    """2^24 decisions at rate 0.1: lengths of runs of kept elements 0 to 63 and above."""
    dropped = (~random.dropout_mask(random.key(6), 0.1, (1 << 24,))).nonzero()[:, 0]
    gaps = torch.bincount((dropped.diff() - 1).clamp(max=64), minlength=65).double()
    p = round(0.1 * 65536) / 65536
    chance = p * (1 - p) ** torch.arange(65).double()
    chance[64] = (1 - p) ** 64
    chi = ((gaps - gaps.sum() * chance).square() / (gaps.sum() * chance)).sum()
    assert abs(float(chi) - 64) < SIGMAS * math.sqrt(2 * 64)


def test_streams_of_related_keys_do_not_correlate() -> None:
    """Neighbours by ``split``, by ``fold_in`` and by seed, and streams whose counters overlap."""
    root = random.key(9)
    pairs = [
        random.split(root, 2),
        random.fold_in(root, torch.tensor([7, 8])),
        torch.stack((random.key(3), random.key(4))),
        # One counter ahead of the other, told apart by their offsets alone.
        torch.stack((root, torch.stack((root[0] + _GAMMA, random.split(root, 1)[0, 1])))),
    ]
    for pair in pairs:
        one, two = lanes(words(pair, 1 << 18)).unbind(0)
        assert not torch.equal(one, two)
        for shift in (0, 1, 2):
            count = one.shape[0] - shift
            assert abs(correlation(one[shift:], two[:count])) < SIGMAS
            assert abs(correlation(one[shift:] & 1, two[:count] & 1)) < SIGMAS


def test_many_streams_are_together_uniform() -> None:
    """The first words of 2^20 keys made by ``fold_in``: what the rows of a run look like side by side."""
    keys = random.fold_in(random.key(2), torch.arange(1 << 20))
    found = lanes(words(keys, 1)[:, 0])
    for lane in range(4):
        assert abs(excess(torch.bincount(found[:, lane], minlength=1 << 16))) < SIGMAS
        assert abs(correlation(found[1:, lane], found[:-1, lane])) < SIGMAS


def flips(what: str, bits: int, n: int = 1 << 13) -> Tensor:
    """How often each bit of the word flips with each bit of one input: float64 ``[bits, 64]``."""
    numbers = random.split(random.key(11), 3 * n).view(3, n, 2)[..., 0]
    given = {"seed": numbers[0], "offset": numbers[1], "counter": numbers[2] & 0xFFFFFFFF}

    def word(seed: Tensor, offset: Tensor, counter: Tensor) -> Tensor:
        return mix((counter + 1) * _GAMMA + seed ^ offset)

    before, found = word(**given), []
    for bit in range(bits):
        mask = (1 << bit) - (1 << 64 if bit == 63 else 0)
        changed = before ^ word(**given | {what: given[what] ^ mask})
        found.append(torch.stack([(changed >> out) & 1 for out in range(64)]).double().mean(1))
    return torch.stack(found)


@pytest.mark.parametrize("what, bits", [("counter", 32), ("seed", 64), ("offset", 64)])
def test_avalanche(what: str, bits: int) -> None:
    """Each bit of counter, seed and offset flips each bit of the word with probability one half."""
    n = 1 << 13
    assert float((flips(what, bits, n) - 0.5).abs().max()) < (SIGMAS + 1.0) * 0.5 / math.sqrt(n)


def test_related_keys() -> None:
    """Those that the module's head names share words; one number alone makes all words others."""
    key, top = random.split(random.key(1), 1)[0], torch.tensor(-(2**63))
    assert torch.equal(words(key ^ top, 100), words(key, 100))
    near = words(torch.stack((key[0] + 1, key[1] ^ 1)), 1000)
    assert 400 < int((near == words(key, 1000)).sum()) < 600
    for number in torch.eye(2, dtype=torch.int64):
        assert not (words(key ^ (number * top), 1000) == words(key, 1000)).any()


def test_no_word_comes_twice() -> None:
    """2^23 words of one stream: independent ones would agree with probability 2e-6."""
    assert len(torch.unique(words(random.key(13), 1 << 23))) == 1 << 23


def test_bits_form_matrices_of_random_rank() -> None:
    """Ranks over GF(2) of 64 x 64 matrices of successive words: 0.2888 full, 0.5776 one less, 0.1336 below."""
    count = 4000
    matrices = words(random.key(17), 64 * count).view(count, 64).clone()
    rank = torch.zeros(count, dtype=torch.int64)
    rows = torch.arange(count)
    used = torch.zeros(count, 64, dtype=torch.bool)
    for bit in range(64):
        has = ((matrices >> bit) & 1).bool() & ~used
        pivot = has.to(torch.int64).argmax(1)
        found = has.any(1)
        used[rows, pivot] |= found
        row = torch.where(found, matrices[rows, pivot], 0)
        clear = ((matrices >> bit) & 1).bool()
        clear[rows, pivot] = False
        matrices ^= torch.where(clear, row[:, None], 0)
        rank += found
    counts = torch.stack([(rank == 64).sum(), (rank == 63).sum(), (rank < 63).sum()]).double()
    chance = torch.tensor([0.2887880951, 0.5775761902, 0.1336357147], dtype=torch.float64)
    chi = ((counts - count * chance).square() / (count * chance)).sum()
    assert float(chi) < 30


def test_chunks_lanes_and_keys_are_one_stream() -> None:
    """Whatever the number of elements, of keys, and the way it is computed."""
    keys = random.split(random.key(19), 3)
    wanted = torch.stack([lanes(words(key, 40_000)).flatten() for key in keys])
    wanted = torch.where(wanted >= 1 << 15, wanted - (1 << 16), wanted) > -20000
    assert torch.equal(lanes_above(keys, -20000, 160_000), wanted)
    assert torch.equal(lanes_above(keys, -20000, 159_997), wanted[:, :159_997])
    assert torch.equal(lanes_above(keys[1], -20000, 7), wanted[1, :7])
    assert lanes_above(keys, 0, 0).shape == (3, 0)
    by_rows = torch.vmap(lambda key: lanes_above(key, -20000, 1001))(keys)
    assert torch.equal(mixer._by_shifts(keys, -20000, 1001), wanted[:, :1001])
    compiled = torch.compile(lanes_above, fullgraph=True, backend="aot_eager")
    assert torch.equal(by_rows, wanted[:, :1001]) and torch.equal(compiled(keys, -20000, 1001), wanted[:, :1001])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own making
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_decides_alike(dynamic: bool) -> None:
    """The real compiler, which has an arithmetic of its own for indices, with sizes fixed and free."""
    torch._dynamo.reset()
    compiled = torch.compile(lanes_above, fullgraph=True, dynamic=dynamic)
    for count in (5, 1000, 33333) if dynamic else (1001,):
        keys = random.split(random.key(count), 3)
        assert torch.equal(compiled(keys, -20000, count), lanes_above(keys, -20000, count))


INTERPRETED = """
import torch
from nest_fn.layers import mixer, mixer_triton, random
constants = (mixer._GAMMA, mixer._M1, mixer._M2)
for rows, count, bound in ((3, 10_001, -20000), (1, 4, 0), (5, 4095, 32767), (2, 1, -32768), (2, 0, 7)):
    keys = random.split(random.key(count), rows)
    wanted = mixer.lanes_above(keys, bound, count)
    assert torch.equal(mixer_triton.lanes_above(keys, bound, count, constants), wanted)
    packed = mixer_triton.packed_lanes_above(keys, bound, count, constants)
    bits = (packed[..., None] >> torch.arange(32)) & 1 != 0
    assert packed.shape == (rows, -(-count // 32)) and torch.equal(bits.flatten(1)[:, :count], wanted)
key = random.key(3)
assert torch.equal(mixer_triton.lanes_above(key, 5, 999, constants), mixer.lanes_above(key, 5, 999))
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with PyTorch for Linux alone")
def test_the_triton_kernel_decides_alike() -> None:
    """In Triton's interpreter, which needs no GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "equal", done.stderr


def test_the_operator_keeps_pytorchs_rules() -> None:
    """Schema, fake tensors, dispatch under autograd, compilation with sizes fixed and free."""
    keys = random.split(random.key(23), 2)
    torch.library.opcheck(mixer._lanes_above, (keys, 100, 37))


def test_golden_words() -> None:
    """Frozen: a run of another year draws the same."""
    frozen = json.loads(GOLDEN.read_text())["mixer"]
    for key, wanted in zip(frozen["keys"], frozen["words"], strict=True):
        assert words(torch.tensor(key), 4, frozen["first"]).tolist() == wanted

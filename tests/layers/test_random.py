"""The generator against Random123's known answers, frozen vectors of our own, and statistics."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nest_fn.layers import mixer, random

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "random.json").read_text())
M = 0xFFFFFFFF
KNOWN = [  # Random123, kat_vectors: philox4x32 with 10 rounds; counter, key, answer
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def signed(word: int) -> int:
    """A 64-bit pattern as int64 holds it."""
    return word - 2**64 if word >= 2**63 else word


@pytest.mark.parametrize("counter,seed,answer", KNOWN)
def test_known_answers(counter: str, seed: str, answer: str) -> None:
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    low, high = (int(word, 16) for word in seed.split())
    got = random.philox((words[0], words[1], words[2], words[3]), torch.tensor([signed(low | high << 32)]))
    assert [f"{int(word):08x}" for word in got] == answer.split()


def reference_philox(counter: list[int], low: int, high: int) -> list[int]:
    """The definition, in Python's integers."""
    a, b, c, d = counter
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ low, second & M, (first >> 32) ^ d ^ high, first & M
        low, high = (low + 0x9E3779B9) & M, (high + 0xBB67AE85) & M
    return [a, b, c, d]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_blocks_are_the_definition(seed: int, offset: int) -> None:
    key = torch.tensor([signed(seed), signed(offset)])
    wanted = []
    for block in range(2):
        at = (offset + block) % 2**64
        wanted += reference_philox([at & M, at >> 32, 0, 0], seed & M, seed >> 32)
    assert random.bits(key, (8,)).tolist() == wanted
    new = random.fold_in(key, 1)
    assert new.tolist() == [signed(wanted[4] | wanted[5] << 32), signed(wanted[6] | wanted[7] << 32)]


def draws(key: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every kind of draw."""
    lead = tuple(key.shape[:-1])
    return {
        "split": random.split(key, 3),
        "fold_in": random.fold_in(key, 5),
        "bits": random.bits(key, (*lead, 7)),
        "uniform": random.uniform(key, (*lead, 7)),
        "normal": random.normal(key, (*lead, 7)),
        "dropout_mask": random.dropout_mask(key, 0.4, (*lead, 21)),
        "bernoulli": random.bernoulli(key, 0.4, (*lead, 9)),
        "randint": random.randint(key, -3, 11, (*lead, 9)),
        "permutation": random.permutation(key, 9),
    }


@pytest.mark.parametrize("seed", ["0", "12345", "-7", "18446744073709551615"])
def test_frozen(seed: str) -> None:
    """The bits of every draw are part of the interface: a run is its seed. Never regenerate this file
    (dropout masks and normal numbers changed once each, before 0.2.0: to the mixer)."""
    for name, value in draws(random.key(int(seed))).items():
        frozen = torch.tensor(GOLDEN[seed][name], dtype=value.dtype)
        if name == "normal":  # through the platform's logarithm, sine and cosine
            torch.testing.assert_close(value, frozen, atol=1e-6, rtol=0)
        else:
            assert torch.equal(value, frozen), name


def test_frozen_dropout_mask() -> None:
    """A large one, by its count and by where 1's are: the layout of 16-bit decisions over pieces."""
    kept = random.dropout_mask(random.key(1), 0.1, (1000, 333))
    where = kept.flatten().nonzero()[:, 0]
    assert [int(kept.sum()), int(where.sum()), int((where * where).sum())] == GOLDEN["dropout_mask_1000x333"]


@pytest.mark.parametrize("name", sorted(draws(random.key(0))))
def test_every_way_of_running_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager in pieces or whole, rows at once or one by one, and under vmap."""
    keys = random.split(random.key(9), 4)
    many = draws(keys)[name]
    if name == "split":  # the new axis comes first
        many = many.transpose(0, 1)
    for row in range(4):
        assert torch.equal(many[row], draws(keys[row])[name])
    assert torch.equal(torch.func.vmap(lambda one: draws(one)[name])(keys), many)
    monkeypatch.setattr(random, "_CHUNK", 1)
    in_pieces = draws(keys)[name]
    assert torch.equal(in_pieces.transpose(0, 1) if name == "split" else in_pieces, many)


def test_compiled_gives_the_same_bits() -> None:
    torch._dynamo.reset()
    keys = random.split(random.key(9), 4)
    compiled = torch.compile(draws, fullgraph=True, backend="aot_eager")(keys)
    for name, value in draws(keys).items():
        assert torch.equal(compiled[name], value), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own making
@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_draws_the_same_normal_numbers(dynamic: bool) -> None:
    """The real compiler, whose arithmetic of indices has 32 bits on some devices, with sizes fixed and free."""
    torch._dynamo.reset()
    compiled = torch.compile(random.normal, fullgraph=True, dynamic=dynamic)
    for count in (5, 1001, 40_000) if dynamic else (1001,):
        keys = random.split(random.key(count), 3)
        torch.testing.assert_close(
            compiled(keys, (3, count)), random.normal(keys, (3, count)), rtol=1e-6, atol=1e-6
        )  # the bits are the same; the last ones of log, sin and cos need not be


def test_pieces_of_the_cache_size_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    key = random.key(2)
    whole = random.dropout_mask(key, 0.3, (1 << 17,)), random.bits(key, (1 << 15,)), random.normal(key, (1 << 15,))
    monkeypatch.setattr(random, "_CHUNK", 1000)
    assert torch.equal(random.dropout_mask(key, 0.3, (1 << 17,)), whole[0])
    assert torch.equal(random.bits(key, (1 << 15,)), whole[1])
    assert torch.equal(random.normal(key, (1 << 15,)), whole[2])


def test_a_longer_draw_begins_like_a_shorter_one() -> None:
    """So that what is drawn for a row does not depend on how wide its batch is (uniform, bits)."""
    key = random.key(3)
    assert torch.equal(random.uniform(key, (100,))[:33], random.uniform(key, (33,)))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    key = random.key(0)
    assert random.uniform(key, shape).shape == shape
    assert random.normal(key, shape).shape == shape
    assert random.dropout_mask(key, 0.5, shape).shape == shape


def test_fold_in_takes_numbers_and_tensors() -> None:
    key, rows = random.key(4), torch.tensor([3, 0, 2**40])
    many = random.fold_in(key, rows)
    assert torch.equal(many, torch.stack([random.fold_in(key, row) for row in rows.tolist()]))
    assert torch.equal(random.split(key, 5)[3], random.fold_in(key, 3))
    keys = random.split(key, 3)
    assert torch.equal(random.fold_in(keys, rows)[1], random.fold_in(keys[1], 0))


def kolmogorov(x: torch.Tensor) -> float:
    """sqrt(n) times the largest distance of an empirical distribution from the uniform one; above 1.95 once in 1000."""
    x, n = x.double().sort().values, x.numel()
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * float(torch.maximum((x - steps[:-1]).abs().max(), (steps[1:] - x).abs().max()))


def chi_square_p(counts: torch.Tensor) -> float:
    """Probability of counts as uneven as these if all bins are equally likely."""
    mean = counts.double().mean()
    statistic = ((counts - mean).square() / mean).sum()
    return float(torch.special.gammaincc(torch.tensor((counts.numel() - 1) / 2.0).double(), statistic / 2))


N = 200_000


def test_uniform_is_uniform() -> None:
    x = random.uniform(random.key(1), (N,))
    assert float(x.min()) >= 0
    assert float(x.max()) < 1
    assert kolmogorov(x) < 1.95
    assert torch.equal(x * 2**24, (x * 2**24).round())


def test_normal_is_box_muller_of_the_mixers_words() -> None:
    words = [word % 2**64 for word in mixer.words(random.key(4), torch.arange(50)).tolist()]
    wanted = []
    for word in words:
        radius, angle = math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32)), 2 * math.pi * (word % 2**32) / 2**32
        wanted += [radius * math.cos(angle), radius * math.sin(angle)]
    drawn = random.normal(random.key(4), (99,), torch.float64)
    torch.testing.assert_close(drawn, torch.tensor(wanted[:99], dtype=torch.float64), rtol=1e-13, atol=1e-13)


def test_normal_is_normal() -> None:
    x = random.normal(random.key(1), (N,), torch.float64)
    assert kolmogorov(torch.special.ndtr(x)) < 1.95
    assert abs(float(x.mean())) < 4 / math.sqrt(N)
    assert abs(float((x[:-1] * x[1:]).mean())) < 4 / math.sqrt(N)  # neighbours share a radius, but not this
    square, angle = x[::2].square() + x[1::2].square(), torch.atan2(x[1::2], x[::2])
    assert kolmogorov(1 - torch.exp(-square / 2)) < 1.95
    assert kolmogorov(angle / (2 * math.pi) + 0.5) < 1.95
    both = torch.stack((torch.exp(-square / 2), angle / (2 * math.pi) + 0.5)).mul(10).long()  # 10 x 10 equal cells
    assert chi_square_p(torch.bincount(both[0] * 10 + both[1], minlength=100)) > 1e-3
    assert random.normal(random.key(1), (N,)).isfinite().all()


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_a_mask_keeps_its_fraction(rate: float) -> None:
    kept = random.dropout_mask(random.key(1), rate, (N,)).double()
    assert abs(float(kept.mean()) - (1 - rate)) <= 4 * math.sqrt(rate * (1 - rate) / N)
    planes = kept.reshape(8, -1).mean(1)  # the eight half-words of a block
    assert (planes - (1 - rate)).abs().max() <= 4.5 * math.sqrt(8 * rate * (1 - rate) / N)


def test_half_words_are_independent() -> None:
    kept = random.dropout_mask(random.key(2), 0.3, (N,)).double().reshape(8, -1) - 0.7
    correlation = (kept @ kept.T) / kept.shape[1] / 0.21
    assert (correlation - torch.eye(8)).abs().max() < 4.5 / math.sqrt(N / 8)


def test_randint_is_even() -> None:
    x = random.randint(random.key(1), -3, 9, (N,))
    assert chi_square_p(torch.bincount(x + 3, minlength=12)) > 1e-3
    assert (int(x.min()), int(x.max())) == (-3, 8)
    bounds = torch.tensor([[1], [5]])
    y = random.randint(random.key(1), 0, bounds, (2, 1000))
    assert (y >= 0).all()
    assert (y < bounds).all()


def test_bernoulli_takes_probabilities_by_element() -> None:
    p = torch.tensor([0.0, 0.25, 1.0])
    share = random.bernoulli(random.key(1), p, (N, 3)).double().mean(0)
    assert (share - p).abs().max() < 4 * math.sqrt(0.25 / N)
    assert share[0] == 0
    assert share[2] == 1


def test_every_order_is_as_likely() -> None:
    orders = random.permutation(random.split(random.key(1), 24_000), 4)
    assert (orders.sort(-1).values == torch.arange(4)).all()
    codes = (orders * torch.tensor([64, 16, 4, 1])).sum(-1)
    counts = torch.unique(codes, return_counts=True)[1]
    assert len(counts) == 24
    assert chi_square_p(counts) > 1e-3


def test_keys_of_a_split_do_not_meet() -> None:
    keys = random.split(random.split(random.key(1), 100), 100).reshape(-1, 2)
    assert len(torch.unique(keys, dim=0)) == 10_000
    first = random.uniform(keys, (10_000, 1))[:, 0]
    assert kolmogorov(first) < 1.95


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: random.key(1.5), TypeError, r"key: seed must be an int, got float"),
        (lambda: random.key(True), TypeError, r"key: seed must be an int, got bool"),
        (lambda: random.key(2**64), ValueError, r"does not fit 64 bits; take it modulo"),
        (
            lambda: random.split(torch.zeros(2), 2),
            ValueError,
            r"key: want int64 \[..., 2\] made by key\(seed\), got torch.float32",
        ),
        (lambda: random.uniform(torch.zeros(3, dtype=torch.int64), (2,)), ValueError, r"got torch.int64 \[3\]"),
        (lambda: random.normal(7, (2,)), TypeError, r"made by key\(seed\), got int"),
        (
            lambda: random.uniform(random.split(random.key(0), 3), (2, 5)),
            ValueError,
            r"want a shape that begins with \[3\], got \[2, 5\]",
        ),
    ],
)
def test_errors(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]

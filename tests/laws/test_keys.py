"""Chance comes from the key alone: the same key gives the same bits, another key others, and no bit is read twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from nest_fn.layers import mixer, random

from .registry import ALL, Example, key, model

CHANCE = [example for example in ALL if example.chance]


def run(example: Example, seed: int, train: bool = True) -> torch.Tensor:
    return example.run(example.params, example.state, example.inputs, key(seed), train).y


@pytest.mark.parametrize("example", CHANCE, ids=repr)
def test_a_key_decides(example: Example) -> None:
    first = run(example, 1)
    assert torch.equal(first, run(example, 1))
    others = [run(example, seed) for seed in range(2, 12)]
    assert any(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize("example", CHANCE, ids=repr)
def test_without_training_there_is_no_chance(example: Example) -> None:
    assert torch.equal(run(example, 1, train=False), run(example, 2, train=False))
    assert not torch.equal(run(example, 1, train=False), run(example, 1)) or example.name == "stochastic_depth"


@pytest.mark.parametrize("example", CHANCE, ids=repr)
def test_chance_without_a_key_is_an_error(example: Example) -> None:
    with pytest.raises(ValueError, match=r"needs key="):
        example.run(example.params, example.state, example.inputs, None, True)


@pytest.mark.parametrize("example", [one for one in ALL if not one.chance], ids=repr)
def test_without_chance_the_key_is_not_read(example: Example) -> None:
    assert torch.equal(run(example, 1), run(example, 2))


def blocks_read(monkeypatch: pytest.MonkeyPatch, example: Example) -> Counter[tuple[int, int]]:
    """How often one call reads each counter block (seed, position); a draw from the mixer is its first."""
    read: Counter[tuple[int, int]] = Counter()
    words = random._words

    def watched(keys: torch.Tensor, blocks: torch.Tensor, *schedule: Any) -> tuple[torch.Tensor, ...]:
        seeds, positions = torch.broadcast_tensors(keys[..., :1], keys[..., 1:] + blocks)
        read.update(zip(seeds.flatten().tolist(), positions.flatten().tolist(), strict=True))
        return words(keys, blocks, *schedule)

    lanes, normal = mixer.lanes_above, random.normal

    def watched_lanes(keys: torch.Tensor, bound: int, count: int) -> torch.Tensor:
        read.update(tuple(key) for key in keys.reshape(-1, 2).tolist())
        return lanes(keys, bound, count)

    def watched_normal(keys: torch.Tensor, *shape_and_type: Any) -> torch.Tensor:
        read.update(tuple(key) for key in keys.reshape(-1, 2).tolist())
        return normal(keys, *shape_and_type)

    monkeypatch.setattr(random, "_words", watched)
    monkeypatch.setattr(mixer, "lanes_above", watched_lanes)
    monkeypatch.setattr(random, "normal", watched_normal)
    run(example, 1)
    return read


@pytest.mark.parametrize("example", [*CHANCE, model("preprocessor.dither=0.01")], ids=repr)
def test_a_key_is_used_once(monkeypatch: pytest.MonkeyPatch, example: Example) -> None:
    read = blocks_read(monkeypatch, example)
    assert read
    assert max(read.values()) == 1


def test_the_law_fires(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing from a key that was split as well is found out, and so is a second mask from one key."""

    def careless(p: object, s: object, i: object, k: torch.Tensor, train: bool) -> object:
        return type("Result", (), {"y": random.uniform(k, (3,)) + random.uniform(random.split(k, 2)[0], (3,))})

    def masked(p: object, s: object, i: object, k: torch.Tensor, train: bool) -> object:
        masks = random.dropout_mask(k, 0.5, (3,)) ^ random.dropout_mask(k, 0.1, (3,))
        return type("Result", (), {"y": masks.float()})

    assert max(blocks_read(monkeypatch, Example("careless", careless)).values()) == 2
    assert max(blocks_read(monkeypatch, Example("masked", masked)).values()) == 2


def test_dropout_of_one_layer_leaves_the_others_alone() -> None:
    """Draws are named by their path: a rate that is switched on elsewhere does not shift them."""
    keys = random.split(key(1), 7)
    assert torch.equal(
        random.dropout_mask(keys[3], 0.1, (5,)), random.dropout_mask(random.split(key(1), 9)[3], 0.1, (5,))
    )

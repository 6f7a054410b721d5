"""Decoding against all paths of small examples; error rates and augmentation against their definitions."""

from __future__ import annotations

from itertools import groupby, product

import pytest
import torch
from torchaudio import functional as audio

from nest_fn.layers import random
from nest_fn.train.ctc.decode import beam_search, greedy
from nest_fn.train.ctc.scores import count_errors
from nest_fn.train.ctc.spec_augment import SpecAugment, spec_augment
from nest_fn.train.ctc.tokens import TokenList


def log_probs(frames: int, classes: int, seed: int) -> torch.Tensor:
    return torch.log_softmax(2 * random.normal(random.key(seed), (1, frames, classes)), -1)


def test_greedy_merges_repeats_and_tells_frames() -> None:
    path = torch.tensor([0, 3, 3, 0, 1, 1, 2, 0, 2])
    (found,) = greedy(torch.nn.functional.one_hot(path, 4).float().log()[None], [9])
    assert found.numbers == [3, 1, 2, 2]
    assert found.frames == [(1, 3), (4, 6), (6, 7), (8, 9)] and found.score == 0.0
    (short,) = greedy(torch.nn.functional.one_hot(path, 4).float().log()[None], [2])
    assert short.numbers == [3] and short.frames == [(1, 2)]


@pytest.mark.parametrize("seed", range(6))
def test_beam_search_finds_the_likeliest_text_of_all(seed: int) -> None:
    pytest.importorskip("flashlight.lib.text.decoder", reason="the optional package flashlight-text searches")
    given = log_probs(5, 3, seed)
    sums: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for path in product(range(3), repeat=5):
        text = tuple(token for token, _ in groupby(path) if token)
        sums.setdefault(text, []).append(sum(given[0, frame, token] for frame, token in enumerate(path)))  # type: ignore[arg-type]
    scores = {text: float(torch.logsumexp(torch.stack(paths), 0)) for text, paths in sums.items()}
    best = max(scores, key=lambda text: scores[text])
    (found,) = beam_search(TokenList(("a", "b")), 500)(given, [5])
    assert tuple(found.numbers) == best and found.score == pytest.approx(scores[best], abs=1e-5)
    assert [first for first, _ in found.frames] == sorted(first for first, _ in found.frames)
    assert all(0 <= first < last <= 5 for first, last in found.frames)


def test_error_rates() -> None:
    errors = count_errors([("ab  cd", "ab cd"), ("", "xy"), ("a b", "a c b")])
    assert errors == (4, 12, 2, 6) and errors.cer == 4 / 12 and errors.wer == 2 / 6


def test_masks_are_torchaudios_with_numbers_of_the_key() -> None:
    """The transforms' own arithmetic on the key's uniforms; the global generator stands still."""
    features = 1 + random.uniform(random.key(0), (2, 20, 60))
    keys = random.split(random.key(5), 2)
    masks = SpecAugment(time_masks=2, time_width=30, time_share=0.5, freq_masks=1, freq_width=8)
    before = torch.get_rng_state()
    made = spec_augment(features, [60, 40], masks, keys)
    assert torch.equal(torch.get_rng_state(), before)
    for row, length in enumerate((60, 40)):
        keep = torch.ones(20, 60, dtype=torch.bool)
        widths = [min(30, length // 2)] * 2 + [8]
        for number, (width, size) in enumerate(zip(widths, (length, length, 20), strict=True)):
            first, second = (random.uniform(random.fold_in(keys[row], 2 * number + call), (1,)) for call in (1, 2))
            value = first * width
            start = int((second * (size - value)).long())
            block = slice(start, start + int(value.long()))
            keep[(slice(None), block) if number < 2 else (block, slice(0, length))] = False
        assert torch.equal(made[row] != 0, keep)
    alone = spec_augment(features[1:, :, :45], [40], masks, keys[1:])
    assert torch.equal(alone[0], made[1, :, :45])
    assert spec_augment(features, [60, 40], SpecAugment(), keys) is features
    assert audio.edit_distance("a", "b") == 1

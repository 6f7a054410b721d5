"""The plan of a mixture against an oracle in plain Python."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn.train.augment.mix_plan import draw_interfering_speakers

Batch = dict[str, torch.Tensor]


def compared(words: torch.Tensor, row: torch.Tensor, pool: Batch) -> tuple[list[list[int]], list[int]]:
    """Mates by comparing each row with each: usable others in the order of their names, drawn without replacement."""
    usable = [p for p in range(len(pool["row"])) if pool["weight"][p] > 0 and pool["audio_len"][p] > 0]
    usable.sort(key=lambda p: int(pool["row"][p]))
    speakers, others = [], []
    for b in range(len(row)):
        free = [p for p in usable if pool["row"][p] != row[b]]
        others.append(len(free))
        drawn = []
        for k in range(min(words.shape[1], len(free))):
            drawn.append(free.pop(int(words[b, k]) * len(free) >> 32))
        speakers.append(drawn)
    return speakers, others


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 70), st.integers(1, 70), st.integers(1, 4))
def test_interfering_speakers_are_found_as_by_comparing_all_rows(seed: int, rows: int, pooled: int, drawn: int) -> None:
    """Whatever the pool: rows of it that do not count, own rows that are not in it, in any order."""
    draw = np.random.Generator(np.random.Philox(seed))
    names = torch.from_numpy(draw.permutation(2 * max(rows, pooled)))
    row = names[torch.from_numpy(draw.permutation(len(names)))[:rows]]
    pool = {
        "row": names[:pooled],
        "weight": torch.from_numpy(draw.integers(0, 2, pooled)).float(),
        "audio_len": torch.from_numpy(draw.integers(0, 3, pooled)),
    }
    words = torch.from_numpy(draw.integers(0, 2**32, (rows, drawn)))
    speakers, others = draw_interfering_speakers(words, row, pool)
    wanted, counts = compared(words, row, pool)
    assert others.tolist() == counts
    assert [found[: len(want)] for found, want in zip(speakers.tolist(), wanted, strict=True)] == wanted

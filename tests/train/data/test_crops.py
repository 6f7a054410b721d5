"""Crops of long recordings: laws over all durations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn.train.data.corpus.manifest import load_manifest


@settings(max_examples=60, deadline=None)
@given(
    durations=st.lists(st.floats(0.01, 20_000.0), min_size=1, max_size=4),
    offset=st.floats(0, 100),
    longest=st.floats(0.5, 100.0),
)
def test_crops_cover_each_recording_once(
    tmp_path_factory: pytest.TempPathFactory, durations: list[float], offset: float, longest: float
) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "crops.jsonl"
    lines = [{"audio_filepath": f"{n}.wav", "duration": d, "offset": offset} for n, d in enumerate(durations)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = load_manifest(path, max_duration=longest, long="crop", check_files=False)
    assert not made.dropped and made.cropped == sum(duration > longest for duration in durations)
    assert (made.duration <= longest).all() and len(set(made.utterance.tolist())) == len(made)
    for line, duration in enumerate(durations, 1):
        own = made.line == line
        begin, length = made.offset[own], made.duration[own]
        np.testing.assert_allclose(begin[1:], (begin + length)[:-1], rtol=0, atol=1e-9)
        assert begin[0] == offset and begin[-1] + length[-1] == pytest.approx(offset + duration, abs=1e-9)
        assert len(length) == 1 or (
            length.max() - length.min() <= 0.002 and len(length) <= duration / longest * 1.01 + 1
        )

"""Windows of a recording against the whole: equal where attention is limited, near where it is not."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn import Config, features, init, key
from nest_fn.encoder import encode
from nest_fn.frontend import frames, log_mel
from nest_fn.hidden_states import are_reduced, layers_by_rate
from nest_fn.recording.mel import mel_frames, normalized, recording_statistics
from nest_fn.recording.reach import Reach, encoder_reach
from nest_fn.recording.windows import encoder_frames, recording_features, windows

SECONDS = 30
LIMITED = [
    ["encoder.att_context_size=[[16,8]]", "encoder.self_attention_model=rel_pos_local_attn"],
    ["encoder.att_context_size=[[14,6]]", "encoder.att_context_style=chunked_limited"],
    ["encoder.att_context_size=[[8,0]]", "encoder.conv_context_size=causal", "encoder.causal_downsampling=true"],
    ["encoder.att_context_size=[[4,4]]", "encoder.subsampling=vggnet", "preprocessor.pad_to=0"],
    ["encoder.att_context_size=[[4,4]]", "encoder.subsampling=stacking", "preprocessor.normalize=all_features"],
    ["encoder.att_context_size=[[4,4]]", "preprocessor.exact_pad=true", "preprocessor.normalize=null"],
    ["encoder.att_context_size=[[4,4]]", "compat=legacy"],
]
REDUCED = [
    [*LIMITED[0], "encoder.reduction=pooling", "encoder.reduction_factor=2", "encoder.reduction_position=0"],
    [
        *LIMITED[0],
        "encoder.reduction=striding",
        "preprocessor.pad_to=32",
        "encoder.reduction_factor=4",
        "encoder.reduction_position=0",
    ],
    [
        *LIMITED[1],
        "encoder.reduction=pooling",
        "preprocessor.pad_to=24",
        "encoder.reduction_factor=3",
        "encoder.reduction_position=0",
    ],
    [*LIMITED[4], "encoder.reduction=striding", "encoder.reduction_factor=2", "encoder.reduction_position=-1"],
    [*LIMITED[2], "encoder.reduction=striding", "encoder.reduction_factor=2", "encoder.reduction_position=1"],
]


def recording() -> torch.Tensor:
    """Noise whose level changes every second: int16 ``[N]``, not a whole number of frames."""
    generator = np.random.default_rng(0)
    level = np.repeat(generator.random(SECONDS + 1), 16000)[: SECONDS * 16000 + 777]
    return torch.from_numpy((9000 * level * generator.standard_normal(len(level))).clip(-32768, 32767).astype("int16"))


@torch.no_grad()
def both(overrides: list[str], chosen: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Layers of the whole recording, and joined of windows: ``[L, T, D]`` each, in float64."""
    cfg, audio = Config.preset("tiny", overrides), recording().double() / 32768
    params, state = (torch.utils._pytree.tree_map(lambda x: x.double(), tree) for tree in init(key(3), cfg))
    layers, lengths = features(params, state, audio[None], torch.tensor([len(audio)]), cfg, chosen)
    pieces = recording_features(params, state, lambda a, n: audio[a : a + n], len(audio), cfg, chosen, 5.0)
    joined = torch.cat([torch.stack(piece.frames) for piece in pieces], dim=1)
    reduced = chosen is None or are_reduced(cfg.encoder, chosen)
    assert joined.shape[1] == encoder_frames(len(audio), cfg, reduced) == int(lengths[0])
    return torch.stack(layers)[:, 0, : int(lengths[0])], joined


@pytest.mark.parametrize("overrides", LIMITED, ids=lambda texts: texts[-1])
def test_with_limited_attention_windows_are_the_whole(overrides: list[str]) -> None:
    whole, joined = both(overrides)
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("overrides", REDUCED, ids=lambda texts: " ".join(texts[-3:]))
def test_frames_that_are_reduced_on_the_way(overrides: list[str]) -> None:
    """Windows are the whole in the layers before the reduction and in those after it, the last being the encoder's."""
    cfg = Config.preset("tiny", overrides)
    for layers in layers_by_rate(cfg.encoder):
        whole, joined = both(overrides, layers)
        torch.testing.assert_close(joined, whole, rtol=0, atol=1e-10)
    audio, length = torch.randn(1, 32000), torch.tensor([32000])
    params, state = init(key(3), cfg)
    (last,), lengths = features(params, state, audio, length, cfg, [-1])
    encoded, ends, _ = encode(
        params["encoder"], state["encoder"], *log_mel(audio, length, cfg.preprocessor), cfg.encoder
    )
    assert torch.equal(last.transpose(1, 2), encoded) and torch.equal(lengths, ends)
    if len(layers_by_rate(cfg.encoder)) == 2:
        with pytest.raises(ValueError, match="layers from 1 on have 1 frame"):
            features(params, state, audio, length, cfg)


def test_with_full_attention_windows_are_near_the_whole() -> None:
    whole, joined = both([])
    assert 0 < float((joined - whole).abs().median()) < 0.05 * float(whole.std())
    assert encoder_reach(Config.preset("tiny").encoder) is None


@pytest.mark.parametrize("normalize", ["per_feature", "all_features"])
def test_log_mel_in_blocks_is_that_of_the_whole(normalize: str) -> None:
    cfg = Config.preset("tiny", [f"preprocessor.normalize={normalize}"]).preprocessor
    audio = recording()[: 5 * 16000 + 99].double() / 32768

    def read(first: int, count: int) -> torch.Tensor:
        return audio[first : first + count]

    whole, _ = log_mel(audio[None], torch.tensor([len(audio)]), cfg)
    total, statistics = frames(len(audio), cfg), recording_statistics(read, len(audio), cfg, 70)
    cuts = [0, 1, 3, 200, total]
    blocks = [mel_frames(read, len(audio), a, b, cfg) for a, b in pairwise(cuts)]
    joined = torch.cat([normalized(block, statistics, cfg) for block in blocks], dim=2)
    torch.testing.assert_close(joined, whole[:, :, :total], rtol=0, atol=1e-10)


@settings(max_examples=200, deadline=None)
@given(
    total=st.integers(1, 3000), size=st.integers(1, 400),
    reach=st.none() | st.builds(Reach, st.integers(0, 90), st.integers(0, 90), st.integers(1, 9)),
    grid=st.integers(1, 4),
)  # fmt: skip
def test_windows_cover_every_frame_once_with_its_reach(total: int, size: int, reach: Reach | None, grid: int) -> None:
    reach = None if reach is None else reach._replace(period=reach.period * grid)
    made = list(windows(total, size, reach, grid))
    assert all(window.first % grid == window.begin % grid == 0 for window in made)
    assert made[0].begin == 0 and made[-1].end == total
    assert all(a.end == b.begin for a, b in pairwise(made))
    for window in made:
        assert 0 <= window.first <= window.begin < window.end <= window.last <= total
        if reach is not None and len(made) > 1:
            assert window.first <= max(0, window.begin - reach.left) and window.first % reach.period == 0
            assert window.last >= min(total, window.end + reach.right)
        elif len(made) > 1:
            assert 0 <= max(grid, size) - (window.last - window.first) < 2 * grid

"""Mixing as laws: exact ratios, silence, padding, draws that depend on the utterance alone, one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn.config.training import AugmentConfig
from nest_fn.layers import random
from nest_fn.train.augment.mix_plan import MixPlan, plan_mix, words_needed
from nest_fn.train.augment.mixing import augment

ALWAYS = AugmentConfig(prob=1.0)
NOISE, SPEECH = replace(ALWAYS, noise_ratio=1.0), replace(ALWAYS, noise_ratio=0.0)
MANY = replace(ALWAYS, min_mix_rate=0.1, max_mix_rate=1.0, max_num_segments=4, max_num_speakers=3)
KEY = random.key(11)
Batch = dict[str, torch.Tensor]


def make(lengths: Sequence[int], noise_lengths: Sequence[int] | None = None, width: int | None = None) -> Batch:
    """A batch of loud random samples; row ``i`` is the same in every batch that gives it the same length."""
    noise_lengths = lengths if noise_lengths is None else noise_lengths
    width = max(1, *lengths) if width is None else width
    samples = np.zeros((2, len(lengths), width), np.int16)
    for i, ends in enumerate(zip(lengths, noise_lengths, strict=True)):
        for which, end in enumerate(ends):
            clip = np.random.Generator(np.random.Philox(2 * i + which)).integers(-9000, 9000, max(end, 1))
            samples[which, i, :end] = clip[:end] | 1  # never 0
    rows = torch.arange(len(lengths))
    return {
        "audio": torch.from_numpy(samples[0]), "audio_len": torch.tensor(lengths),
        "noise": torch.from_numpy(samples[1]), "noise_len": torch.tensor(noise_lengths),
        "row": rows, "utterance": rows * 7919 + 3, "weight": (torch.tensor(lengths) > 0).float(),
    }  # fmt: skip


def plan(batch: Batch, cfg: AugmentConfig, key: torch.Tensor = KEY) -> MixPlan:
    """The plan that ``augment`` follows: the first two words of a row are its room's."""
    words = random.bits(random.fold_in(key, batch["utterance"]), (len(batch["row"]), 2 + words_needed(cfg)))
    return plan_mix(words[:, 2:], batch, batch, cfg)


def added(batch: Batch, cfg: AugmentConfig, key: torch.Tensor = KEY) -> torch.Tensor:
    """What is mixed in, float64."""
    mixed = augment(batch, cfg, key)
    return mixed["noisy_audio"].double() - mixed["audio"].double()


def ratio(audio: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Energy of one over the other, dB, by row."""
    return 10 * torch.log10(audio.double().square().sum(-1) / noise.double().square().sum(-1))


def test_what_comes_out() -> None:
    batch = make([900, 400])
    before = {name: value.clone() for name, value in batch.items()}
    out = augment(batch, ALWAYS, KEY)
    assert list(out) == ["audio", "audio_len", "noisy_audio", "noisy_audio_len", "row", "weight"]
    assert torch.equal(out["audio"], batch["audio"].double().div(32768).float())
    assert out["noisy_audio"].dtype == torch.float32 and not torch.equal(out["noisy_audio"], out["audio"])
    assert torch.equal(out["noisy_audio_len"], batch["audio_len"])  # Q34
    assert all(torch.equal(value, before[name]) for name, value in batch.items())


def test_nothing_to_draw_needs_no_key() -> None:
    out = augment(make([900, 400]), replace(ALWAYS, prob=0.0), None)
    assert torch.equal(out["noisy_audio"], out["audio"])
    with pytest.raises(ValueError, match="needs key="):
        augment(make([900, 400]), ALWAYS, None)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 700), min_size=1, max_size=6),
    noise_share=st.floats(0, 1.5),
    segments=st.integers(1, 5),
    speakers=st.integers(1, 4),
    rates=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    noise_ratio=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_ratio_is_exact_and_parts_fit(
    lengths: list[int], noise_share: float, segments: int, speakers: int, rates: tuple[float, float],
    noise_ratio: float, seed: int,
) -> None:  # fmt: skip
    cfg = AugmentConfig(
        prob=1.0, noise_ratio=noise_ratio, min_mix_rate=min(rates), max_mix_rate=max(rates),
        max_num_segments=segments, max_num_speakers=speakers,
    )  # fmt: skip
    batch, key = make(lengths, [min(int(noise_share * n), max(lengths)) for n in lengths]), random.key(seed)
    noise, planned = added(batch, cfg, key), plan(batch, cfg, key)
    assert torch.isfinite(noise).all()
    time = torch.arange(noise.shape[1])
    assert (noise[time >= batch["audio_len"][:, None]] == 0).all()
    begin, size, source, first, period = planned.parts
    end = begin + size
    assert (size >= 0).all() and (begin >= 0).all() and (end <= batch["audio_len"][:, None])[size > 0].all()
    assert (begin[:, 1:] >= end[:, :-1])[size[:, 1:] > 0].all()
    assert (period >= 1).all() and (first >= 0).all() and (source < 2 * len(lengths)).all()
    heard = size.sum(-1) > 0
    got = ratio(batch["audio"] / 32768, noise)[heard]
    torch.testing.assert_close(got, planned.ratio[heard].double(), rtol=0, atol=2e-3)
    covered = (batch["audio_len"] * torch.tensor(max(rates), dtype=torch.float64)).long().clamp(min=1)
    assert (size.sum(-1) <= covered).all()


def test_short_noise_is_repeated_and_noise_is_cut_in_order() -> None:
    batch = make([1000], [70])
    planned, noise = plan(batch, replace(NOISE, min_num_segments=3, max_num_segments=3)), batch["noise"][0, :70]
    got = added(batch, replace(NOISE, min_num_segments=3, max_num_segments=3))[0]
    pieces = [got[b : b + s] for b, s in zip(planned.parts.begin[0], planned.parts.size[0], strict=True)]
    wanted = torch.from_numpy(np.resize(noise.numpy(), 500)).double()
    gain = torch.cat(pieces).norm() / wanted.norm()
    torch.testing.assert_close(torch.cat(pieces), wanted * gain, rtol=0, atol=1e-6)
    assert int((got != 0).sum()) == 500


def test_other_speakers_are_heard_from_one_place_on_or_repeated() -> None:
    batch = make([1000, 200])
    parts, noise = plan(batch, SPEECH).parts, added(batch, SPEECH)
    for row, other in ((0, 1), (1, 0)):
        clip = batch["audio"][other, : batch["audio_len"][other]].numpy()
        begin, size, source, first, _ = (int(value[row, 0]) for value in parts)
        assert source == 2 + other and size == batch["audio_len"][row] // 2
        wanted = torch.from_numpy(np.take(clip, np.arange(first, first + size), mode="wrap")).double()
        got = noise[row, begin : begin + size]
        torch.testing.assert_close(got, wanted * (got.norm() / wanted.norm()), rtol=0, atol=1e-6)


def test_draws_depend_on_the_utterance_alone() -> None:
    cfg = replace(MANY, noise_ratio=1.0, prob=0.6)
    batch = make([500, 700, 600, 300, 650])
    whole = augment(batch, cfg, KEY)["noisy_audio"]
    picked = torch.tensor([3, 0, 4])
    part = {name: value[picked] for name, value in batch.items()}
    part["row"] = torch.arange(3)
    assert torch.equal(augment(part, cfg, KEY)["noisy_audio"], whole[picked])
    assert not torch.equal(augment(batch, cfg, random.key(12))["noisy_audio"], whole)


def test_a_pool_makes_mixtures_independent_of_ranks_and_order() -> None:
    """Level R2: the same mixtures on one rank, on two, and with the gathered rows in another order."""
    batch = make([500, 700, 600, 300, 650, 0])
    whole = augment(batch, MANY, KEY)["noisy_audio"]
    order = torch.tensor([5, 3, 1, 4, 0, 2])
    pool = {name: batch[name][order] for name in ("audio", "audio_len", "row", "weight")}
    pool["audio"] = torch.nn.functional.pad(pool["audio"], (0, 9))
    for rank in range(2):
        mine = {name: value[rank::2] for name, value in batch.items()}
        assert torch.equal(augment(mine, MANY, KEY, pool=pool)["noisy_audio"], whole[rank::2])


CONFIGS = {
    "default": AugmentConfig(),
    "many": replace(MANY, prob=0.8, max_num_segments=2, max_num_speakers=2, rir_prob=0.5),
    "raw": AugmentConfig(keep_raw_noise=True),
}


@pytest.mark.parametrize("name", ["default", "many"])
def test_compiled_into_one_graph(name: str) -> None:
    batch, cfg = make([500, 700, 600, 0, 300], [700, 90, 600, 0, 0]), CONFIGS[name]
    rirs = torch.tensor([[0.1, 1.0, 0.5, 0.2], [0.0, 0.0, -1.0, 0.3]])
    compiled = torch.compile(augment, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        wanted, got = (f(batch, cfg, random.key(seed), rirs)["noisy_audio"] for f in (augment, compiled))
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.equal(got, augment(batch, cfg, random.key(99), rirs)["audio"])


@pytest.mark.parametrize("name", CONFIGS)
def test_vmap_over_keys(name: str) -> None:
    batch, cfg = make([500, 700, 600, 0, 300], [700, 90, 600, 0, 0]), CONFIGS[name]
    rirs = torch.tensor([[0.1, 1.0, 0.5, 0.2]])
    keys = random.split(KEY, 4)
    got = torch.func.vmap(lambda key: augment(batch, cfg, key, rirs)["noisy_audio"])(keys)
    wanted = torch.stack([augment(batch, cfg, key, rirs)["noisy_audio"] for key in keys])
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("cfg", [NOISE, SPEECH, MANY], ids=["noise", "speech", "many"])
def test_silence_adds_nothing(cfg: AugmentConfig) -> None:
    """Faults A12."""
    batch = make([400, 400, 400], [400, 0, 1])
    batch["audio"][0], batch["noise"][2] = 0, 0
    noise = added(batch, cfg)
    assert torch.isfinite(noise).all() and (noise[0] == 0).all()
    if cfg is NOISE:
        assert (noise == 0).all()


def test_empty_rows_neither_get_nor_give() -> None:
    batch = make([400, 400, 0, 400])
    batch["weight"][1] = 0.0
    batch["audio"][1] = 30000  # a bad row: heard anywhere, it would show
    for seed in range(20):
        planned = plan(batch, SPEECH, random.key(seed))
        assert planned.mixed.tolist() == [True, False, False, True]
        assert planned.parts.source[[0, 3], 0].tolist() == [4 + 3, 4 + 0]
    noise = added(batch, replace(SPEECH, keep_raw_noise=True))
    assert (noise[1] == 0).all() and (noise[2] == 0).all() and (noise[0] != 0).any()


@pytest.mark.parametrize("lengths", [[400], [400, 0]])
def test_alone_an_utterance_gets_noise(lengths: list[int]) -> None:
    planned = plan(make(lengths), SPEECH)
    assert planned.mixed[0] and planned.parts.source[0, 0] == 0
    assert SPEECH.min_r_noise <= planned.ratio[0] <= SPEECH.max_r_noise


def test_keep_raw_noise() -> None:
    """Q32: rows left alone get their noise at its own level, and no more than they are long."""
    batch = make([400, 300, 500], [500, 100, 500])
    noise = added(batch, AugmentConfig(prob=0.0, keep_raw_noise=True), KEY)
    wanted = batch["noise"].double() / 32768
    wanted[0, 400:] = 0
    torch.testing.assert_close(noise, wanted, rtol=0, atol=1e-7)
    half = AugmentConfig(prob=0.5, keep_raw_noise=True, noise_ratio=1.0)
    mixed = plan(batch, half, random.key(1)).mixed
    assert mixed.any() and not mixed.all()
    assert torch.equal((added(batch, half, random.key(1)) - noise).abs().amax(-1) > 1e-3, mixed)


def many_plans(batch: Batch, cfg: AugmentConfig, count: int) -> MixPlan:
    """Plans of ``count`` keys at once, each field with that axis first."""
    words = random.bits(random.split(KEY, count), (count, len(batch["row"]), words_needed(cfg)))
    return torch.func.vmap(lambda w: plan_mix(w, batch, batch, cfg))(words)


def test_speakers_are_distinct_others_each_alike() -> None:
    batch = make([400, 400, 0, 400, 400, 400])
    cfg = replace(SPEECH, min_num_segments=3, max_num_segments=3, min_num_speakers=3, max_num_speakers=3)
    speakers = many_plans(batch, cfg, 3000).parts.source[:, 1] - 6  # of row 1: [3000, 3]
    assert set(speakers.flatten().tolist()) == {0, 3, 4, 5}
    assert all(len(set(row)) == 3 for row in speakers.tolist())
    for column in speakers.unbind(-1):
        counts = torch.bincount(column, minlength=6)[[0, 3, 4, 5]]
        assert ((counts - 750).abs() < 4 * (3000 * 0.25 * 0.75) ** 0.5).all()


def test_with_fewer_speakers_than_parts_they_come_again() -> None:
    cfg = replace(SPEECH, min_num_segments=4, max_num_segments=4, min_num_speakers=4, max_num_speakers=4)
    speakers = many_plans(make([400, 400, 400]), cfg, 500).parts.source[:, 0] - 3
    assert (speakers[:, 0] != speakers[:, 1]).all()
    later = torch.bincount(speakers[:, 2:].flatten(), minlength=3)
    assert later[0] == 0 and later[1:].min() > 400


def test_sizes_are_multinomial() -> None:
    cfg = replace(NOISE, min_num_segments=3, max_num_segments=3)
    size = many_plans(make([6000]), cfg, 4000).parts.size[:, 0].double()
    assert (size.sum(-1) == 3000).all()
    variance = 3000 * (1 / 3) * (2 / 3)
    assert ((size.mean(0) - 1000).abs() < 4 * (variance / 4000) ** 0.5).all()
    assert ((size.var(0) / variance - 1).abs() < 4 * (2 / 4000) ** 0.5).all()


def test_no_split_fails() -> None:
    """Q33: fewer samples than segments."""
    cfg = replace(NOISE, min_num_segments=5, max_num_segments=5)
    size = many_plans(make([6, 1, 40]), cfg, 200).parts.size
    assert (size.sum(-1) == torch.tensor([3, 1, 20])).all()
    assert ((size > 0).sum(-1) == torch.tensor([3, 1, 5])).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"audio": torch.zeros(2, 9)}, "audio is torch.float32"),
        ({"noise": torch.zeros(2, 8, dtype=torch.int16)}, "want both"),
        ({"utterance": None}, "utterance missing"),
    ],
)
def test_bad_batches(change: dict[str, torch.Tensor | None], message: str) -> None:
    batch = {name: value for name, value in (make([9, 9]) | change).items() if value is not None}
    with pytest.raises((TypeError, ValueError), match=message):
        augment(batch, ALWAYS, KEY)


def test_bad_pools() -> None:
    batch = make([9, 9])
    with pytest.raises(ValueError, match="pool wants .* row, weight missing"):
        augment(batch, ALWAYS, KEY, pool={name: batch[name] for name in ("audio", "audio_len")})
    with pytest.raises(ValueError, match="got audio torch.float32"):
        augment(batch, ALWAYS, KEY, pool={**batch, "audio": batch["audio"].float()})


def test_a_bad_key_and_missing_rooms() -> None:
    with pytest.raises(ValueError, match="int64"):
        augment(make([9, 9]), ALWAYS, torch.zeros(2))
    with pytest.raises(ValueError, match=r"rir_prob 0.5 needs rirs"):
        augment(make([9, 9]), AugmentConfig(rir_prob=0.5), KEY)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", CONFIGS)
def test_on_cuda_without_waiting(name: str) -> None:
    batch, cfg = make([500, 700, 600, 0, 300], [700, 90, 600, 0, 0]), CONFIGS[name]
    rirs = torch.tensor([[0.1, 1.0, 0.5, 0.2]])
    wanted = augment(batch, cfg, KEY, rirs)["noisy_audio"]
    there, key, rirs = {name: value.cuda() for name, value in batch.items()}, KEY.cuda(), rirs.cuda()
    augment(there, cfg, key, rirs)  # FFT plans and kernels are made here
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = augment(there, cfg, key, rirs)["noisy_audio"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-5, atol=1e-5)

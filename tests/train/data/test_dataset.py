"""Manifests to batches: content, determinism over workers and ranks, resume, bad files, noise.

Faults A11 to A13, G1; levels R0 to R2.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nest_fn.config.training import DataConfig
from nest_fn.train.bench.loader import loader_rates, loader_throughput
from nest_fn.train.data.audio_files.audio import read_audio
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.clips import draw_noise, load_clips, noise_words
from nest_fn.train.data.corpus.manifest import load_manifest, write_manifest
from nest_fn.train.data.corpus.shard_index import write_shards
from nest_fn.train.data.dataset import Dataset, RawBatch, batches, load_batch, open_dataset
from nest_fn.train.errors import DataError, UsageError
from tests.train.hanging import hanging

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the real recordings of ../shared/data are absent")
TENSORS = ("audio", "audio_len", "noise", "noise_len", "row", "utterance", "weight")


def _random(count: int, seed: int) -> NDArray[np.int16]:
    return np.random.Generator(np.random.Philox(seed)).integers(-9000, 9000, count).astype(np.int16)


def _corpus(folder: Path, seconds: list[float], name: str = "m", seed: int = 0) -> str:
    folder.mkdir(exist_ok=True)
    for number, length in enumerate(seconds):
        write_wav(folder / f"{name}{number}.wav", _random(round(length * 16000), seed + number))
    entries = [{"audio_filepath": f"{name}{n}.wav", "duration": length} for n, length in enumerate(seconds)]
    write_manifest(folder / f"{name}.jsonl", entries)
    return str(folder / f"{name}.jsonl")


SECONDS = [1.0, 1.5, 2.0, 2.25, 3.0, 1.25, 2.75, 1.0625, 2.5, 1.75, 1.125]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    config = DataConfig(
        train=(_corpus(tmp_path, SECONDS),), noise=(_corpus(tmp_path, [0.5, 4.0, 2.0], "noise", 100),), num_workers=0,
        batch_seconds=8.0, max_duration=8.0, num_buckets=3,
    )  # fmt: skip
    return open_dataset(config, seed=5)


def _with(dataset: Dataset, **options: Any) -> Dataset:
    return replace(dataset, config=replace(dataset.config, **options))


def _equal(a: RawBatch, b: RawBatch) -> bool:
    tensors = all(torch.equal(a[name], b[name]) for name in TENSORS)  # type: ignore[literal-required]
    return tensors and all(a[name] == b[name] for name in ("ids", "epoch", "batch", "bad", "silent"))  # type: ignore[literal-required]


def test_what_a_batch_holds(dataset: Dataset) -> None:
    seen = []
    for raw in batches(dataset, epochs=1):
        count, width = raw["audio"].shape
        assert raw["audio"].dtype == raw["noise"].dtype == torch.int16 and raw["noise"].shape == (count, width)
        assert {raw[n].dtype for n in ("audio_len", "noise_len", "row", "utterance")} == {torch.int64}
        assert raw["row"].tolist() == list(range(count)) and not raw["bad"]
        for row in range(count):
            length, name = int(raw["audio_len"][row]), raw["ids"][row]
            assert not raw["audio"][row, length:].any() and not raw["noise"][row, raw["noise_len"][row] :].any()
            assert int(raw["noise_len"][row]) <= length
            if not name:
                assert length == 0 and raw["weight"][row] == 0 and raw["utterance"][row] == 0
                continue
            index = next(i for i in range(len(dataset.manifest)) if dataset.manifest.identity(i) == name)
            assert raw["utterance"][row] == dataset.manifest.utterance[index] and raw["weight"][row] == 1
            assert np.array_equal(raw["audio"][row, :length], read_audio(dataset.manifest.source(index)))
            assert raw["noise"][row].any()
            seen.append(index)
    assert sorted(seen) == list(range(len(SECONDS)))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("prefetch", [1, 7])
def test_workers_and_prefetch_change_nothing(dataset: Dataset, workers: int, prefetch: int) -> None:
    alone = list(batches(dataset, epochs=2))
    other = list(batches(_with(dataset, num_workers=workers, prefetch=prefetch), epochs=2))
    assert len(alone) == len(other) and all(map(_equal, alone, other))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_anywhere(dataset: Dataset, workers: int) -> None:
    dataset = _with(dataset, num_workers=workers)
    whole = list(itertools.islice(batches(dataset), 2 * len(dataset.plan(0)) + 1))
    for k in range(1, len(whole)):
        epoch, batch = whole[k - 1]["epoch"], whole[k - 1]["batch"] + 1
        rest = itertools.islice(batches(dataset, epoch=epoch, batch=batch), len(whole) - k)
        assert all(map(_equal, whole[k:], rest))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_are_one_rank_alone(dataset: Dataset, world: int) -> None:
    parts = [list(batches(dataset, epochs=1, rank=rank, world=world)) for rank in range(world)]
    for alone, *shares in zip(batches(dataset, epochs=1), *parts, strict=True):
        assert len({share["audio"].shape for share in shares}) == 1
        rows = torch.cat([share["row"] for share in shares])
        order = torch.argsort(rows)[: len(alone["row"])]
        for name in TENSORS:
            together = torch.cat([share[name] for share in shares])  # type: ignore[literal-required]
            assert torch.equal(together[order], alone[name])  # type: ignore[literal-required]


def test_noise_depends_on_seed_epoch_and_utterance_alone(dataset: Dataset) -> None:
    def noises(data: Dataset, epoch: int) -> dict[str, torch.Tensor]:
        held = (
            zip(raw["ids"], raw["noise"], raw["noise_len"], strict=True) for raw in batches(data, epoch=epoch, epochs=1)
        )
        return {name: noise[:length] for name, noise, length in itertools.chain(*held) if name}

    first = noises(dataset, 0)
    wide = replace(dataset, shapes=replace(dataset.shapes, width=dataset.shapes.width + 1280))
    assert all(torch.equal(noise, noises(wide, 0)[name]) for name, noise in first.items())
    for other in (noises(dataset, 1), noises(replace(dataset, seed=6), 0)):
        assert sum(torch.equal(noise, other[name]) for name, noise in first.items()) < len(first) / 2


def test_noise_from_disk_equals_noise_from_memory(dataset: Dataset) -> None:
    assert dataset.noise is not None and (dataset.noise.start >= 0).all()
    disk = replace(dataset.noise, start=np.full(3, -1), memory=np.zeros(0, np.int16))
    assert all(map(_equal, batches(dataset, epochs=1), batches(replace(dataset, noise=disk), epochs=1)))


def test_the_pool_keeps_to_its_budget(tmp_path: Path) -> None:
    files = [_corpus(tmp_path, [20.0, 10.0, 5.0, 1.0], "n")]
    pool = load_clips(files, DataConfig(noise_budget_mb=1, num_workers=2))  # 1 MiB: 32.8 s
    assert (pool.start >= 0).tolist() == [True, True, False, False] and pool.memory.nbytes <= 1 << 20
    for clip in range(4):
        whole = read_audio(pool.manifest.source(clip))
        assert np.array_equal(pool.read(clip, 0, 10**6), whole) and np.array_equal(
            pool.read(clip, 99, 50), whole[99:149]
        )


def test_every_clip_and_every_place_is_drawn_alike(tmp_path: Path) -> None:
    write_wav(tmp_path / "a.wav", np.arange(1, 1501, dtype=np.int16))
    write_wav(tmp_path / "b.wav", np.arange(2001, 2501, dtype=np.int16))
    entries = [{"audio_filepath": "a.wav"}, {"audio_filepath": "b.wav"}]
    write_manifest(tmp_path / "n.jsonl", entries)
    pool = load_clips([str(tmp_path / "n.jsonl")], DataConfig())
    words = noise_words(0, 0, np.arange(6000))
    firsts = np.array([draw_noise(pool, word, 1000)[0] for word in words])
    long = firsts[firsts < 2000]
    assert abs(len(long) - 3000) < 5 * np.sqrt(1500)
    assert set(firsts[firsts > 2000]) == {2001}  # shorter than asked: whole
    assert len(draw_noise(pool, words[np.argmax(firsts > 2000)], 1000)) == 500
    counts = np.histogram(long, bins=10, range=(1, 502))[0]
    assert long.min() < 10 and long.max() > 492 and ((counts - len(long) / 10) ** 2 / (len(long) / 10)).sum() < 30


def test_silent_noise_is_drawn_again_by_energy_and_not_by_sign(tmp_path: Path) -> None:
    half = np.zeros(64000, np.int16)
    half[48000:] = -50  # its sum is negative, its energy is not
    write_wav(tmp_path / "half.wav", half)
    write_wav(tmp_path / "zero.wav", np.zeros(64000, np.int16))
    for names, share in ((["half.wav"], 0.9), (["zero.wav"], 0.0), (["half.wav", "zero.wav"], 0.7)):
        write_manifest(tmp_path / "n.jsonl", [{"audio_filepath": name} for name in names], overwrite=True)
        pool = load_clips([str(tmp_path / "n.jsonl")], DataConfig())
        drawn = [draw_noise(pool, word, 16000) for word in noise_words(0, 0, np.arange(300))]
        assert all(len(noise) == 16000 for noise in drawn)
        found = np.mean([noise.any() for noise in drawn])
        assert found >= share if share else found == 0


def test_without_noise(dataset: Dataset) -> None:
    raw = next(batches(replace(dataset, noise=None)))
    assert not raw["noise"].any() and torch.equal(raw["noise_len"], raw["audio_len"])


@pytest.mark.parametrize("rule", ["pad", "repeat"])
@pytest.mark.parametrize("seconds", [0.0001, 0.01, 0.3, 0.999, 1.0])
def test_short_audio(tmp_path: Path, rule: str, seconds: float) -> None:
    manifest = _corpus(tmp_path, [seconds])
    config = DataConfig(train=(manifest,), min_duration=0.0, short_audio=rule, num_workers=0)
    raw = next(batches(open_dataset(config, seed=0)))
    clip = read_audio(tmp_path / "m0.wav")
    row = raw["audio"][0, :16000].numpy()
    assert raw["audio_len"].tolist() == [16000] and np.array_equal(row[: len(clip)], clip)
    rest = row[len(clip) :]
    assert np.array_equal(rest, np.resize(clip, 16000)[len(clip) :]) if rule == "repeat" else not rest.any()


def _damage(dataset: Dataset, index: int) -> str:
    path = Path(str(dataset.manifest.source(index)))
    path.write_bytes(path.read_bytes()[:1000])
    return dataset.manifest.where(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_stops_the_run_by_default(dataset: Dataset, workers: int) -> None:
    where = _damage(dataset, 4)
    with pytest.raises(DataError, match=where.replace(".", r"\.")) as caught:
        list(batches(_with(dataset, num_workers=workers), epochs=1))
    assert str(dataset.manifest.source(4)) in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_file_can_be_made_weightless(dataset: Dataset, workers: int) -> None:
    good = list(batches(dataset, epochs=1))
    where = _damage(dataset, 4)
    tolerant = _with(dataset, on_error="zero_weight", max_bad_fraction=0.1, num_workers=workers)
    bad = 0
    for before, after in zip(good, batches(tolerant, epochs=1), strict=True):
        assert before["ids"] == after["ids"] and torch.equal(before["utterance"], after["utterance"])
        for row in range(len(before["ids"])):
            if before["ids"][row] == dataset.manifest.identity(4):
                assert after["weight"][row] == 0 and after["audio_len"][row] == 0 and not after["audio"][row].any()
                assert len(after["bad"]) == 1 and where in after["bad"][0]
                bad += 1
            else:
                assert torch.equal(before["audio"][row], after["audio"][row])
                assert torch.equal(before["noise"][row], after["noise"][row])
    assert bad == 1
    assert len(list(batches(tolerant, epochs=3))) == 3 * len(good)  # counted an epoch at a time
    _damage(dataset, 5)
    with pytest.raises(DataError, match=r"2 utterances could not be read in epoch 0, more than max_bad_fraction 0.1"):
        list(batches(tolerant, epochs=1))


def _silence(dataset: Dataset, index: int) -> str:
    write_wav(Path(str(dataset.manifest.source(index))), np.zeros(round(SECONDS[index] * 16000), np.int16))
    return dataset.manifest.where(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_silent_utterances_can_be_left_out(dataset: Dataset, workers: int) -> None:
    """Rows, order and all other utterances stay; the silent ones are counted, told once, and are no errors."""
    good = list(batches(dataset, epochs=2))
    silent = {_silence(dataset, index) for index in (3, 4, 9)}
    names = {dataset.manifest.identity(index) for index in (3, 4, 9)}
    skipping = _with(dataset, skip_silent=True, max_bad_fraction=0.0, num_workers=workers)
    told, counted = [], []
    for before, after in zip(good, batches(skipping, epochs=2), strict=True):
        assert before["ids"] == after["ids"] and torch.equal(before["utterance"], after["utterance"])
        told += after["bad"]
        counted += after["silent"]
        for row, name in enumerate(before["ids"]):
            if name in names:
                lengths = (after["weight"][row], after["audio_len"][row], after["noise_len"][row])
                assert lengths == (0, 0, 0) and not after["audio"][row].any() and not after["noise"][row].any()
            else:
                assert all(torch.equal(before[key][row], after[key][row]) for key in TENSORS)  # type: ignore[literal-required]
    assert sorted(counted) == sorted(2 * list(silent))
    assert len(told) == 1 and told[0].split(": ")[0] in silent and "data.skip_silent" in told[0]
    heard = [raw for raw in batches(dataset, epochs=1) if names & set(raw["ids"])]
    assert all(not raw["silent"] and raw["weight"].all() for raw in heard)  # not asked for: an utterance like others


def test_a_single_sample_is_not_silent(dataset: Dataset) -> None:
    clip = np.zeros(round(SECONDS[3] * 16000), np.int16)
    clip[-1] = -1
    write_wav(Path(str(dataset.manifest.source(3))), clip)
    assert not any(raw["silent"] for raw in batches(_with(dataset, skip_silent=True), epochs=1))


def test_copies_of_an_utterance_get_noise_of_their_own(tmp_path: Path) -> None:
    config = DataConfig(
        train=(_corpus(tmp_path, [1.0, 2.0], "x"), _corpus(tmp_path, [1.5], "y")), weights=(1.0, 3.0), num_workers=0,
        noise=(_corpus(tmp_path, [9.0], "n", 50),),
    )  # fmt: skip
    raw = next(batches(open_dataset(config, seed=0)))
    rows = [row for row, name in enumerate(raw["ids"]) if name.startswith("y0.wav")]
    assert len(rows) == 3 and sum(map(bool, raw["ids"])) == 5
    assert len({int(raw["utterance"][row]) for row in rows}) == 3
    assert not torch.equal(raw["noise"][rows[0]], raw["noise"][rows[1]])
    assert torch.equal(raw["audio"][rows[0]], raw["audio"][rows[1]])
    with pytest.raises(UsageError, match="one number from 0 for each"):
        open_dataset(replace(config, weights=(1.0,)), seed=0)


def test_validation_is_the_same_every_time(dataset: Dataset) -> None:
    config = replace(dataset.config, train=(), valid=dataset.config.train)
    first, again = (list(batches(open_dataset(config, 0, split="valid"), epochs=1)) for _ in range(2))
    assert all(map(_equal, first, again))
    assert first[0]["audio"].shape[1] == max(raw["audio"].shape[1] for raw in first)
    with pytest.raises(UsageError, match=r"data\.train names no manifest"):
        open_dataset(config, 0)


def test_the_digest_sees_what_changes_batches(dataset: Dataset) -> None:
    assert dataset.digest == open_dataset(dataset.config, 5).digest
    for other in (
        open_dataset(dataset.config, 6),
        open_dataset(replace(dataset.config, noise=()), 5),
        open_dataset(replace(dataset.config, num_buckets=2), 5),
        open_dataset(replace(dataset.config, max_duration=2.0), 5),
        open_dataset(replace(dataset.config, skip_silent=True), 5),
    ):
        assert other.digest != dataset.digest
    assert open_dataset(replace(dataset.config, num_workers=3, prefetch=9), 5).digest == dataset.digest


def test_shards_make_the_same_batches(dataset: Dataset, tmp_path: Path) -> None:
    written = write_shards(load_manifest(dataset.config.train), tmp_path / "t", 2)
    config = replace(dataset.config, train=(str(written),), train_shards=(str(tmp_path / "t" / "audio_{0..1}.tar"),))
    packed = open_dataset(config, 5)
    assert packed.digest == dataset.digest
    assert all(map(_equal, batches(dataset, epochs=1), batches(packed, epochs=1)))


def test_a_hanging_file_is_noticed(dataset: Dataset) -> None:
    name = Path(str(dataset.manifest.source(0))).name
    slow = _with(dataset, num_workers=1, timeout_s=0.3)
    with hanging(re.escape(name)), pytest.raises(DataError, match="loader: no answer in 0.3 s for batch"):
        list(batches(slow, epochs=1))


@needs_data
def test_real_recordings() -> None:
    pytest.importorskip("soundfile", reason="the optional package soundfile reads FLAC")
    config = DataConfig(
        train=(str(DATA / "librispeech_valid.jsonl"),), noise=(str(DATA / "noise.jsonl"),), num_workers=2
    )
    dataset = open_dataset(config, seed=0)
    planned = dataset.plan(0).batch(0)
    one, two = load_batch(dataset, planned, 0), next(batches(dataset))
    assert _equal(one, two)
    rate = loader_throughput(dataset, len(dataset.plan(0)))
    assert rate.audio_seconds == pytest.approx(float(dataset.manifest.duration.sum()), abs=0.01)
    assert rate.per_core_second > 500 and rate.first_batch_seconds <= rate.wall_seconds


def test_rates_of_made_up_clips(tmp_path: Path) -> None:
    rates = loader_rates(tmp_path, minutes=0.4, repeats=1)
    assert {"wav", "wav_noise"} <= set(rates) and min(rates.values()) > 0

"""The synthesiser: equal bytes from equal seeds, labels that agree with the sound, voices that differ, valid files."""

from __future__ import annotations

import json
import wave
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nest_fn.errors import OutputError
from nest_fn.train.data.synth import (
    NOISE_KINDS,
    PHONES,
    SAMPLE_RATE,
    SILENCE,
    CorpusSpec,
    Speaker,
    Utterance,
    lexicon,
    speaker,
    synthesise,
    write_corpus,
)
from nest_fn.train.data.synth.keys import generator
from nest_fn.train.data.synth.render import render, tract_response
from nest_fn.train.data.synth.voice import Score, compose, tracks

TINY = CorpusSpec(
    train_minutes=0.3, valid_minutes=0.1, noise_minutes=0.1, probe_train_minutes=0.1, probe_test_minutes=0.1,
    train_speakers=3, valid_speakers=1, probe_train_speakers=2, probe_test_speakers=2, max_seconds=4.0,
)  # fmt: skip
SPLITS = ["train", "valid", "noise", "probe_train", "probe_train_noisy", "probe_test", "probe_test_noisy"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def samples(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float64) / 32768


def says(who: Speaker, *phones: tuple[str, int]) -> np.ndarray:
    """A speaker saying these phones (name, ms) between pauses, without accents: float64 ``[N]``."""
    score = Score("", ((SILENCE, 100), *phones, (SILENCE, 100)), (0.0,) * (len(phones) + 2))
    rng = generator(7, "test")
    return render(rng, who, tracks(rng, who, score)).astype(np.float64)


def middle(audio: np.ndarray, ms: int = 60) -> np.ndarray:
    centre, half = len(audio) // 2, ms * 8
    return audio[centre - half : centre + half]


def level(audio: np.ndarray) -> float:
    return 10 * np.log10(np.mean(audio**2) + 1e-20)


def periodicity(audio: np.ndarray) -> tuple[float, float]:
    """The highest normalised autocorrelation between 60 and 400 Hz, and the frequency at which it lies."""
    x = audio - audio.mean()
    lags = np.arange(40, 267)
    scores = [
        np.dot(x[:-lag], x[lag:]) / np.sqrt(np.dot(x[:-lag], x[:-lag]) * np.dot(x[lag:], x[lag:])) for lag in lags
    ]
    # The shortest lag among those nearly as good: multiples of a period repeat it as well.
    best = int(np.flatnonzero(np.array(scores) > 0.9 * max(scores))[0])
    return max(scores), SAMPLE_RATE / lags[best]


def share_above(audio: np.ndarray, hertz: float) -> float:
    power = np.abs(np.fft.rfft(audio * np.hanning(len(audio)))) ** 2
    return float(power[np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE) > hertz].sum() / max(power.sum(), 1e-12))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("corpus")
    return folder, write_corpus(folder, TINY)


@pytest.fixture(scope="module")
def utterances() -> list[Utterance]:
    return [synthesise(TINY, "test", i, i) for i in range(8)]


def test_equal_specifications_make_equal_bytes(corpus: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    write_corpus(tmp_path / "again", TINY)
    assert files(tmp_path / "again") == files(corpus[0])


def test_an_utterance_depends_on_its_own_key_alone() -> None:
    first = synthesise(TINY, "train", 2, 1)
    synthesise(TINY, "train", 0, 0)
    np.random.seed(5)  # the global generator must not matter
    again = synthesise(TINY, "train", 2, 1)
    assert np.array_equal(first.audio, again.audio)
    assert first.score == again.score
    others = [
        synthesise(replace(TINY, seed=1), "train", 2, 1),
        synthesise(TINY, "valid", 2, 1),
        synthesise(TINY, "train", 3, 1),
    ]
    assert all(other.score != first.score for other in others)


def test_manifests_describe_their_files(corpus: tuple[Path, dict[str, Path]]) -> None:
    folder, manifests = corpus
    assert list(manifests) == SPLITS
    for split, path in manifests.items():
        lines = entries(path)
        assert lines
        assert path == folder / f"{split}.jsonl"
        for entry in lines:
            audio = samples(folder / entry["audio_filepath"])
            assert entry["duration"] == len(audio) / SAMPLE_RATE
            assert 0.01 < np.abs(audio).max() < 0.95, "clipped or silent"
            if split == "noise":
                assert entry["noise"] in NOISE_KINDS
                continue
            phones = entry["phones"]
            assert phones[0][1] == 0.0
            assert phones[-1][2] == pytest.approx(entry["duration"], abs=1e-9)
            assert all(a[2] == b[1] and a[1] < a[2] for a, b in pairwise(phones))
            spoken = [name for name, _, _ in phones if name != SILENCE]
            book = dict(zip(lexicon().words, lexicon().phones, strict=True))
            assert spoken == [phone for word in entry["text"].split() for phone in book[word]]


def test_speakers_are_held_out(corpus: tuple[Path, dict[str, Path]]) -> None:
    who = {split: {e["speaker"] for e in entries(corpus[1][split])} for split in SPLITS if split != "noise"}
    assert who["probe_train"] <= who["train"]
    assert not who["probe_test"] & (who["train"] | who["valid"])
    assert not who["valid"] & who["train"]
    texts = {e["text"] for e in entries(corpus[1]["train"])}
    assert not texts & {e["text"] for split in ("probe_train", "probe_test") for e in entries(corpus[1][split])}


def test_noisy_twins_have_the_stated_ratio(corpus: tuple[Path, dict[str, Path]]) -> None:
    folder, manifests = corpus
    clean, noisy = entries(manifests["probe_test"]), entries(manifests["probe_test_noisy"])
    assert len(clean) == len(noisy)
    for a, b in zip(clean, noisy, strict=True):
        assert (a["phones"], a["speaker"]) == (b["phones"], b["speaker"])
        x, y = samples(folder / a["audio_filepath"]), samples(folder / b["audio_filepath"])
        gain = np.dot(x, y) / np.dot(x, x)  # 1, or less where the mixture was scaled to fit
        assert level(gain * x) - level(y - gain * x) == pytest.approx(b["snr"], abs=0.5)
        assert TINY.min_snr - 0.01 <= b["snr"] <= TINY.max_snr + 0.01


def test_a_finished_corpus_is_kept_and_another_one_refused(corpus: tuple[Path, dict[str, Path]]) -> None:
    folder, manifests = corpus
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_corpus(folder, TINY) == manifests
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    with pytest.raises(OutputError, match="seed was 0, is 1"):
        write_corpus(folder, replace(TINY, seed=1))


def test_labels_lie_where_the_sound_is(utterances: list[Utterance]) -> None:
    """Vowels are loud and periodic where they are labelled; silence is quiet; s lies high and has no period."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for one in utterances:
        for name, start, end in one.phones:
            a, b = int(start * SAMPLE_RATE), int(end * SAMPLE_RATE)
            quarter = (b - a) // 4
            piece = one.audio[a + quarter : b - quarter].astype(np.float64)
            if len(piece) >= 560:
                found.setdefault(name, []).append(
                    (level(piece) - level(one.audio), periodicity(piece)[0], share_above(piece, 3500))
                )
    median = {name: np.median(np.array(rows), axis=0) for name, rows in found.items()}
    vowels = [name for name in median if PHONES[name].syllabic]
    assert len(vowels) >= 6
    for name in vowels:
        assert median[name][0] > -4.0, name
        assert median[name][1] > 0.7, name
        assert median[name][2] < 0.3, name
    assert median[SILENCE][0] < -25.0
    assert median[SILENCE][1] < 0.7
    assert median["s"][2] > 0.8
    assert median["s"][1] < 0.5


def test_boundaries_are_sharp() -> None:
    audio = says(speaker(0, 3), ("aa", 200), ("s", 200), ("aa", 200))
    frames = audio[: len(audio) // 80 * 80].reshape(-1, 80)
    high = np.array([share_above(frame, 3500) for frame in frames]) > 0.5  # 5 ms each
    loud = (frames**2).mean(1) > 1e-3
    inside = np.flatnonzero(high & loud)
    assert abs(inside[0] * 5 - 300) <= 15
    assert abs(inside[-1] * 5 + 5 - 500) <= 15


def test_stops_are_closure_then_burst() -> None:
    audio = says(speaker(0, 3), ("aa", 150), ("t", 100), ("aa", 150))
    closure, burst = audio[int(0.262 * 16000) : int(0.295 * 16000)], audio[int(0.302 * 16000) : int(0.318 * 16000)]
    assert level(burst) > level(closure) + 15
    assert share_above(burst, 3000) > 0.5


@pytest.mark.parametrize("vowel", ["iy", "aa", "uw"])
def test_formants_stand_at_their_targets(vowel: str) -> None:
    """The envelope over harmonics, from long steady vowels at a low pitch, peaks where the inventory says."""
    who = replace(speaker(0, 1), f0=70.0, f0_range=0.0, declination=0.0, tract=1.0, formant_shape=(1.0, 1.0, 1.0))
    spectrum = np.zeros(4097)
    audio = says(who, (vowel, 1200))[6400:-6400]
    for start in range(0, len(audio) - 1024, 256):
        spectrum += np.abs(np.fft.rfft(audio[start : start + 1024] * np.hanning(1024), 8192)) ** 2
    frequency = np.fft.rfftfreq(8192, 1 / SAMPLE_RATE)
    targets = PHONES[vowel].segments[0].formants
    assert targets is not None
    for target in targets:
        near = np.abs(frequency - target) < 250
        smooth = np.convolve(np.log(spectrum + 1e-12), np.ones(48) / 48, mode="same")  # 94 Hz, over a harmonic
        rise = smooth + 6 / np.log(2) * 0.23 * np.log(np.maximum(frequency, 50))  # undo the tilt of the source
        assert abs(frequency[near][np.argmax(rise[near])] - target) < 110, (vowel, target)


def test_the_tract_resonates_at_its_formants() -> None:
    who = replace(speaker(0, 0), tilt=0.0)
    response = np.abs(tract_response(who, np.array([[500.0, 1500.0, 2500.0]]), np.ones(1)))[0]
    peaks = np.flatnonzero((response[1:-1] > response[:-2]) & (response[1:-1] > response[2:])) + 1
    np.testing.assert_allclose(peaks[:3] * SAMPLE_RATE / 512, [500, 1500, 2500], atol=32)
    assert np.mean(response**2) == pytest.approx(1.0, rel=1e-4)


def test_neighbours_pull_on_formants() -> None:
    """Coarticulation: the same short vowel has a lower second formant between labials than between alveolars."""
    who, names = speaker(0, 2), {}
    for consonant in ("b", "d"):
        phones = ((SILENCE, 100), (consonant, 80), ("ah", 60), (consonant, 80), (SILENCE, 100))
        names[consonant] = tracks(generator(0, "x"), who, Score("", phones, (0.0,) * 5)).formants[210, 1]
    assert names["b"] < names["d"] - 50


def test_pitch_is_the_speakers() -> None:
    for index in range(6):
        who = replace(speaker(0, index), f0_range=0.0, declination=0.0)
        measured = periodicity(middle(says(who, ("ah", 400)), ms=200))[1]
        assert measured == pytest.approx(who.f0, rel=0.12), who.name


def test_speakers_differ() -> None:
    people = [speaker(0, i) for i in range(60)]
    pitch, tract = np.array([p.f0 for p in people]), np.array([p.tract for p in people])
    assert pitch.min() < 110
    assert pitch.max() > 200
    assert len(np.unique(pitch)) == 60
    assert np.ptp(tract) > 0.2
    assert np.corrcoef(np.log(pitch), np.log(tract))[0, 1] > 0.7
    assert speaker(0, 4) == people[4]
    assert speaker(1, 4) != people[4]


def test_levels_vary_within_their_range() -> None:
    measured = np.array([level(synthesise(TINY, "levels", i, i).audio) for i in range(12)])
    assert np.all(measured < TINY.max_level + 0.1)
    assert np.all(measured > TINY.min_level - 3.0)
    assert measured.std() > 2.0


def test_utterances_have_about_the_wanted_length() -> None:
    who, rng = speaker(0, 0), generator(0, "length")
    lengths = [sum(ms for _, ms in compose(rng, who, 6.0).phones) / 1000 for _ in range(40)]
    assert min(lengths) > 4.0
    assert max(lengths) < 11.0

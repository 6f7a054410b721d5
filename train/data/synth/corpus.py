"""The corpus on disk: 16 kHz 16-bit WAV files and JSONL manifests, whose bytes are a function of the specification.

Splits: ``train`` and ``valid`` (other speakers) for pre-training, ``noise`` to mix in, and for a phone probe
``probe_train`` (speakers of ``train``, new sentences) and ``probe_test`` (speakers that occur nowhere else). The probe
splits also exist as ``*_noisy``: the same utterances in noise that is drawn independently of ``noise``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nest_fn.files.atomic import anything, atomic_write
from nest_fn.files.outputs import begin, claim, finish
from nest_fn.train.data.audio_files.wav import write_wav

from .keys import generator
from .noise import KINDS, coloured, noise
from .render import SAMPLE_RATE, render
from .voice import Score, compose, speaker, tracks

_FORMAT = 1  # incremented when the same specification makes other bytes


@dataclass(frozen=True)
class CorpusSpec:
    """The settings of a corpus; equal specifications make equal bytes."""

    seed: int = 0
    train_minutes: float = 40.0
    valid_minutes: float = 5.0
    noise_minutes: float = 5.0
    probe_train_minutes: float = 8.0
    probe_test_minutes: float = 5.0
    train_speakers: int = 48
    valid_speakers: int = 8
    probe_train_speakers: int = 24  # the first of the training speakers
    probe_test_speakers: int = 12
    min_seconds: float = 3.0  # approximate length of an utterance
    max_seconds: float = 9.0
    min_level: float = -34.0  # dB of full scale, RMS of an utterance
    max_level: float = -20.0
    min_snr: float = -2.0  # dB, of the noisy probe sets
    max_snr: float = 8.0


@dataclass(frozen=True)
class Utterance:
    """A synthetic recording and its labels."""

    audio: np.ndarray  # [N] float32, within (-1, 1)
    speaker: str
    score: Score

    @property
    def phones(self) -> list[tuple[str, float, float]]:
        """(phone, start, end) in seconds, contiguous."""
        ends = np.cumsum([ms for _, ms in self.score.phones]) / 1000
        starts = [0.0, *ends[:-1].tolist()]
        return [(name, a, b) for (name, _), a, b in zip(self.score.phones, starts, ends.tolist(), strict=True)]


def _to_level(audio: np.ndarray, decibel: float) -> np.ndarray:
    """Scale to this RMS level in dB of full scale, or lower so that no peak exceeds 0.9."""
    gain = 10.0 ** (decibel / 20.0) / max(float(np.sqrt(np.mean(audio**2))), 1e-9)
    return np.asarray(audio * min(gain, 0.9 / max(float(np.abs(audio).max()), 1e-9)))


def synthesise(spec: CorpusSpec, split: str, index: int, speaker_index: int) -> Utterance:
    """Utterance ``index`` of a split, spoken by ``speaker_index``; it depends on these four values only."""
    who = speaker(spec.seed, speaker_index)
    rng = generator(spec.seed, f"utterance/{split}", index)
    score = compose(rng, who, rng.uniform(spec.min_seconds, spec.max_seconds))
    audio = render(rng, who, tracks(rng, who, score))
    background = coloured(rng, len(audio), rng.uniform(0.3, 1.5))
    background *= 10.0 ** (rng.uniform(-50.0, -34.0) / 20.0) / float(np.sqrt(np.mean(background**2)))
    return Utterance(_to_level(audio + background, rng.uniform(spec.min_level, spec.max_level)), who.name, score)


def _in_noise(spec: CorpusSpec, split: str, index: int, audio: np.ndarray) -> tuple[np.ndarray, str, float]:
    """The utterance in noise: the mixture, the kind of noise, and the signal-to-noise ratio in dB."""
    rng = generator(spec.seed, f"noisy/{split}", index)
    kind, ratio = KINDS[index % len(KINDS)], float(rng.uniform(spec.min_snr, spec.max_snr))
    loudness = float(np.sqrt(np.mean(audio**2))) * 10.0 ** (-ratio / 20.0)
    mixture = audio + loudness * noise(rng, kind, len(audio))
    return mixture * min(1.0, 0.9 / float(np.abs(mixture).max())), kind, round(ratio, 2)


def _write_manifest(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    _write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path, len(text), replaces=anything) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _clips(out: Path, splits: Iterable[str]) -> list[str]:
    """The audio files in the manifests of these splits."""
    lines = (line for split in splits for line in (out / f"{split}.jsonl").read_text("utf-8").splitlines())
    return [json.loads(line)["audio_filepath"] for line in lines]


def _entry(out_dir: Path, split: str, index: int, audio: np.ndarray, **known: Any) -> dict[str, Any]:
    """Write an audio file and return its manifest line."""
    name = f"wav/{split}/{index:05d}.wav"
    (out_dir / name).parent.mkdir(parents=True, exist_ok=True)
    write_wav(out_dir / name, np.rint(audio * 32767.0).astype(np.int16), SAMPLE_RATE)
    return {"audio_filepath": name, "duration": len(audio) / SAMPLE_RATE, **known}


def _utterances(spec: CorpusSpec, split: str, minutes: float, speakers: range) -> Iterator[tuple[int, Utterance]]:
    """Yield numbered utterances, with the speakers in turn, until they last ``minutes``."""
    seconds, index = 0.0, 0
    while seconds < 60.0 * minutes:
        made = synthesise(spec, split, index, speakers[index % len(speakers)])
        yield index, made
        seconds, index = seconds + len(made.audio) / SAMPLE_RATE, index + 1


def _write_speech(spec: CorpusSpec, out: Path, split: str, minutes: float, speakers: range, noisy: bool) -> list[str]:
    """Write one speech split and, if ``noisy``, its noisy version; return the names of the splits."""
    clean: list[dict[str, Any]] = []
    mixed: list[dict[str, Any]] = []
    for index, made in _utterances(spec, split, minutes, speakers):
        known = {"speaker": made.speaker, "text": made.score.text, "phones": made.phones}
        clean.append(_entry(out, split, index, made.audio, **known))
        if noisy:
            mixture, kind, ratio = _in_noise(spec, split, index, made.audio)
            mixed.append(_entry(out, f"{split}_noisy", index, mixture, noise=kind, snr=ratio, **known))
    _write_manifest(out / f"{split}.jsonl", clean)
    if noisy:
        _write_manifest(out / f"{split}_noisy.jsonl", mixed)
    return [split, f"{split}_noisy"] if noisy else [split]


def _write_noise(spec: CorpusSpec, out: Path) -> None:
    """Write noise clips of 10 s, with the kinds in turn, at random levels."""
    entries = []
    for index in range(max(len(KINDS), round(6 * spec.noise_minutes))):
        rng = generator(spec.seed, "noise", index)
        kind = KINDS[index % len(KINDS)]
        clip = _to_level(noise(rng, kind, 10 * SAMPLE_RATE), rng.uniform(spec.min_level, spec.max_level))
        entries.append(_entry(out, "noise", index, clip, noise=kind))
    _write_manifest(out / "noise.jsonl", entries)


def write_corpus(out_dir: str | Path, spec: CorpusSpec | None = None, *, overwrite: bool = False) -> dict[str, Path]:
    """Write the corpus under ``out_dir`` and return its manifests by split. A complete corpus is not written again.

    ``corpus.json``, written last, holds the specification. Raises ``OutputError`` if the folder holds anything else.
    """
    spec = spec or CorpusSpec()
    out, settings = Path(out_dir), {"format": _FORMAT, **dataclasses.asdict(spec)}
    splits = ["train", "valid", "noise", "probe_train", "probe_train_noisy", "probe_test", "probe_test_noisy"]
    place = claim(out, {"command": "data synth", **settings}, folder=True, overwrite=overwrite)
    if place.done:
        return {split: out / f"{split}.jsonl" for split in splits}
    begin(place)
    valid_from = spec.train_speakers
    test_from = valid_from + spec.valid_speakers
    _write_speech(spec, out, "train", spec.train_minutes, range(spec.train_speakers), noisy=False)
    _write_speech(spec, out, "valid", spec.valid_minutes, range(valid_from, test_from), noisy=False)
    probe_speakers = range(min(spec.probe_train_speakers, spec.train_speakers))
    _write_speech(spec, out, "probe_train", spec.probe_train_minutes, probe_speakers, noisy=True)
    test_speakers = range(test_from, test_from + spec.probe_test_speakers)
    _write_speech(spec, out, "probe_test", spec.probe_test_minutes, test_speakers, noisy=True)
    _write_noise(spec, out)
    _write_text(out / "corpus.json", json.dumps(settings, indent=2) + "\n")
    finish(place, [f"{split}.jsonl" for split in splits] + _clips(out, splits) + ["corpus.json"])
    return {split: out / f"{split}.jsonl" for split in splits}

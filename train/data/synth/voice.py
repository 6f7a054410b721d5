"""From words to one speaker's control signals: durations, pitch, formant and level tracks on a grid of 1 ms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .keys import generator
from .lexicon import lexicon, sentence
from .phones import OFF, PHONES, SILENCE, Phone, Segment

_FORMANT_GLIDE = 111  # ms over which formants move between targets: coarticulation, and undershoot in short phones
_LEVEL_GLIDE = 11  # ms over which a source is switched on or off


@dataclass(frozen=True)
class Speaker:
    """The constant properties of one speaker."""

    name: str
    f0: float  # Hz, geometric mean of the pitch
    f0_range: float  # standard deviation of log pitch over accents
    declination: float  # fall of log pitch over a phrase
    jitter: float  # relative change of the period from pulse to pulse
    tract: float  # factor on all formants: above 1 for a short vocal tract
    formant_shape: tuple[float, float, float]  # factors on single formants: no two vocal tracts are scaled copies
    rate: float  # factor on durations
    tilt: float  # pole of the glottal source: nearer 1 is a duller voice
    breath: float  # dB, breath noise relative to the voice in every voiced sound


def speaker(seed: int, index: int) -> Speaker:
    """Speaker ``index`` of the population of this seed; pitch and vocal tract length are correlated."""
    rng = generator(seed, "speaker", index)
    size = rng.uniform(-1.0, 1.0)  # from large and low-pitched to small and high-pitched
    shape = np.exp(0.025 * rng.standard_normal(3))
    return Speaker(
        name=f"synth-{index:04d}",
        f0=float(145.0 * np.exp(0.42 * size + 0.10 * rng.standard_normal())),
        f0_range=float(rng.uniform(0.06, 0.16)),
        declination=float(rng.uniform(0.10, 0.30)),
        jitter=float(rng.uniform(0.004, 0.015)),
        tract=float(1.03 * np.exp(0.13 * size + 0.02 * rng.standard_normal())),
        formant_shape=(float(shape[0]), float(shape[1]), float(shape[2])),
        rate=float(np.exp(0.10 * rng.standard_normal())),
        tilt=float(rng.uniform(0.84, 0.95)),
        breath=float(rng.uniform(-36.0, -22.0)),
    )


@dataclass(frozen=True)
class Score:
    """The content of an utterance: text, and contiguous phones with durations in ms."""

    text: str
    phones: tuple[tuple[str, int], ...]  # (name, ms)
    stress: tuple[float, ...]  # of each phone: 0 none, 1 accented


def compose(rng: np.random.Generator, who: Speaker, seconds: float) -> Score:
    """Compose sentences that last about ``seconds`` in all, with pauses, at the speaker's rate."""
    book = lexicon()
    text: list[str] = []
    phones: list[tuple[str, int]] = [(SILENCE, int(rng.integers(60, 200)))]
    stress: list[float] = [0.0]
    while sum(ms for _, ms in phones) < 1000 * seconds - 1500:
        words = sentence(rng, join=bool(text))
        for place, word in enumerate(words):
            text.append(book.words[word])
            accented = float(rng.random() < 0.6) * len(book.phones[word]) / 4
            last = place == len(words) - 1
            for name in book.phones[word]:
                stretch = (1.25 if last else 1.0) * (1.0 + 0.15 * accented * PHONES[name].syllabic)
                ms = 1000 * PHONES[name].seconds * who.rate * stretch * np.exp(0.12 * rng.standard_normal())
                phones.append((name, max(35, int(ms))))
                stress.append(accented if PHONES[name].syllabic else 0.0)
        phones.append((SILENCE, int(rng.integers(80, 350))))
        stress.append(0.0)
    return Score(" ".join(text), tuple(phones), tuple(stress))


@dataclass(frozen=True)
class Tracks:
    """Control signals, one value per millisecond. Levels are amplitudes (1 is 0 dB)."""

    f0: np.ndarray  # [ms] Hz
    formants: np.ndarray  # [ms, 3] Hz
    damping: np.ndarray  # [ms]
    voice: np.ndarray  # [ms]
    breath: np.ndarray  # [ms]
    hiss: np.ndarray  # [ms]
    hiss_centre: np.ndarray  # [ms] Hz
    hiss_width: np.ndarray  # [ms] Hz


def _smooth(track: np.ndarray, ms: int) -> np.ndarray:
    """Smooth by a Hann window of ``ms`` (odd), with the edge values repeated: ``[n] -> [n]``."""
    kernel = np.hanning(ms + 2)[1:-1]
    return np.convolve(np.pad(track, ms // 2, mode="edge"), kernel / kernel.sum(), mode="valid")


def _segments(score: Score) -> tuple[list[Segment], np.ndarray, np.ndarray]:
    """Segments of all phones in order, the ms of each, and the phone that each belongs to."""
    segments: list[Segment] = []
    lengths: list[int] = []
    owners: list[int] = []
    for i, (name, ms) in enumerate(score.phones):
        phone: Phone = PHONES[name]
        edges = np.rint(ms * np.cumsum([0.0, *(s.fraction for s in phone.segments)])).astype(int)
        segments += phone.segments
        lengths += np.diff(edges).tolist()
        owners += [i] * len(phone.segments)
    return segments, np.array(lengths), np.array(owners)


def _fill(values: Sequence[tuple[float, ...] | None], default: tuple[float, ...]) -> np.ndarray:
    """Replace None by the next value that is set, else by the last one: ``[S]`` of tuples -> ``[S, P]``."""
    filled = list(values)
    for i in range(len(filled) - 2, -1, -1):
        filled[i] = filled[i] if filled[i] is not None else filled[i + 1]
    for i in range(len(filled)):
        filled[i] = filled[i] if filled[i] is not None else (filled[i - 1] if i else default)
    return np.array(filled, dtype=np.float64)


def _melody(rng: np.random.Generator, who: Speaker, score: Score) -> np.ndarray:
    """Pitch in Hz, ``[ms]``: it falls over each phrase, rises at accents, and drifts."""
    lengths = np.array([ms for _, ms in score.phones])
    ends = np.cumsum(lengths)
    log_f0 = 0.02 * _smooth(rng.standard_normal(ends[-1]), 151) * 8.0
    pauses = [i for i, (name, _) in enumerate(score.phones) if name == SILENCE]
    for start, stop in pairwise(pauses):
        a, b = ends[start], ends[stop]
        log_f0[a:b] += who.declination * np.linspace(0.5, -0.5, b - a)
    accents = np.zeros(ends[-1])
    for end, length, stress in zip(ends, lengths, score.stress, strict=True):
        accents[end - length : end] = stress * who.f0_range * (1.0 + 0.5 * rng.standard_normal())
    return np.asarray(who.f0 * np.exp(log_f0 + _smooth(accents, 121)))


def tracks(rng: np.random.Generator, who: Speaker, score: Score) -> Tracks:
    """The control signals for ``who`` speaking ``score``."""
    segments, lengths, owners = _segments(score)

    def step(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, lengths)

    formants = _fill([s.formants for s in segments], (500.0, 1500.0, 2500.0))
    formants = formants * who.tract * np.array(who.formant_shape)
    hiss = [(s.hiss_centre, s.hiss_width) if s.hiss_centre and s.hiss_width else None for s in segments]
    shape = _fill(hiss, (4000.0, 2000.0))
    emphasis = 1.5 * rng.standard_normal(len(score.phones))[owners]  # dB; repeated phones differ in level
    voice = np.array([s.voice for s in segments]) + emphasis
    breath = np.maximum([s.breath for s in segments], np.where(voice > OFF + 50.0, voice + who.breath, OFF))
    noise = np.array([s.hiss for s in segments]) + emphasis

    def level(decibel: np.ndarray) -> np.ndarray:
        amplitude = np.where(decibel < OFF + 50.0, 0.0, 10.0 ** (decibel / 20.0))
        return _smooth(step(amplitude), _LEVEL_GLIDE)

    return Tracks(
        f0=_melody(rng, who, score),
        formants=np.stack([_smooth(step(column), _FORMANT_GLIDE) for column in formants.T], axis=1),
        damping=_smooth(step(np.array([s.damping for s in segments])), _LEVEL_GLIDE),
        voice=level(voice),
        breath=level(breath),
        hiss=level(noise),
        hiss_centre=step(shape[:, 0]) * np.sqrt(who.tract),
        hiss_width=step(shape[:, 1]),
    )

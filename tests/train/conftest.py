"""A small corpus of made-up speech for the tests that train."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.corpus.manifest import write_manifest

from .faults import entries, write_entries


class Corpus(NamedTuple):
    """Manifests, as paths."""

    train: str
    valid: str
    noise: str
    rir: str


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Half a minute in 24 utterances, 4 to validate, 3 noises, 2 rooms."""
    folder = tmp_path_factory.mktemp("corpus")
    make = np.random.Generator(np.random.Philox(7))

    def write(name: str, clips: list[NDArray[np.int16]]) -> str:
        for number, clip in enumerate(clips):
            write_wav(folder / f"{name}{number}.wav", clip)
        entries = [{"audio_filepath": f"{name}{n}.wav", "duration": len(clip) / 16000} for n, clip in enumerate(clips)]
        write_manifest(folder / f"{name}.jsonl", entries)
        return str(folder / f"{name}.jsonl")

    def room() -> NDArray[np.int16]:
        response = make.normal(0, 3000, 800) * np.exp(-np.arange(800) / 100)
        response[20] = 20000
        return response.clip(-32767, 32767).astype(np.int16)

    return Corpus(
        write("train", [voice(make, 1.0 + 0.125 * (number % 9)) for number in range(24)]),
        write("valid", [voice(make, seconds) for seconds in (1.5, 2.0, 1.25, 1.0)]),
        write("noise", [make.normal(0, 800, int(s * 16000)).astype(np.int16) for s in (1.0, 3.0, 0.5)]),
        write("rir", [room(), room()]),
    )


def voice(make: np.random.Generator, seconds: float) -> NDArray[np.int16]:
    """Harmonics of a gliding pitch under two syllables a second."""
    time = np.arange(round(seconds * 16000)) / 16000
    phase = 2 * np.pi * np.cumsum(make.uniform(90, 200) * (1 + 0.2 * np.sin(2 * np.pi * time))) / 16000
    sound = sum(np.sin(k * phase + make.uniform(0, 6)) / k for k in range(1, 12))
    return (1500 * sound * (0.1 + np.sin(2 * np.pi * time) ** 2) + make.normal(0, 20, len(time))).astype(np.int16)


@pytest.fixture
def six(tmp_path: Path) -> Path:
    """Six whole utterances a0.wav..a5.wav of 1.5 s with their manifest."""
    make = np.random.Generator(np.random.Philox(1))
    for number in range(6):
        write_wav(tmp_path / f"a{number}.wav", voice(make, 1.5))
    write_entries(tmp_path, entries())
    return tmp_path

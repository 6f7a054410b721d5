"""The fault catalogue (docs/faults.md), part A: audio. What a person who has one of these faults is told.

Each case breaks one thing in a corpus that is otherwise whole. The command ends with the exit code of its kind and with
one message that names the file and line; nothing is left half done.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.dataset import batches, open_dataset
from nest_fn.train.data.transfer import to_device
from nest_fn.train.step.step import init_train_state, make_step
from tests.train.conftest import voice
from tests.train.faults import Captured, config_of, entries, refused, train, write_entries
from tests.train.run.test_pretrain import metrics

CPU = torch.device("cpu")


def _float_wav(path: Path, values: np.ndarray) -> None:
    data = values.astype("<f4").tobytes()
    form = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def _header(path: Path, place: int, value: int) -> None:
    """Another number in the header."""
    content = bytearray(path.read_bytes())
    content[place : place + 4] = struct.pack("<I", value)
    path.write_bytes(content)


STEREO = np.full((24000, 2), 100, np.int16)
AUDIO: dict[str, tuple[Callable[[Path], Any], str]] = {
    "A1 missing": (Path.unlink, "no such file: a2.wav; looked for {path}"),
    "A2 empty": (lambda path: path.write_bytes(b""), "{path}.*0 bytes"),
    "A2 text": (lambda path: path.write_text("this is no audio"), "{path}.*(not a WAV file|cannot be decoded)"),
    "A2 header alone": (lambda path: path.write_bytes(path.read_bytes()[:44]), "{path}"),
    "A2 cut header": (lambda path: path.write_bytes(path.read_bytes()[:30]), "{path}.*chunk"),
    "A3 cut": (lambda path: path.write_bytes(path.read_bytes()[:16000]), "{path}"),
    "A6 rate 0": (lambda path: _header(path, 24, 0), "{path}.*0 Hz"),
    "A7 NaN": (lambda path: _float_wav(path, np.where(np.arange(24000) == 777, np.nan, 0.1)), "{path}.*NaN"),
    "A7 infinite": (lambda path: _float_wav(path, np.where(np.arange(24000) == 777, -np.inf, 0.1)), "{path}.*inf"),
    "A9 stereo": (lambda path: write_wav(path, STEREO), "{path}.*2 channels.*data.channel"),
}


@pytest.mark.parametrize("case", AUDIO)
def test_audio(six: Path, capsys: Captured, case: str) -> None:
    spoil, words = AUDIO[case]
    path = six / "a2.wav"
    spoil(path)
    place = re.escape(str(six / "m.jsonl")) + ":3: "
    refused(six, capsys, 3, place + ".*" * (not words.startswith("no such")) + words.format(path=re.escape(str(path))))


@pytest.mark.parametrize("keep", [200, 4000, 20000])
def test_a4_cut_flac(six: Path, capsys: Captured, keep: int) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the optional package soundfile reads FLAC")
    make = np.random.Generator(np.random.Philox(2))
    soundfile.write(six / "a2.flac", make.integers(-9000, 9000, 24000).astype(np.int16), 16000)
    (six / "a2.flac").write_bytes((six / "a2.flac").read_bytes()[:keep])
    write_entries(six, [e if n != 2 else e | {"audio_filepath": "a2.flac"} for n, e in enumerate(entries())])
    refused(six, capsys, 3, r"m\.jsonl:3: .*a2\.flac")


@pytest.mark.parametrize("size", [0xFFFFFFF0, 0x70000000])
def test_a6_a_size_above_the_files_is_what_is_there(six: Path, size: int) -> None:
    _header(six / "a2.wav", 40, size)
    assert train(six) == 0


def test_a8_clipping_is_counted(six: Path, capsys: Captured) -> None:
    write_wav(six / "a2.wav", np.where(np.arange(24000) % 20 < 3, 32767, 0).astype(np.int16))
    assert main(["data", "stats", str(six / "m.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clipped"] == 1 and found["clipped_share"] == pytest.approx(0.15 / 6)


@pytest.mark.parametrize("channel", ["mix", "first", "1"])
def test_a9_a_channel_can_be_chosen(six: Path, channel: str) -> None:
    write_wav(six / "a2.wav", STEREO)
    assert train(six, f"data.channel={'first' if channel == '1' else channel}") == 0


def test_a10_sample_rates(six: Path, capsys: Captured) -> None:
    write_wav(six / "a2.wav", voice(np.random.Generator(np.random.Philox(3)), 1.5).repeat(3)[:66150], 44100)
    assert main(["data", "stats", str(six / "m.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["sample_rates"] == {"16000": 5, "44100": 1}
    assert train(six) == 0
    (six / "b").mkdir()
    refused(six, capsys, 3, r"m\.jsonl:3: .*a2\.wav.*44100 Hz", "data.resample=false", f"--folder={six / 'b'}")


def test_a11_silence_is_finite_and_counted(six: Path, capsys: Captured) -> None:
    for number in range(6):
        write_wav(six / f"a{number}.wav", np.zeros(24000, np.int16))
    assert main(["data", "stats", str(six / "m.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["silent"] == 6
    assert train(six, "trainer.log_every=1", "masking.mask_prob=0.05") == 0
    assert all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in metrics(six / "run"))


@settings(max_examples=12)
@given(st.data())
def test_a13_any_length_gives_a_target(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """From one sample to two seconds."""
    samples = data.draw(st.lists(st.integers(1, 32000), min_size=1, max_size=4, unique=True))
    folder = tmp_path_factory.mktemp("short")
    for count in samples:
        write_wav(folder / f"{count}.wav", np.full(count, 1000, np.int16) * np.int16([1, -1])[np.arange(count) % 2])
    write_entries(folder, [{"audio_filepath": f"{count}.wav", "duration": count / 16000} for count in samples])
    cfg = config_of(folder, f"data.short_audio={data.draw(st.sampled_from(['pad', 'repeat']))}")
    ts = init_train_state(random.key(0), cfg)
    for raw in batches(open_dataset(cfg.data, 0), epochs=1):
        ts, told = make_step(cfg)(ts, [to_device(raw, CPU)], random.key(1))
        assert int(told["valid_tokens"]) >= int((raw["weight"] > 0).sum())
    assert all(bool(leaf.isfinite().all()) for leaf in flatten(ts.params).values())


def test_a14_nothing_masked_is_no_loss_and_no_gradient(six: Path) -> None:
    cfg = config_of(six, "masking.mask_prob=0", "optim.weight_decay=0")
    ts = init_train_state(random.key(0), cfg)
    new, told = make_step(cfg)(ts, [to_device(next(batches(open_dataset(cfg.data, 0))), CPU)], random.key(1))
    assert int(told["masked_tokens"]) == 0 < int(told["valid_tokens"])
    assert float(told["loss_sum"]) == 0 and float(told["grad_norm"]) == 0
    assert all(torch.equal(leaf, flatten(new.params)[path]) for path, leaf in flatten(ts.params).items())


def test_a15_a_long_file_is_left_out_and_the_largest_batch_tried(six: Path, capsys: Captured) -> None:
    write_entries(six, [*entries(), {"audio_filepath": "a5.wav", "duration": 3600, "offset": 0}])
    assert train(six, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "left out: 1 longer than max_duration=8.0 s" in told and "largest batch" in told and "peak memory" in told
    assert train(six) == 0
    assert "left out: 1 utterances longer than max_duration=8.0 s" in capsys.readouterr().err


def test_a16_everything_dropped_says_why(six: Path, capsys: Captured) -> None:
    write_entries(six, [entry | {"duration": 0.1 if n < 2 else 9.0} for n, entry in enumerate(entries())])
    limits = ["data.min_duration=0.5", "data.max_duration=8"]
    refused(
        six, capsys, 3, r"all 6 utterances were dropped: 2 shorter than min_duration=0\.5 s, 4 longer than", *limits
    )


def test_the_catalogue_names_tests_that_exist() -> None:
    root = Path(__file__).resolve().parents[3]
    text = (root / "docs" / "faults.md").read_text()
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 60
    missing = [pair for pair in named if f"def {pair[1]}(" not in (root / "tests" / pair[0]).read_text()]
    assert not missing
    rows = re.findall(r"^\| ([A-H])(\d+) \|", text, re.MULTILINE)
    counts = Counter(letter for letter, _ in rows)
    assert list(counts) == list("ABCDEFGH")
    assert rows == [(letter, str(n)) for letter, count in counts.items() for n in range(1, count + 1)]

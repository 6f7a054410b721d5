"""The fault catalogue (docs/faults.md, A-C) at the command line: what a person who has one of them is told.

Each case breaks one thing in a corpus that is otherwise whole. The command ends with the exit code of its kind and with
one message that names the file and line, or the key; nothing is left half done.
"""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.train.cli import main
from nest_fn.train.data import batches, open_dataset
from nest_fn.train.micro_batches import to_device
from nest_fn.train.step import init_train_state, make_step
from nest_fn.train.wav import write_wav

from .conftest import voice
from .test_pretrain import metrics

Captured = pytest.CaptureFixture[str]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six whole utterances a0.wav..a5.wav of 1.5 s with their manifest."""
    make = np.random.Generator(np.random.Philox(1))
    for number in range(6):
        write_wav(tmp_path / f"a{number}.wav", voice(make, 1.5))
    _write_manifest(tmp_path, _entries())
    return tmp_path


def _entries() -> list[dict[str, Any]]:
    return [{"audio_filepath": f"a{number}.wav", "duration": 1.5} for number in range(6)]


def _write_manifest(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "m.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def _train(folder: Path, *overrides: str, steps: int = 2) -> int:
    small = ["encoder.n_layers=1", "encoder.subsampling_conv_channels=8", "data.batch_seconds=8", "data.max_duration=8"]
    return main(["pretrain", "-c", "tiny", "--run", str(folder / "run"), f"data.train={folder / 'm.jsonl'}",
                 f"trainer.max_steps={steps}", "trainer.save_every=2", *small, *overrides])  # fmt: skip


def _refused(folder: Path, captured: Captured, code: int, pattern: str, *overrides: str) -> None:
    """Training ends with one message of this pattern."""
    assert _train(folder, *overrides) == code
    told = captured.readouterr().err
    assert told.count("error: ") == 1 and "Traceback" not in told
    assert re.search(pattern, told, re.DOTALL), told
    assert not (folder / "run" / "lock").exists()


# A: audio ------------------------------------------------------------------------------------------------------------


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
def test_audio(folder: Path, capsys: Captured, case: str) -> None:
    spoil, words = AUDIO[case]
    path = folder / "a2.wav"
    spoil(path)
    place = re.escape(str(folder / "m.jsonl")) + ":3: "
    _refused(
        folder, capsys, 3, place + ".*" * (not words.startswith("no such")) + words.format(path=re.escape(str(path)))
    )


@pytest.mark.parametrize("keep", [200, 4000, 20000])
def test_a4_cut_flac(folder: Path, capsys: Captured, keep: int) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the optional package soundfile reads FLAC")
    make = np.random.Generator(np.random.Philox(2))
    soundfile.write(folder / "a2.flac", make.integers(-9000, 9000, 24000).astype(np.int16), 16000)
    (folder / "a2.flac").write_bytes((folder / "a2.flac").read_bytes()[:keep])
    _write_manifest(folder, [e if n != 2 else e | {"audio_filepath": "a2.flac"} for n, e in enumerate(_entries())])
    _refused(folder, capsys, 3, r"m\.jsonl:3: .*a2\.flac")


@pytest.mark.parametrize("size", [0xFFFFFFF0, 0x70000000])
def test_a6_a_size_above_the_files_is_what_is_there(folder: Path, size: int) -> None:
    _header(folder / "a2.wav", 40, size)
    assert _train(folder) == 0


def test_a8_clipping_is_counted(folder: Path, capsys: Captured) -> None:
    write_wav(folder / "a2.wav", np.where(np.arange(24000) % 20 < 3, 32767, 0).astype(np.int16))
    assert main(["data", "stats", str(folder / "m.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["clipped"] == 1 and found["clipped_share"] == pytest.approx(0.15 / 6)


@pytest.mark.parametrize("channel", ["mix", "first", "1"])
def test_a9_a_channel_can_be_chosen(folder: Path, channel: str) -> None:
    write_wav(folder / "a2.wav", STEREO)
    assert _train(folder, f"data.channel={'first' if channel == '1' else channel}") == 0


def test_a10_sample_rates(folder: Path, capsys: Captured) -> None:
    write_wav(folder / "a2.wav", voice(np.random.Generator(np.random.Philox(3)), 1.5).repeat(3)[:66150], 44100)
    assert main(["data", "stats", str(folder / "m.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["sample_rates"] == {"16000": 5, "44100": 1}
    assert _train(folder) == 0
    (folder / "b").mkdir()
    _refused(folder, capsys, 3, r"m\.jsonl:3: .*a2\.wav.*44100 Hz", "data.resample=false", f"--run={folder / 'b'}")


def test_a11_silence_is_finite_and_counted(folder: Path, capsys: Captured) -> None:
    for number in range(6):
        write_wav(folder / f"a{number}.wav", np.zeros(24000, np.int16))
    assert main(["data", "stats", str(folder / "m.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["silent"] == 6
    assert _train(folder, "trainer.log_every=1", "masking.mask_prob=0.05") == 0
    assert all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in metrics(folder / "run"))


def _config(folder: Path, *overrides: str) -> Config:
    tiny = ["encoder.n_layers=1", "encoder.subsampling_conv_channels=8", "data.min_duration=0", "data.max_duration=8"]
    return Config.preset("tiny", [f"data.train={folder / 'm.jsonl'}", *tiny, *overrides])


@settings(max_examples=12)
@given(st.data())
def test_a13_any_length_gives_a_target(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """From one sample to two seconds."""
    samples = data.draw(st.lists(st.integers(1, 32000), min_size=1, max_size=4, unique=True))
    folder = tmp_path_factory.mktemp("short")
    for count in samples:
        write_wav(folder / f"{count}.wav", np.full(count, 1000, np.int16) * np.int16([1, -1])[np.arange(count) % 2])
    _write_manifest(folder, [{"audio_filepath": f"{count}.wav", "duration": count / 16000} for count in samples])
    cfg = _config(folder, f"data.short_audio={data.draw(st.sampled_from(['pad', 'repeat']))}")
    ts = init_train_state(random.key(0), cfg)
    for raw in batches(open_dataset(cfg.data, 0), epochs=1):
        ts, told = make_step(cfg)(ts, [to_device(raw, CPU)], random.key(1))
        assert int(told["valid_tokens"]) >= int((raw["weight"] > 0).sum())
    assert all(bool(leaf.isfinite().all()) for leaf in flatten(ts.params).values())


def test_a14_nothing_masked_is_no_loss_and_no_gradient(folder: Path) -> None:
    cfg = _config(folder, "masking.mask_prob=0", "optim.weight_decay=0")
    ts = init_train_state(random.key(0), cfg)
    new, told = make_step(cfg)(ts, [to_device(next(batches(open_dataset(cfg.data, 0))), CPU)], random.key(1))
    assert int(told["masked_tokens"]) == 0 < int(told["valid_tokens"])
    assert float(told["loss_sum"]) == 0 and float(told["grad_norm"]) == 0
    assert all(torch.equal(leaf, flatten(new.params)[path]) for path, leaf in flatten(ts.params).items())


def test_a15_a_long_file_is_left_out_and_the_largest_batch_tried(folder: Path, capsys: Captured) -> None:
    _write_manifest(folder, [*_entries(), {"audio_filepath": "a5.wav", "duration": 3600, "offset": 0}])
    assert _train(folder, "--dry-run") == 0
    told = capsys.readouterr().out
    assert "left out: 1 longer than max_duration=8.0 s" in told and "largest batch" in told and "peak memory" in told
    assert _train(folder) == 0
    assert "left out: 1 utterances longer than max_duration=8.0 s" in capsys.readouterr().err


def test_a16_everything_dropped_says_why(folder: Path, capsys: Captured) -> None:
    _write_manifest(folder, [entry | {"duration": 0.1 if n < 2 else 9.0} for n, entry in enumerate(_entries())])
    limits = ["data.min_duration=0.5", "data.max_duration=8"]
    _refused(
        folder, capsys, 3, r"all 6 utterances were dropped: 2 shorter than min_duration=0\.5 s, 4 longer than", *limits
    )


# B: manifests and archives --------------------------------------------------------------------------------------------

LINES: dict[str, tuple[str, str]] = {
    "B1 not JSON": ("{nonsense}", "JSON"),
    "B1 cut": ('{"audio_filepath": "a2.wav", "dur', "JSON"),
    "B1 no object": ('["a2.wav", 1.5]', "object"),
    "B1 twice": ('{"audio_filepath": "a1.wav", "duration": 1.5}', r"stands already in .*m\.jsonl:2"),
    "B2 no path": ('{"duration": 1.5}', "audio_filepath"),
    "B2 path of another type": ('{"audio_filepath": 7, "duration": 1.5}', "audio_filepath is int"),
    "B2 negative": ('{"audio_filepath": "a2.wav", "duration": -1}', "duration -1.0 is not positive"),
    "B2 words": ('{"audio_filepath": "a2.wav", "duration": "long"}', "duration 'long' is not a number"),
    "B2 NaN": ('{"audio_filepath": "a2.wav", "duration": NaN}', "nan"),
    "B2 a list": ('{"audio_filepath": "a2.wav", "duration": [1.5]}', "duration is list"),
    "B3 beyond the end": ('{"audio_filepath": "a2.wav", "duration": 1.5, "offset": 100}', r"a2\.wav"),
    "B3 without a duration": ('{"audio_filepath": "a2.wav", "offset": 100}', "beyond 1.500 s"),
}


@pytest.mark.parametrize("case", LINES)
def test_manifest(folder: Path, capsys: Captured, case: str) -> None:
    line, words = LINES[case]
    lines = (folder / "m.jsonl").read_text().splitlines()
    (folder / "m.jsonl").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    _refused(folder, capsys, 3, rf"m\.jsonl:3: .*{words}")


def test_b1_all_bad_lines_are_told_at_once(folder: Path, capsys: Captured) -> None:
    (folder / "m.jsonl").write_text("".join(f"bad {n}\n" for n in range(30)))
    _refused(folder, capsys, 3, r"30 problems\n.*m\.jsonl:1: .*m\.jsonl:20: .*and 10 more")


def test_b1_windows_lines_blank_lines_and_a_byte_order_mark(folder: Path) -> None:
    text = (folder / "m.jsonl").read_text().replace("\n", "\r\n\r\n")
    (folder / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert _train(folder) == 0


def test_b2_numbers_in_quotes_and_missing_durations(folder: Path) -> None:
    durations: list[Any] = ["1.5", None, 1.5, 1.5, 1.5, "1.50"]
    _write_manifest(folder, [e | {"duration": d} for e, d in zip(_entries(), durations, strict=True)])
    assert _train(folder) == 0


def test_b4_data_that_changed_between_save_and_resume(folder: Path, capsys: Captured) -> None:
    assert _train(folder) == 0
    capsys.readouterr()
    _write_manifest(folder, _entries()[:5])
    more = "trainer.max_steps=4"
    _refused(folder, capsys, 4, "data: the manifests or the batching are not those of the checkpoint", more)
    assert _train(folder, more, "--allow-changes") == 0
    assert "the run is no longer one: data" in capsys.readouterr().err


def test_b4_data_that_moved_is_the_same_data(folder: Path, capsys: Captured) -> None:
    assert _train(folder) == 0
    moved = folder / "moved"
    moved.mkdir()
    for path in [*folder.glob("*.wav"), folder / "m.jsonl"]:
        path.rename(moved / path.name)
    assert _train(folder, f"data.train={moved / 'm.jsonl'}", "trainer.max_steps=4") == 0
    assert "resumed at step 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../outside.wav", "link.wav"])
def test_b5_paths_that_leave_the_data_folder(folder: Path, capsys: Captured, name: str) -> None:
    inside = folder / "inside"
    inside.mkdir()
    write_wav(folder / "outside.wav", np.ones(24000, np.int16))
    (inside / "link.wav").symlink_to(folder / "outside.wav")
    (inside / "m.jsonl").write_text(json.dumps({"audio_filepath": name, "duration": 1.5}) + "\n")
    jail = [f"data.train={inside / 'm.jsonl'}", f"data.root={inside}"]
    _refused(folder, capsys, 3, r"inside/m\.jsonl:1: .*outside of data\.root", *jail)
    assert _train(folder, jail[0]) == 0


def _tar(folder: Path, members: list[tuple[str, bytes]], link: str | None = None) -> None:
    with tarfile.open(folder / "audio_0.tar", "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link is not None:
            info = tarfile.TarInfo("link.wav")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)


@pytest.mark.parametrize("case", ["absolute", "above", "link", "twice", "missing", "cut"])
def test_b5_b6_archives(folder: Path, capsys: Captured, case: str) -> None:
    members = [(f"a{number}.wav", (folder / f"a{number}.wav").read_bytes()) for number in range(6)]
    wicked = {"absolute": [("/etc/a.wav", b"x")], "above": [("../a.wav", b"x")], "twice": members[:1]}
    _tar(folder, members[case == "missing" :] + wicked.get(case, []), "/etc/passwd" if case == "link" else None)
    archive = folder / "audio_0.tar"
    if case == "cut":
        archive.write_bytes(archive.read_bytes()[:100_000])
    pattern = r"m\.jsonl:1: .*a0\.wav" if case == "missing" else r"audio_0\.tar"
    _refused(folder, capsys, 3, pattern, f"data.train_shards={archive}")


def test_b6_a_whole_archive_is_read(folder: Path) -> None:
    _tar(folder, [(f"a{number}.wav", (folder / f"a{number}.wav").read_bytes()) for number in range(6)])
    for number in range(6):
        (folder / f"a{number}.wav").unlink()
    assert _train(folder, f"data.train_shards={folder / 'audio_0.tar'}") == 0


# C: configuration -----------------------------------------------------------------------------------------------------

BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
YAML: dict[str, tuple[str, str]] = {
    "C1 unknown key": ("encoder: {n_layer: 3}", "unknown key 'encoder.n_layer'; did you mean 'n_layers'"),
    "C1 unknown section": ("trainr: {max_steps: 3}", "unknown key 'trainr'; did you mean 'trainer'"),
    "C2 a key twice": ("trainer:\n  seed: 1\n  seed: 2", r"c\.yaml:3: key 'seed' stands twice"),
    "C2 no is text": ("trainer: {max_steps: no}", "'trainer.max_steps'"),
    "C2 sexagesimal is text": ("trainer: {max_steps: 1:30}", "'trainer.max_steps'"),
    "C2 NaN": ("optim: {lr: .nan}", "'optim.lr'.*finite"),
    "C2 out of range": ("optim: {weight_decay: -1}", "'optim.weight_decay' must be at least 0"),
    "C3 bomb": (BOMB, r"c\.yaml:\d+: aliases grow beyond"),
    "C3 depth": ("a: " + "[" * 5000, r"c\.yaml:1: nested deeper"),
    "C3 size": ("# " + "x" * 1_100_000, "larger than 1000000 bytes"),
    "C4 tag": ("a: !!python/object/apply:os.system [true]", r"c\.yaml:1: tag .* is not allowed"),
    "C5 empty": ("", "holds nothing"),
    "C5 scalar": ("just words", "holds a str"),
    "C6 heads": ("encoder: {d_model: 30, n_heads: 4}", "'encoder.n_heads'"),
    "C6 even kernel": ("encoder: {conv_kernel_size: 8}", "'encoder.conv_kernel_size'"),
    "C6 padding": ("preprocessor: {pad_to: 12}", "'preprocessor.pad_to'"),
    "C6 block": ("masking: {block_size: 4}", "'masking.block_size'"),
}


@pytest.mark.parametrize("case", YAML)
def test_config(tmp_path: Path, capsys: Captured, case: str) -> None:
    text, pattern = YAML[case]
    (tmp_path / "c.yaml").write_text(text)
    assert main(["pretrain", "-c", str(tmp_path / "c.yaml"), "--run", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and str(tmp_path / "c.yaml") in told and "Traceback" not in told
    assert re.search(pattern, told), told
    assert not (tmp_path / "run").exists()


def test_c2_numbers_are_yaml_1_2(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "c.yaml").write_text("optim: {lr: 1e-4}\ntrainer: {seed: 010}\ndata: {root: no}\n")
    assert main(["config", "show", str(tmp_path / "c.yaml")]) == 0
    (tmp_path / "d.yaml").write_text(capsys.readouterr().out)
    cfg = Config.from_yaml(tmp_path / "d.yaml")
    assert (cfg.optim.lr, cfg.trainer.seed, cfg.data.root) == (1e-4, 10, "no")


@settings(max_examples=10)
@given(st.data())
def test_c6_a_config_that_is_accepted_trains(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("any")
    write_wav(folder / "a.wav", voice(np.random.Generator(np.random.Philox(1)), 1.5))
    _write_manifest(folder, [{"audio_filepath": "a.wav", "duration": 1.5}])
    choice = {
        "encoder.d_model": [8, 16], "encoder.n_heads": [1, 2, 4], "encoder.conv_kernel_size": [3, 9],
        "encoder.subsampling": ["dw_striding", "striding"], "encoder.subsampling_factor": [4, 8],
        "encoder.conv_norm_type": ["batch_norm", "layer_norm"], "encoder.use_bias": ["true", "false"],
        "mask_position": ["pre_conv", "post_conv"], "num_books": [1, 2], "num_classes": [16, 33],
        "masking.block_size": [8, 40], "masking.allow_overlap": ["true", "false"], "preprocessor.features": [40, 80],
        "optim.name": ["adamw", "adam", "sgd"], "trainer.precision": ["fp32", "bf16"], "trainer.clip_norm": [0, 1],
    }  # fmt: skip
    chosen = [f"{name}={data.draw(st.sampled_from(values), label=name)}" for name, values in choice.items()]
    cfg = _config(folder, "masking.mask_prob=0.05", *chosen)
    ts, raw = init_train_state(random.key(0), cfg), next(batches(open_dataset(cfg.data, 0)))
    new, told = make_step(cfg)(ts, [to_device(raw, CPU)], random.key(1))
    assert new.step == 1 and bool(told["loss_sum"].isfinite()) and bool(told["grad_norm"].isfinite())


def test_the_catalogue_names_tests_that_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs" / "faults.md").read_text()
    named = re.findall(r"`(\w+/test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 60
    missing = [pair for pair in named if f"def {pair[1]}(" not in (root / "tests" / pair[0]).read_text()]
    assert not missing
    rows = re.findall(r"^\| ([A-G]\d+) \|", text, re.MULTILINE)
    counts = {"A": 16, "B": 6, "C": 6, "D": 4, "E": 8, "F": 5, "G": 6}
    assert rows == [f"{letter}{n}" for letter, count in counts.items() for n in range(1, count + 1)]

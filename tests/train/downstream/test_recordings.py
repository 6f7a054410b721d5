"""Utterances longer than a batch, through the commands: read in parts, computed in windows, joined."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from nest_fn import Config, init, key
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.dataset import open_dataset, read_utterance
from nest_fn.train.downstream.extract import extract
from nest_fn.train.downstream.inference import Job, load_model, open_audio
from nest_fn.train.downstream.settings import inference_config
from nest_fn.train.downstream.utterance_probe import mean_features

LIMITED = ["encoder.att_context_size=[[8,4]]", "encoder.self_attention_model=rel_pos_local_attn"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of limited and of full context; a recording of 20 s, one of 44,056 Hz, a short one; a manifest."""
    folder = tmp_path_factory.mktemp("long")
    for name, overrides in (("limited", LIMITED), ("full", [])):
        cfg = Config.preset("tiny", overrides)
        checkpoint.save(folder / name, *init(key(1), cfg), cfg)
    make = np.random.default_rng(0)
    write_wav(folder / "long.wav", make.normal(0, 2000, 16000 * 20 + 99).astype(np.int16))
    soundfile.write(folder / "rate.flac", make.normal(0, 0.05, 44056 * 7), 44056)
    write_wav(folder / "short.wav", make.normal(0, 2000, 16000).astype(np.int16))
    lines = [
        {"audio_filepath": "long.wav", "offset": 0.25, "duration": 19.0, "kind": "a"},
        {"audio_filepath": "rate.flac", "kind": "b"},
        {"audio_filepath": "short.wav", "duration": 1.0, "kind": "a"},
        {"audio_filepath": "short.wav", "offset": 0.125, "duration": 0.875, "kind": "b"},
    ]
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(
    folder: Path, out: Path, *words: str, model: str = "limited", command: str = "extract"
) -> dict[str, np.ndarray]:
    """The arrays that a command wrote."""
    assert main([command, str(folder / model), str(folder / "all.jsonl"), "--out", str(out), *words]) == 0
    files = {path.stem: np.load(path) for path in sorted(out.glob("*.np?"))}
    return {f"{stem}.{name}": array for stem, held in files.items() for name, array in _items(held)}


def _items(held: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [("", held)] if isinstance(held, np.ndarray) else list(held.items())


@pytest.mark.parametrize("words", [("--layers", "all"), ("--weights", "1.0"), ("--level", "utterance")])
def test_features_of_windows_are_those_of_the_whole(folder: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    whole = run(folder, tmp_path / "whole", *words, "--batch-seconds", "60")
    parts = run(folder, tmp_path / "parts", *words, "--batch-seconds", "4")
    assert len(whole) == 4 and whole.keys() == parts.keys()
    for name, array in whole.items():
        assert parts[name].dtype == array.dtype
        np.testing.assert_allclose(parts[name], array, atol=2e-3)  # a resampled sample may round the other way
    np.testing.assert_allclose(parts["0_long."], whole["0_long."], atol=1e-4)
    assert main(["data", "validate", str(tmp_path / "parts" / "index.jsonl")]) == 0


def test_tokens_of_windows_are_those_of_the_whole(folder: Path, tmp_path: Path) -> None:
    whole = run(folder, tmp_path / "whole", command="tokenize")
    parts = run(folder, tmp_path / "parts", "--batch-seconds", "4", command="tokenize")
    assert whole.keys() == parts.keys() and {array.dtype for array in parts.values()} == {np.dtype(np.int64)}
    for name, array in whole.items():
        assert array.shape == parts[name].shape and (array == parts[name]).mean() > 0.98  # a rounding may move a choice


def test_with_full_attention_the_window_is_part_of_the_origin(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(folder, tmp_path / "out", "--batch-seconds", "5", model="full")
    assert first["0_long."].shape == (1, 238, 32) and all(np.isfinite(array).all() for array in first.values())
    again = ["extract", str(folder / "full"), str(folder / "all.jsonl"), "--out", str(tmp_path / "out")]
    assert main([*again, "--batch-seconds", "5"]) == 0
    assert main([*again, "--batch-seconds", "6"]) == 2 and "window_s was 5.0" in capsys.readouterr().err


def test_frames_that_the_encoder_reduces(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output is as long as it says, whole and in windows; layers of two rates are refused before the work."""
    reduction = ["encoder.reduction=striding", "encoder.reduction_factor=2"]
    cfg = Config.preset("tiny", [*LIMITED, *reduction])
    checkpoint.save(tmp_path / "model", *init(key(1), cfg), cfg)
    manifest = tmp_path / "all.jsonl"
    manifest.write_text(json.dumps({"audio_filepath": str(folder / "long.wav"), "duration": 19.0}) + "\n")
    made = {}
    for seconds in ("60", "4"):
        for command in ("extract", "tokenize"):
            out = tmp_path / f"{command}{seconds}"
            made[command, seconds] = run(tmp_path, out, "--batch-seconds", seconds, model="model", command=command)
        model = load_model(tmp_path / "model")
        data = inference_config("probe", cfg, [f"data.batch_seconds={seconds}"]).data
        means = mean_features(open_audio(str(manifest), cfg, data=data), model[:2], cfg)
        made["probe", seconds] = {str(layer): mean.numpy() for layer, mean in enumerate(means)}
    for command, length in (("extract", (1, 119, 32)), ("tokenize", (119, 1)), ("probe", (1, 32))):  # of 238 frames
        for name, array in made[command, "60"].items():
            assert array.shape == made[command, "4"][name].shape == length
            if command != "tokenize":
                np.testing.assert_allclose(made[command, "4"][name], array, atol=1e-4)
    words = ["extract", str(tmp_path / "model"), str(manifest), "--layers", "all", "--out", str(tmp_path / "both")]
    assert main(words) == 2 and not (tmp_path / "both").exists()
    assert "layers from 1 on have 1 frame where those before have 2" in capsys.readouterr().err


def test_probe_takes_long_utterances(folder: Path) -> None:
    manifest = str(folder / "all.jsonl")
    words = ["probe", str(folder / "limited"), "--label", "kind", "--train", manifest, "--test", manifest]
    assert main([*words, "data.batch_seconds=4"]) == 0


def test_crops_are_utterances_that_cover_the_recording(folder: Path, tmp_path: Path) -> None:
    config = Config.preset("tiny", [
        f"data.train={folder / 'all.jsonl'}", "data.long=crop", "data.max_duration=3", "data.min_duration=0.1",
    ]).data  # fmt: skip
    dataset = open_dataset(config, 0)
    manifest = dataset.manifest
    assert manifest.cropped == 2 and not manifest.dropped and (manifest.duration <= 3).all()
    assert len(manifest) == 7 + 3 + 2 and len(set(manifest.utterance.tolist())) == len(manifest)
    assert manifest.duration.sum() == pytest.approx(19 + 7 + 1 + 0.875)
    whole = open_dataset(Config.preset("tiny", [f"data.train={folder / 'all.jsonl'}", "data.max_duration=60"]).data, 0)
    joined = np.concatenate([read_utterance(dataset, index) for index in range(7)])
    np.testing.assert_array_equal(joined, read_utterance(whole, 0))
    assert dataset.digest == open_dataset(config, 0).digest != whole.digest
    words = ["pretrain", "-c", "tiny", f"data.train={folder / 'all.jsonl'}", "data.long=crop", "data.max_duration=3",
             "trainer.max_steps=1", "trainer.threads=1", "--folder", str(tmp_path / "run")]  # fmt: skip
    assert main(words) == 0 and "cropped: 2 utterances" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("reduction", [[], ["encoder.reduction=pooling", "encoder.reduction_factor=2"]])
def test_transcripts_of_windows_are_those_of_the_whole(reduction: list[str], folder: Path, tmp_path: Path) -> None:
    cfg = Config.preset("tiny", [*LIMITED, *reduction])
    checkpoint.save(tmp_path / "model", *init(key(1), cfg), cfg)
    (tmp_path / "text.jsonl").write_text(
        json.dumps({"audio_filepath": str(folder / "short.wav"), "duration": 1.0, "text": "ab"}) + "\n"
    )
    words = ["finetune-ctc", str(tmp_path / "model"), "--tokens", "characters", "--out", str(tmp_path / "made"),
             f"data.train={tmp_path / 'text.jsonl'}", f"data.valid={tmp_path / 'text.jsonl'}", "trainer.max_steps=3",
             "trainer.threads=1", "optim.lr=1e-2", "optim.sched.name=constant"]  # fmt: skip
    assert main(words) == 0
    found = []
    for seconds in ("60", "4"):
        out = str(tmp_path / f"{seconds}.jsonl")
        assert main(["transcribe", str(tmp_path / "made"), str(folder / "all.jsonl"), "--out", out,
                     f"data.batch_seconds={seconds}"]) == 0  # fmt: skip
        found.append([json.loads(line) for line in Path(out).read_text().splitlines()])
    assert [line["duration"] for line in found[0]] == [19.0, 7.0, 1.0, 0.875]
    for whole, parts in zip(*found, strict=True):
        assert whole["text"] == parts["text"] and whole["tokens"] == parts["tokens"]
        assert whole["score"] == pytest.approx(parts["score"], abs=1e-2)


def test_a_stop_within_a_recording_leaves_nothing_half_done(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder / "limited")
    cfg = inference_config("extract", model.cfg, ["data.batch_seconds=2"])
    dataset = open_audio(str(folder / "long.wav"), cfg, tmp_path, data=cfg.data)
    asked = iter([False] * 5)
    job = Job(stopped=lambda: next(asked, True))
    assert list(extract(model._replace(cfg=cfg), dataset, tmp_path / "out", job=job)) == []
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["origin.json"]
    assert len(list(extract(model._replace(cfg=cfg), dataset, tmp_path / "out"))) == 1

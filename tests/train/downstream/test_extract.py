"""A trained model over files: extract, tokenize, probe, through the command line where a person would use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nest_fn import Config, features, init, key
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files.audio import read_audio
from nest_fn.train.data.audio_files.wav import write_wav

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kinds of tones of various lengths, a model of random weights, and a manifest with labels."""
    folder = tmp_path_factory.mktemp("inference")
    lines = []
    for index in range(32):
        samples = np.arange(4000 + 500 * index)
        pitch = 300 if index % 2 else 2500
        noise = np.random.default_rng(index).normal(0, 300, len(samples))
        write_wav(
            folder / f"{index}.wav", (8000 * np.sin(samples * pitch * 2 * np.pi / 16000) + noise).astype(np.int16)
        )
        lines.append({"audio_filepath": f"{index}.wav", "duration": len(samples) / 16000, "kind": "ab"[index % 2]})
    (folder / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = Config.preset("tiny")
    checkpoint.save(folder / "model", *init(key(3), cfg), cfg)
    return folder


def arrays(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.load(path) for path in sorted(folder.glob("*.npy"))}


def test_features_do_not_depend_on_the_batch(corpus: Path, tmp_path: Path) -> None:
    source = [str(corpus / "model"), str(corpus / "all.jsonl"), "--layers", "all"]
    assert main(["extract", *source, "--out", str(tmp_path / "many")]) == 0
    assert main(["extract", *source, "--out", str(tmp_path / "one"), "--max-batch-size", "1"]) == 0
    many, one = arrays(tmp_path / "many"), arrays(tmp_path / "one")
    assert len(many) == 32 and many.keys() == one.keys()
    for name, value in many.items():
        np.testing.assert_allclose(value, one[name], atol=1e-5)
    entry = json.loads((tmp_path / "many" / "index.jsonl").read_text().splitlines()[5])
    assert entry["kind"] == "b"
    params, state, cfg = checkpoint.load(corpus / "model")
    audio = torch.from_numpy(read_audio(str(corpus / "5.wav"), 0.0, None))[None]
    layers, lengths = features(params, state, audio, torch.tensor([audio.shape[1]]), cfg)
    expected = torch.stack(layers)[:, 0, : int(lengths[0])]
    np.testing.assert_allclose(many[entry["feature_filepath"]], expected.numpy(), atol=1e-5)


def test_extraction_goes_on_where_it_stopped(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["extract", str(corpus / "model"), str(corpus / "all.jsonl"), "--out", str(tmp_path)]
    assert main(command) == 0
    before = arrays(tmp_path)
    for name in list(before)[::3]:
        (tmp_path / name).unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert "11 files written" in capsys.readouterr().out
    for name, value in arrays(tmp_path).items():
        np.testing.assert_allclose(value, before[name], atol=1e-5)


def test_weighted_sum_and_utterance_level(corpus: Path, tmp_path: Path) -> None:
    source = ["extract", str(corpus / "model"), str(corpus / "0.wav"), "--layers", "0,-1"]
    assert main([*source, "--out", str(tmp_path / "both")]) == 0
    assert main([*source, "--out", str(tmp_path / "sum"), "--weights", "0.25,0.75", "--level", "utterance"]) == 0
    (both,), (summed,) = arrays(tmp_path / "both").values(), arrays(tmp_path / "sum").values()
    np.testing.assert_allclose(summed, 0.25 * both[0].mean(0) + 0.75 * both[1].mean(0), atol=1e-6)
    assert main([*source, "--out", str(tmp_path / "bad"), "--weights", "1"]) == 2


def test_tokens_of_a_folder(corpus: Path, tmp_path: Path) -> None:
    assert main(["tokenize", str(corpus / "model"), str(corpus), "--out", str(tmp_path)]) == 0
    found = [np.load(path) for path in sorted(tmp_path.glob("*.npz"))]
    assert len(found) == 32
    for tokens in found:
        assert tokens["quantizer"].shape == tokens["decoder"].shape and tokens["quantizer"].shape[1] == 1
        assert tokens["quantizer"].min() >= 0 and tokens["quantizer"].max() < 64


def test_probe_tells_two_kinds_of_tone_apart(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = str(corpus / "all.jsonl")
    assert main(["probe", str(corpus / "model"), "--label", "kind", "--train", manifest, "--test", manifest]) == 0
    scores = {line.split()[0]: float(line.split()[3]) for line in capsys.readouterr().out.splitlines()}
    assert scores["log-mel"] == 1.0 and scores["learnt"] > 0.9 and scores["weighted"] > 0.9
    assert main(["probe", str(corpus / "model"), "--label", "no", "--train", manifest, "--test", manifest]) == 3


def test_out_of_memory_names_the_batch_and_the_options(tmp_path: Path) -> None:
    """In a process that may have little of it."""
    cfg = Config.preset("tiny", ["encoder.n_layers=1"])
    checkpoint.save_file(tmp_path / "model.pt", *init(key(0), cfg), cfg)
    write_wav(tmp_path / "long.wav", np.zeros(16000 * 600, np.int16))
    script = """
import resource, sys
from nest_fn.train.cli.main import main
import torchaudio
from pathlib import Path
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 400 * 2**20, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""
    argv = ["extract", str(tmp_path / "model.pt"), str(tmp_path / "long.wav"), "--out", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *argv, "--batch-seconds", "600"], cwd=ROOT, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: out of memory in a batch of 1 x 600.31 s; lower --batch-seconds")
    assert not list((tmp_path / "out").glob("*.npy"))

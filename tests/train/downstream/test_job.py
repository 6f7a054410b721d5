"""Commands that apply a model: settings of the job, what they refuse, stops, ranks, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nest_fn import Config, init, key
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.distributed.collectives import Ranks
from nest_fn.train.downstream import extract as extraction
from nest_fn.train.downstream import inference
from nest_fn.train.run import device
from tests.train.conftest import Corpus

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights."""
    folder, cfg = tmp_path_factory.mktemp("job") / "model", Config.preset("tiny")
    checkpoint.save(folder, *init(key(0), cfg), cfg)
    return str(folder)


def arrays(folder: Path) -> dict[str, Any]:
    return {path.name: np.load(path) for path in sorted(folder.glob("*.npy"))}


@pytest.mark.parametrize("command", ["extract", "tokenize"])
def test_settings_of_the_job(command: str, model: str, corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    words = [command, model, corpus.valid, "--out", str(tmp_path / "out"), "trainer.device=cpu", "trainer.threads=1",
             "data.num_workers=2", "data.batch_seconds=2"]  # fmt: skip
    assert main(words) == 0 and len(list((tmp_path / "out").glob("*.np?"))) == 4
    for setting in ("optim.lr=1", "trainer.max_steps=3", "encoder.n_layers=1", "data.min_duration=1", "data.noise=[]"):
        assert main([*words, setting]) == 2
        assert f"error: {command}: {setting.partition('=')[0]} has no effect here" in capsys.readouterr().err
    assert main([*words, "trainer.device=cuda:7"]) == 2 and "CUDA devices" in capsys.readouterr().err
    assert main([*words, "trainer.nonsense=1"]) == 2
    assert main([*words, "data.channel=first"]) == 2 and "channel was" in capsys.readouterr().err


def test_half_precision_is_half_precision(
    model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "check_precision", lambda *_: None)  # this CPU may have no bfloat16, which is slow
    for precision in ("fp32", "bf16"):
        out = ["--out", str(tmp_path / precision), f"trainer.precision={precision}"]
        assert main(["extract", model, corpus.valid, *out]) == 0
    whole, half = arrays(tmp_path / "fp32"), arrays(tmp_path / "bf16")
    for name, features in whole.items():
        assert half[name].dtype == np.float32
        assert 0 < np.abs(half[name] - features).max() < 0.3  # of features of deviation 1; bfloat16 has 8 bits


def test_probe_takes_the_settings_and_refuses_others(
    model: str, tmp_path: Path, corpus: Corpus, capsys: Captured
) -> None:
    lines = [json.loads(line) for line in Path(corpus.train).read_text().splitlines()]
    folder = Path(corpus.train).parent
    text = "".join(
        json.dumps(line | {"audio_filepath": str(folder / line["audio_filepath"]), "kind": "ab"[index % 2]}) + "\n"
        for index, line in enumerate(lines)
    )
    (tmp_path / "m.jsonl").write_text(text)
    manifest = str(tmp_path / "m.jsonl")
    words = ["probe", model, "--label", "kind", "--train", manifest, "--test", manifest]
    assert main([*words, "trainer.device=cpu", "data.num_workers=1"]) == 0
    assert "learnt" in capsys.readouterr().out
    assert main([*words, "trainer.clip_norm=1"]) == 2
    assert "probe: trainer.clip_norm has no effect here" in capsys.readouterr().err


def test_a_stop_ends_with_its_code_and_the_same_command_goes_on(
    model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    words = ["extract", model, corpus.train, "data.batch_seconds=4"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    real, seen = extraction._write, []

    def stopping(*args: Any) -> None:
        seen.append(args[0])
        real(*args)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(extraction, "_write", stopping)
    cut = [*words, "--out", str(tmp_path / "cut")]
    assert main(cut) == 75 and "the same command goes on" in capsys.readouterr().err
    first = len(seen)
    assert 5 <= first < 24 and not (tmp_path / "cut" / "index.jsonl").exists()
    assert main(cut) == 0 and len(seen) == 24
    whole, now = arrays(tmp_path / "whole"), arrays(tmp_path / "cut")
    assert whole.keys() == now.keys()
    for name, features in whole.items():
        np.testing.assert_allclose(now[name], features, atol=1e-5)


def test_an_utterance_longer_than_a_batch_is_a_batch(model: str, tmp_path: Path) -> None:
    write_wav(tmp_path / "long.wav", np.zeros(16000 * 5, np.int16))
    write_wav(tmp_path / "short.wav", np.zeros(16000, np.int16))
    assert main(["extract", model, str(tmp_path), "--out", str(tmp_path / "out"), "--batch-seconds", "2"]) == 0
    assert sorted(features.shape[-2] for features in arrays(tmp_path / "out").values()) == [13, 63]


def test_the_index_is_a_manifest_that_every_command_reads(
    model: str, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(corpus.valid).parent)
    assert main(["extract", model, Path(corpus.valid).name, "--out", str(tmp_path / "out")]) == 0
    assert main(["data", "validate", str(tmp_path / "out" / "index.jsonl")]) == 0


def test_audio_shorter_than_a_frame_is_filled_up_and_no_nan_is_written(
    model: str, tmp_path: Path, capsys: Captured
) -> None:
    write_wav(tmp_path / "one.wav", np.array([3000], np.int16))
    for level in ("frame", "utterance"):
        assert (
            main(["extract", model, str(tmp_path / "one.wav"), "--out", str(tmp_path / level), "--level", level]) == 0
        )
        (features,) = arrays(tmp_path / level).values()
        assert features.size and np.isfinite(features).all()
    params, state, cfg = checkpoint.load(model)
    params["encoder"]["layers"][0]["norm_out"]["weight"].fill_(float("nan"))
    checkpoint.save(tmp_path / "broken", params, state, cfg)
    assert main(["extract", str(tmp_path / "broken"), str(tmp_path / "one.wav"), "--out", str(tmp_path / "x")]) == 3
    assert "not finite" in capsys.readouterr().err and not arrays(tmp_path / "x")


class Together(Ranks):
    """A rank whose others never want to stop; they write one after the other."""

    def any(self, flag: bool) -> bool:
        return flag


def test_two_ranks_write_the_files_of_one(model: str, corpus: Corpus, tmp_path: Path) -> None:
    trained = inference.load_model(model)
    dataset = inference.open_audio(corpus.train, trained.cfg)
    shares = [
        list(extraction.extract(trained, dataset, tmp_path / "two", job=inference.Job(ranks=Together(rank, 2))))
        for rank in (0, 1)
    ]
    whole = list(extraction.extract(trained, dataset, tmp_path / "one"))
    assert all(shares) and sorted(shares[0] + shares[1]) == sorted(whole)
    one, two = arrays(tmp_path / "one"), arrays(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, features in one.items():
        np.testing.assert_allclose(two[name], features, atol=1e-5)
    assert (tmp_path / "one" / "index.jsonl").read_bytes() == (tmp_path / "two" / "index.jsonl").read_bytes()

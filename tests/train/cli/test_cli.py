"""The command line: every command, and errors that are one message with an exit code of their own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from nest_fn.config import Config
from nest_fn.train.cli.main import main
from tests.train.conftest import Corpus
from tests.train.run.test_pretrain import words

Captured = pytest.CaptureFixture[str]

ROOT = Path(__file__).resolve().parents[3]


def _error(argv: list[str], code: int, captured: Captured) -> str:
    """The one message of a command that fails with this code."""
    assert main(argv) == code
    told = captured.readouterr().err
    (message,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in told
    return message


def test_config_show_is_a_config(tmp_path: Path, capsys: Captured) -> None:
    assert main(["config", "show", "tiny", "optim.lr=2e-3", "data.train=no"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "a.yaml").write_text(text)
    wanted = Config.preset("tiny", ["optim.lr=2e-3", "data.train=no"])
    assert Config.from_yaml(tmp_path / "a.yaml") == wanted and wanted.optim.lr == 2e-3
    assert yaml.safe_load(text)["data"]["train"] == ["no"]  # also for those who read YAML 1.1


def test_config_diff(tmp_path: Path, capsys: Captured) -> None:
    assert main(["config", "diff", "nest_small", "nest_large"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "encoder.d_model: 176 -> 512" in lines and not any(line.startswith("code_dim") for line in lines)
    assert main(["config", "diff", "tiny", "tiny"]) == 0 and capsys.readouterr().out == ""
    assert "required: other" in _error(["config", "diff", "tiny"], 2, capsys)
    assert "want two configs, got 1" in _error(["config", "diff", "tiny", "sample_rate=8000"], 2, capsys)


def test_overrides_stand_anywhere(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    argv = ["pretrain", f"data.train={corpus.train}", "-c", "tiny", "optim.lr=2e-3", "--dry-run", "num_classes=32"]
    assert main(argv) == 0
    assert "decoder: 1,056" in capsys.readouterr().out  # 32 x 32 weights and 32 biases


@pytest.mark.parametrize("extra", ["--lr=3", "hello", "-x"])
def test_words_that_mean_nothing(extra: str, capsys: Captured) -> None:
    assert main(["pretrain", "-c", "tiny", "--dry-run", extra]) == 2
    assert extra.lstrip("-") in capsys.readouterr().err


def test_usage(capsys: Captured) -> None:
    for argv in ([], ["pretrain", "--resume", "maybe"], ["data"], ["data", "stats", "a", "--channel", "left"], ["fly"],
                 ["config", "show", "tiny", "demo"]):  # fmt: skip
        assert main(argv) == 2, argv
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize(
    "option, value",
    [
        ("--layers", "a,b"), ("--layers", ""), ("--layers", "0,"), ("--weights", "nonsense"), ("--weights", "nan,1"),
        ("--batch-seconds", "0"), ("--batch-seconds", "-1"), ("--batch-seconds", "nan"), ("--batch-seconds", "inf"),
        ("--max-batch-size", "0"), ("--max-batch-size", "9" * 5000), ("--level", "word"), ("--out", ""),
    ],
)  # fmt: skip
def test_options_that_cannot_be(option: str, value: str, capsys: Captured) -> None:
    assert main(["extract", "checkpoint", "audio", "--out", "nowhere", f"{option}={value}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: nest-fn extract: argument {option}: ") and told.count("\n") == 1
    assert len(told) < 600 and not Path("nowhere").exists()


def test_dry_run(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    assert main([*words(corpus, tmp_path / "run", "data.min_duration=1.2"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "parameters: 30,976 trained" in told and "encoder: " in told
    assert "data: 18 utterances" in told and "left out: 6 shorter than min_duration=1.2 s" in told
    assert "batches an epoch, padding efficiency 0." in told and "largest batch: " in told
    assert "one eager update: loss 4." in told and "peak memory" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, told",
    [
        ({}, "GOMP_SPINCOUNT is 10000"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "OMP_WAIT_POLICY is ACTIVE"),
        ({"GOMP_SPINCOUNT": "77"}, "GOMP_SPINCOUNT is 77"),
    ],
)
def test_waiting_threads_soon_sleep_unless_the_user_says_otherwise(
    given: dict[str, str], told: str, tmp_path: Path
) -> None:
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    command = [sys.executable, "-m", "nest_fn.train", "doctor", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert told in done.stdout


def test_doctor(tmp_path: Path, capsys: Captured) -> None:
    code = main(["doctor", str(tmp_path)])
    told = capsys.readouterr().out
    assert code == int("FAIL" in told)
    versions_ = (f"Python {platform.python_version()}, numpy {np.__version__}", f"ok   torch {torch.__version__}, ")
    for words_ in (*versions_, "CPU: ", "C++ compiler", "extra 'audio'", "GiB free", "ok   a file can be written"):
        assert words_ in told
    assert "viz" not in told and "--folder" not in told
    assert main(["doctor", str(tmp_path / "nowhere")]) == 1
    assert f"FAIL {tmp_path}/nowhere: nothing can be written here: No such file" in capsys.readouterr().out


def test_scan_validate_stats(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    folder = tmp_path / "audio"
    shutil.copytree(Path(corpus.valid).parent, folder, ignore=shutil.ignore_patterns("*.jsonl", "train*"))
    manifest = str(tmp_path / "all.jsonl")
    assert main(["data", "scan", str(folder), manifest, "--hash"]) == 0
    assert "9 files in" in capsys.readouterr().out
    assert main(["data", "validate", manifest, "--hash"]) == 0
    assert capsys.readouterr().out == "9 utterances, 0 problems\n"
    assert main(["data", "stats", manifest]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["utterances"] == 9 and found["sample_rates"] == {"16000": 9} and found["plan"]["batches"] > 0
    content = bytearray((folder / "valid0.wav").read_bytes())
    content[1000] ^= 255
    (folder / "valid0.wav").write_bytes(content)
    (folder / "noise1.wav").write_bytes((folder / "noise1.wav").read_bytes()[:9999])
    assert main(["data", "validate", manifest, "--hash"]) == 3
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "9 utterances, 2 problems" and "all.jsonl:2: " in told[0] and "sha256" in told[1]
    (folder / "text.wav").write_text("no audio")
    assert main(["data", "scan", str(folder), manifest]) == 2
    assert "--overwrite it" in capsys.readouterr().err
    assert main(["data", "scan", str(folder), manifest, "--overwrite"]) == 3
    assert "left out" in capsys.readouterr().out


def test_shards_can_be_validated(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    assert main(["data", "shard", corpus.train, "--out", str(tmp_path), "--shards", "2"]) == 0
    manifest = capsys.readouterr().out.strip()
    archives = ["--tar", str(tmp_path / "audio_{0..1}.tar")]
    assert main(["data", "validate", manifest, *archives]) == 0
    assert "24 utterances, 0 problems" in capsys.readouterr().out
    assert main(["data", "stats", manifest, *archives]) == 0
    assert json.loads(capsys.readouterr().out)["utterances"] == 24
    again = ["data", "shard", corpus.train, "--out", str(tmp_path), "--shards", "3"]
    assert "was made of something else (shards was 2, is 3)" in _error(again, 2, capsys)


def test_usage_and_config_errors(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    assert "unknown preset 'huge'" in _error(["pretrain", "-c", "huge"], 2, capsys)
    assert "gone.yaml" in _error(["pretrain", "-c", "gone.yaml"], 2, capsys)
    assert "did you mean 'n_layers'" in _error(words(corpus, run, "encoder.n_layer=2"), 2, capsys)
    assert "data.train names no manifest" in _error(["pretrain", "-c", "tiny", "--folder", str(run)], 2, capsys)
    assert "this machine has" in _error(words(corpus, run, "trainer.device=cuda:99"), 2, capsys)
    (tmp_path / "file").write_text("")
    assert "choose another with --folder" in _error(words(corpus, tmp_path / "file"), 2, capsys)


def test_data_errors(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    assert "gone.jsonl" in _error(words(corpus, tmp_path / "run", "data.train=gone.jsonl"), 3, capsys)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"audio_filepath": "gone.wav", "duration": 2}\n')
    message = _error(words(corpus, tmp_path / "run", f"data.train={bad}"), 3, capsys)
    assert f"{bad}:1: no such file: gone.wav" in message
    assert "is not a folder" in _error(["data", "scan", str(tmp_path / "no"), str(tmp_path / "m")], 3, capsys)


def test_checkpoint_errors(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    run, short = tmp_path / "run", "trainer.max_steps=2"
    assert "holds no checkpoint" in _error([*words(corpus, run, short), "--resume", "must"], 4, capsys)
    assert main(words(corpus, run, short)) == 0
    capsys.readouterr()
    assert "encoder.dropout: was 0.1, is 0.2" in _error(words(corpus, run, short, "encoder.dropout=0.2"), 4, capsys)
    assert "go on with --resume auto" in _error([*words(corpus, run, short), "--resume", "never"], 4, capsys)
    settings = (run / "config.yaml").read_text()
    assert "dropout: 0.1" in settings  # what was refused has not been written down
    assert main([*words(corpus, run, "trainer.max_steps=3", "encoder.dropout=0.2"), "--allow-changes"]) == 0
    assert "resumed at step 2" in capsys.readouterr().err


def test_a_loss_that_is_not_finite(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    wild = ["optim.sched=null", "optim.name=sgd", "optim.lr=1e38", "optim.weight_decay=1"]
    assert main(words(corpus, tmp_path / "run", *wild)) == 5
    told = capsys.readouterr().err
    assert "nothing was updated" in told and "utterances: train" in told and "Traceback" not in told


def test_a_write_that_fails_is_one_message(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "command.txt").touch()
    assert main(words(corpus, tmp_path / "run")) == 1
    assert "metrics.jsonl" in capsys.readouterr().err


def test_synth(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    from nest_fn.train.data import synth

    seen: list[synth.CorpusSpec] = []
    real = synth.write_corpus
    small = {f"{name}_minutes": 0.1 for name in ("valid", "noise", "probe_train", "probe_test")}
    small |= {f"{name}_speakers": 2 for name in ("train", "valid", "probe_train", "probe_test")}

    def write(out: str, spec: synth.CorpusSpec, overwrite: bool) -> dict[str, Path]:
        from dataclasses import replace

        seen.append(spec)
        return real(out, replace(spec, **small), overwrite=overwrite)

    monkeypatch.setattr(synth, "write_corpus", write)
    assert main(["data", "synth", str(tmp_path / "speech"), "--seed", "3", "--minutes", "0.2"]) == 0
    told = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert seen[0].seed == 3 and seen[0].train_minutes == 0.2
    assert main(["data", "validate", told["train"], told["noise"]]) == 0


def test_module_and_help() -> None:
    done = subprocess.run([sys.executable, "-m", "nest_fn.train", "--help"], capture_output=True, text=True, check=True)
    for name in (
        "pretrain",
        "replay",
        "verify",
        "diff",
        "report",
        "data",
        "config",
        "doctor",
        "bench",
        "demo",
        "exit codes",
    ):
        assert name in done.stdout


AT_WORK = """
import threading, time, torch
from nest_fn.train.cli.main import leave

def work():
    while True:
        torch.sort(torch.arange(3_000_000).flip(0))

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.5)
print("told")
leave(75)
"""


def test_threads_at_work_change_no_exit_code() -> None:
    """By ``sys.exit`` this process aborts: its threads come back from C++ to an interpreter that is gone."""
    done = subprocess.run([sys.executable, "-c", AT_WORK], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (done.returncode, done.stdout) == (75, "told\n"), done.stderr

"""What surrounds a run (faults G2, G4, G6): storage that hangs, odd names, packages that are missing or do not fit.

All through the command line, in a process of its own: one message, no traceback, an exit code of the kind of fault.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.config import Config
from nest_fn.extras import EXTRAS
from nest_fn.layers.random import key
from nest_fn.model import init
from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files.wav import write_wav
from tests import unprivileged
from tests.train.conftest import Corpus
from tests.train.faults import write_entries
from tests.train.run.test_pretrain import metrics, words

ROOT = Path(__file__).resolve().parents[3]
ODD = ["two words", "Größe", "语音", "صوت", "🎙️ mic", "x" * 240]
LONG = "n" * 300  # file systems take names of up to 255 bytes
SMALL = ["encoder.n_layers=1", "encoder.subsampling_conv_channels=8", "data.batch_seconds=8", "data.max_duration=8",
         "trainer.max_steps=2", "trainer.save_every=2"]  # fmt: skip
BLOCKED = """
import sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(",")))  # None: an import of it fails
from nest_fn.train.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
PACKAGES = ["soundfile", "safetensors", "onnx", "onnxscript", "tensorboard", "matplotlib"]
STUBS = {
    "without the names": "__version__ = '99.0'\n",
    "built for another": "raise ImportError('a symbol is missing\\n' + 'and here is why\\n' * 40)\n",
    "of another protobuf": "raise TypeError('Descriptors cannot be created directly.\\n' * 9)\n",
}


def run(
    argv: list[str], command: list[str] | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The command, ended within two minutes, without a traceback."""
    done = subprocess.run(
        [*(command or [sys.executable, "-m", "nest_fn.train"]), *argv],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        timeout=120, capture_output=True, text=True, errors="surrogateescape",
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def pretrain(data: str | Path, folder: str | Path, *overrides: str) -> list[str]:
    """Two steps."""
    return ["pretrain", "-c", "tiny", "--folder", str(folder), f"data.train={data}", *SMALL, *overrides]


def message(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line of an error with this code."""
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stderr.endswith(f"{line}\n")
    return line


def speech(folder: Path, names: list[str]) -> Path:
    """A manifest of utterances with these names, beside them."""
    folder.mkdir(parents=True)
    make = np.random.Generator(np.random.Philox(1))
    for name in names:
        write_wav(folder / f"{name}.wav", make.normal(0, 900, 24000).astype(np.int16))
    write_entries(folder, [{"audio_filepath": f"{name}.wav", "duration": 1.5} for name in names])
    return folder / "m.jsonl"


# faults G2: storage --------------------------------------------------------------------------------------------------


def test_storage_that_hangs_ends_the_run(corpus: Corpus, tmp_path: Path) -> None:
    """Files that never open: the batch is named, the process ends, what was saved stays."""
    late = ["data.timeout_s=1", "data.num_workers=2", "data.check_files=false"]
    late += ["trainer.save_every=1", "trainer.log_every=1", "data.noise="]
    argv = words(corpus, tmp_path / "run", *late)
    assert main([*argv, "trainer.max_steps=1"]) == 0
    hanging = [sys.executable, "-m", "tests.train.hanging", r"train\d+\.wav"]
    told = message(run([*argv, "trainer.max_steps=6"], hanging), 3)
    assert "no answer in 1.0 s for batch 1 of epoch 0; is the storage reachable? Raise data.timeout_s" in told
    assert [line["step"] for line in metrics(tmp_path / "run") if "valid" not in line] == [1]
    assert (tmp_path / "run" / "checkpoints" / "step_00000001" / "meta.json").exists()
    assert main([*argv, "trainer.max_steps=2"]) == 0


# faults G4: names ----------------------------------------------------------------------------------------------------


def deep(folder: Path, length: int = 3500) -> Path:
    """A folder below whose whole name has about so many bytes; 4096 is the system's limit."""
    while len(os.fsencode(folder)) < length:
        folder /= "long" * 50
    return folder


@pytest.mark.parametrize("locale", ["", "C"])
def test_a_run_under_odd_names(tmp_path: Path, locale: str) -> None:
    speech(tmp_path / "plain" / "two words" / "Größe 语音 صوت 🎙️", ODD)
    (tmp_path / "a link").symlink_to(tmp_path / "plain" / "two words", target_is_directory=True)
    data = tmp_path / "a link" / "Größe 语音 صوت 🎙️" / "m.jsonl"
    folder = tmp_path / "run of ours 🎙️"
    environment = {"LC_ALL": locale} if locale else {}
    argv = pretrain(data, folder, f"data.valid={data}", "trainer.valid_every=2", f"data.root={tmp_path / 'a link'}")
    done = run(argv, environment=environment)
    assert done.returncode == 0, done.stderr
    again = run([*argv, "trainer.max_steps=3", "--resume", "must"], environment=environment)
    assert again.returncode == 0 and "resumed at step 2" in again.stderr
    assert Config.from_yaml(folder / "config.yaml").data.train == (str(data),)
    assert str(data) in (folder / "command.txt").read_text(encoding="utf-8")
    out = tmp_path / "außen"
    assert run(["extract", str(folder), str(data), "--out", str(out)], environment=environment).returncode == 0
    assert len(list(out.glob("*.npy"))) == len(ODD)


def test_a_run_in_a_very_long_path(tmp_path: Path) -> None:
    folder = deep(tmp_path)
    assert len(os.fsencode(folder)) > 3500
    done = run(pretrain(speech(folder / "data", ["a", "b"]), folder / "run"))
    assert done.returncode == 0, done.stderr
    assert checkpoint.latest(folder / "run" / "checkpoints") is not None


def test_a_run_folder_that_is_no_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/\xff run"
    done = run(pretrain(speech(tmp_path / "data", ["a", "b"]), os.fsdecode(folder)))
    assert done.returncode == 0, done.stderr
    with open(folder + b"/command.txt", "rb") as file:
        assert folder in file.read()


@pytest.mark.parametrize(
    "change, code",
    [
        ({"folder": f"{LONG}/run"}, 2),
        ({"folder": "link to itself/run"}, 2),
        ({"config": LONG}, 2),
        ({"config": f"{LONG}.yaml"}, 2),
        ({"data": f"{LONG}/m.jsonl"}, 3),
        ({"data": "link to itself/m.jsonl"}, 3),
        ({"data": "audio.jsonl"}, 3),
        ({"data": "audio.jsonl", "more": "data.check_files=false"}, 3),
        ({"data": "path.jsonl"}, 3),
        ({"more": f"data.noise={LONG}"}, 3),
        ({"more": f"data.root=/{LONG}"}, 3),
    ],
)
def test_names_that_no_file_can_have(tmp_path: Path, change: dict[str, str], code: int,
                                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "link to itself").symlink_to(tmp_path / "link to itself")
    speech(tmp_path / "data", ["a", "b"])
    for name, audio in (("audio", f"{LONG}.wav"), ("path", "x/" * 2500 + "a.wav")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"audio_filepath": audio, "duration": 1.5}) + "\n")
    argv = pretrain(tmp_path / change.get("data", "data/m.jsonl"), tmp_path / change.get("folder", "run"))
    if "config" in change:
        argv[2] = change["config"]
    assert main([*argv, *([change["more"]] if "more" in change else [])]) == code
    told = capsys.readouterr().err
    assert told.count("error: ") == 1 and "Traceback" not in told
    assert any(reason in told for reason in ("too long", "symbolic links", "no such file", "outside of data.root"))


def test_a_run_folder_in_a_read_only_folder(tmp_path: Path) -> None:
    data, closed = speech(tmp_path / "data", ["a", "b"]), tmp_path / "closed"
    closed.mkdir(mode=0o555)
    done = run(pretrain(data, closed / "run"), [*unprivileged.command_prefix(), sys.executable, "-m", "nest_fn.train"])
    if done.returncode == unprivileged.REFUSED:
        pytest.skip("root may not give up its capabilities here, and so writes into read-only folders")
    assert f"run folder {closed / 'run'}: Permission denied; choose another with --folder." in message(done, 2)


# faults G6: packages -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in one file, and one that says it is of safetensors."""
    cfg = Config.preset("tiny", SMALL[:2])
    path = tmp_path_factory.mktemp("model") / "model.pt"
    checkpoint.save_file(path, *init(key(0), cfg), cfg)
    (path.parent / "other.safetensors").write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
    return path


def without(way: str, argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command where all optional packages are missing, or bad in this way."""
    if way == "missing":
        return run(argv, [sys.executable, "-c", BLOCKED, ",".join(PACKAGES)])
    for package in PACKAGES:
        (folder / f"{package}.py").write_text(STUBS[way])
    return run(argv, environment={"PYTHONPATH": str(folder)})


@pytest.mark.parametrize("way", ["missing", "without the names", "of another protobuf"])
def test_training_wants_no_optional_package(tmp_path: Path, way: str) -> None:
    """Checkpoints are .pt files then, and there are no curves; nothing is said about it."""
    done = without(way, pretrain(speech(tmp_path / "data", ["a", "b"]), tmp_path / "run"), tmp_path)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step_00000002" / "params.pt").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize(
    "way, extra, package, code, argv",
    [
        ("missing", "audio", "soundfile", 2, ["pretrain", "-c", "tiny", "--folder", "RUN", "data.train=FLAC", *SMALL]),
        ("missing", "export", "onnx", 2, ["export", "MODEL", "OUT/encoder.onnx"]),
        ("missing", "export", "safetensors", 4, ["convert", "MODEL", "OUT/model.safetensors"]),
        ("missing", "export", "safetensors", 4, ["convert", "SAFE", "OUT/model.pt"]),
        ("missing", "export", "safetensors", 2, ["extract", "MODEL", "WAV", "--out", "OUT", "--format", "safetensors"]),
        (
            "without the names",
            "audio",
            "soundfile",
            2,
            ["pretrain", "-c", "tiny", "--folder", "RUN", "data.train=FLAC", *SMALL],
        ),
        ("without the names", "export", "onnx", 2, ["export", "MODEL", "OUT/encoder.onnx"]),
        ("without the names", "export", "safetensors", 4, ["convert", "MODEL", "OUT/model.safetensors"]),
        (
            "built for another",
            "audio",
            "soundfile",
            2,
            ["pretrain", "-c", "tiny", "--folder", "RUN", "data.train=FLAC", *SMALL],
        ),
        ("built for another", "export", "onnx", 2, ["export", "MODEL", "OUT/encoder.onnx"]),
        ("built for another", "export", "safetensors", 4, ["convert", "MODEL", "OUT/model.safetensors"]),
    ],
)
def test_one_line_names_the_extra(
    tmp_path: Path, model: Path, way: str, extra: str, package: str, code: int, argv: list[str]
) -> None:
    wav = speech(tmp_path / "data", ["a", "b"])
    (tmp_path / "data" / "a.flac").write_bytes(b"fLaC" + bytes(400))
    flac = tmp_path / "data" / "flac.jsonl"
    flac.write_text('{"audio_filepath": "a.flac", "duration": 1.5}\n')
    out = tmp_path / "out"
    out.mkdir()
    places = {"RUN": tmp_path / "run", "FLAC": flac, "WAV": wav, "MODEL": model, "OUT": out}
    for name, place in (places | {"SAFE": model.parent / "other.safetensors"}).items():
        argv = [word.replace(name, str(place)) for word in argv]
    told = message(without(way, argv, tmp_path), code)
    assert f"package {package} " in told and f"pip install 'nest-fn[{extra}]'" in told and len(told) < 600
    assert ("is not installed" in told) == (way == "missing")
    assert not [path for path in out.iterdir() if path.suffix in (".onnx", ".safetensors")]


@pytest.mark.parametrize("way", ["without the names", "built for another"])
def test_the_doctor_says_what_is_wrong_with_an_extra(tmp_path: Path, way: str) -> None:
    told = without(way, ["doctor", str(tmp_path)], tmp_path).stdout
    lines = {line.split("'")[1]: line for line in told.splitlines() if "extra '" in line}
    assert set(lines) == set(EXTRAS)
    reason = "99.0 has no" if way == "without the names" else "does not load"
    assert reason in lines["audio"] and lines["export"].count(reason) == 3
    assert "all formats but plain WAV" in lines["audio"]


def test_the_doctor_says_what_is_wrong_with_torch_and_the_compilers(tmp_path: Path) -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    install = "pip install " + " ".join(f"'{name}'" for name in asked if name.startswith("torch"))
    old = "import torch; torch.__version__ = '2.10.0'; from nest_fn.train.cli.main import process; process()"
    told = run(["doctor", str(tmp_path)], [sys.executable, "-c", old], environment={"CXX": "no-such"})
    assert told.returncode == 1 and "FAIL torch 2.10.0, built for" in told.stdout and install in told.stdout
    assert "no C++ compiler (no-such): install it, or name one in CXX; trainer.compile=on" in told.stdout


def test_without_torchaudio_the_same_losses_and_the_doctor_says_so(tmp_path: Path) -> None:
    """torchaudio built for another PyTorch: training, resampling included, goes on with the functions of our own."""
    manifest = speech(tmp_path / "data", ["a", "b"])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torchaudio.py").write_text("raise OSError('undefined symbol: aoti')\n")
    broken = {"PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{ROOT}"}
    argv = [*pretrain(manifest, tmp_path / "run"), "sample_rate=8000"]
    other = [str(tmp_path / "other") if word == str(tmp_path / "run") else word for word in argv]
    for command, environment in ((argv, None), (other, broken)):
        done = run(command, environment=environment)
        assert done.returncode == 0, done.stderr
    told = run(["doctor", str(tmp_path)], environment=broken)
    assert told.returncode == 0 and "torchaudio does not load (OSError: undefined symbol: aoti)" in told.stdout
    assert "torchaudio 2" in run(["doctor", str(tmp_path)]).stdout
    with_it, without_it = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("run", "other"))
    losses = [[json.loads(line).get("loss") for line in text.splitlines()] for text in (with_it, without_it)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0]

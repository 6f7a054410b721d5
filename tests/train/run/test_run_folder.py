"""The files of a run folder where the disk refuses: a line of metrics is whole or not there, the lock ends no run."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nest_fn.train.cli.main import main
from nest_fn.train.run.record.run_folder import RunFolder
from tests import unprivileged
from tests.train.conftest import Corpus

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import resource, sys
from nest_fn.train.run.record.run_folder import RunFolder

folder = RunFolder(sys.argv[1])
folder.open()
folder.append({"step": 1})
exec(sys.argv[2])
folder.close()
"""


def _run(folder: Path, script: str, prefix: list[str]) -> None:
    command = [*prefix, sys.executable, "-c", SCRIPT, str(folder), script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if prefix and done.returncode == unprivileged.REFUSED:
        pytest.skip("root may not give up its capabilities here, and so writes into read-only folders")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", [0, 1, 7])
def test_a_line_of_metrics_is_whole_or_not_there(tmp_path: Path, room: int) -> None:
    """A write that finds room for some bytes alone leaves none of them, and the next line stands by itself."""
    before = len(json.dumps({"step": 1})) + 1
    script = f"""
resource.setrlimit(resource.RLIMIT_FSIZE, ({before + room}, resource.RLIM_INFINITY))
try: folder.append({{"step": 2}})
except OSError as error: assert error.errno in ({errno.ENOSPC}, {errno.EFBIG}), error
else: raise AssertionError("written")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
folder.append({{"step": 3}})
"""
    _run(tmp_path, script, [])
    lines = RunFolder(tmp_path).metrics.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 3]


def test_a_resumed_run_keeps_bytes_that_are_no_text(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    good = [b'{"step": 1}', b"\xff\xfe no text", b"[1]", b'{"step": "x"}', b'{"step": 2, "valid": {"loss": 1.0}}']
    folder.metrics.write_bytes(b"\n".join([*good, b'{"step": 3}', b"\xff", b'{"ste']))
    assert folder.validation(2) == {"loss": 1.0} and folder.validation(3) is None
    folder.cut_metrics(2)
    folder.append({"step": 3})
    assert folder.metrics.read_bytes().splitlines() == [*good, b'{"step": 3}']


def test_a_lock_that_cannot_be_taken_away_ends_no_run(tmp_path: Path) -> None:
    """It stays, and the next run of this machine takes it for what it is: that of a process which has ended."""
    run = tmp_path / "run"
    _run(run, "folder.path.chmod(0o555)", unprivileged.command_prefix())
    assert (run / "lock").exists()
    run.chmod(0o755)
    folder = RunFolder(run)
    folder.open()
    folder.close()
    assert not (run / "lock").exists()


@pytest.mark.parametrize(
    "more, code",
    [
        (["data.train=none.jsonl"], 2),
        (["trainer.device=cuda:7"], 2),
        (["optim.lr=-1"], 2),
        (["--resume", "must"], 4),
    ],
)
def test_a_refused_start_leaves_no_folder(corpus: Corpus, tmp_path: Path, more: list[str], code: int) -> None:
    """Nor its parents, where it made them; what was there before stays."""
    (tmp_path / "runs").mkdir()
    words = [
        "pretrain",
        "-c",
        "tiny",
        f"data.train={corpus.train}",
        "--folder",
        str(tmp_path / "runs" / "a" / "b"),
        *more,
    ]
    assert main(words) in (code, 3)
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]


def test_another_project_is_no_run(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Though it has metrics and checkpoints of its own, which a run would cut and prune."""
    folder = tmp_path / "project"
    (folder / "checkpoints" / "step_1").mkdir(parents=True)
    for name in ("metrics.jsonl", "log.txt", "checkpoints/step_1/weights.pt"):
        (folder / name).write_text("years of work")
    before = {path: path.is_dir() or path.read_text() for path in folder.rglob("*")}
    assert main(["pretrain", "-c", "tiny", f"data.train={corpus.train}", "--folder", str(folder)]) == 2
    assert "nothing there was touched" in capsys.readouterr().err
    assert {path: path.is_dir() or path.read_text() for path in folder.rglob("*")} == before


def test_a_start_that_was_killed_at_once_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for _ in range(2):
        folder = RunFolder(tmp_path / "run")
        folder.open()
        (tmp_path / "run" / "lock").rename(tmp_path / "lock")  # as it lies there after a kill
        folder.close()
        (tmp_path / "lock").rename(tmp_path / "run" / "lock")
        (tmp_path / "run" / "log.txt").touch()

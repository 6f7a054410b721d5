"""One writer a folder, whatever became of the one before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nest_fn.files.lock import Lock
from nest_fn.train.errors import CheckpointError
from nest_fn.train.run.record.run_folder import RunFolder

HOLD = """
import pathlib, sys
sys.path.insert(0, {root!r})
from nest_fn.files.lock import Lock
lock = Lock(pathlib.Path({path!r}))
print(lock.take(), flush=True)
sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """A process that has the lock until its input ends."""
    text = HOLD.format(root=str(Path(__file__).resolve().parents[3]), path=str(path))
    process = subprocess.Popen([sys.executable, "-c", text], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "None\n"
    return process


def test_only_one_has_it_and_says_who(tmp_path: Path) -> None:
    first, second = Lock(tmp_path / "lock"), Lock(tmp_path / "lock")
    assert first.take() is None
    assert second.take() == f"process {os.getpid()} on {os.uname().nodename}"
    first.release()
    assert not (tmp_path / "lock").exists()
    assert second.take() is None
    first.release()  # of what is no longer ours
    assert (tmp_path / "lock").exists()
    second.release()


def test_the_killed_hold_nothing_even_before_they_are_collected(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    with holder(run.path / "lock") as process:
        with pytest.raises(CheckpointError, match=f"process {process.pid} on .* is writing here; stop it"):
            run.open()
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still a zombie
        run.open()
        run.close()


def test_what_a_file_says_is_no_lock(tmp_path: Path) -> None:
    """The holder was on another machine, or in another container where it had our number."""
    (tmp_path / "lock").write_text("process 1 on another-machine")
    lock = Lock(tmp_path / "lock")
    assert lock.take() is None
    assert (tmp_path / "lock").read_text() == f"process {os.getpid()} on {os.uname().nodename}"
    lock.release()


def test_a_lock_that_is_removed_while_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nest_fn.files import lock as module

    lock, real, seen = Lock(tmp_path / "lock"), module._locked, []

    def slow(file: object) -> bool:
        if not seen:
            (tmp_path / "lock").unlink()  # the former holder is done
        seen.append(file)
        return real(file)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_locked", slow)
    assert lock.take() is None and len(seen) == 2
    assert Lock(tmp_path / "lock").take() is not None
    lock.release()

"""What the faults of ``tests.show_faults`` happen to: a small corpus, runs over it, and one that nothing disturbs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nest_fn.checkpoint.retention import newest_valid, step_path
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.corpus.manifest import write_manifest
from tests.train.conftest import voice

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY = 24, 6  # of a run: its length, and a checkpoint every so many
SMALL = (
    "encoder.n_layers=1 encoder.subsampling_conv_channels=8 data.batch_seconds=8 data.max_duration=8 "
    f"trainer.max_steps={STEPS} trainer.log_every={EVERY} trainer.save_every={EVERY} trainer.keep_last=9"
).split()
SECONDS = 300.0  # patience with any command


NOTHING = "nothing: started again, the run ends with the undisturbed one's bytes"


class Skipped(Exception):
    """The fault cannot be provoked on this machine."""


class Row(NamedTuple):
    """What is shown of a fault."""

    fault: str
    message: str
    code: str
    lost: str


class Ended(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str

    def message(self) -> str:
        """The error with all of its lines, or else the last warning, or else the last line."""
        lines = [line.strip() for line in (self.out + self.err).splitlines() if line.strip()]
        errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        if errors:
            return " ".join(lines[errors[-1] :])
        warnings = [line for line in lines if line.startswith("warning: ")]
        return (warnings or lines or [""])[-1]

    def expect(self, code: int, pattern: str) -> Ended:
        """Raise ``AssertionError`` unless the code is this one, one message says this, and there is no traceback."""
        told = self.out + self.err
        assert self.code == code, f"exit code {self.code}, not {code}: {self.message()}"
        assert "Traceback" not in told, told[-2000:]
        errors = len(re.findall(r"^error: ", told, flags=re.MULTILINE))
        assert errors == (code != 0), f"{errors} errors told: {told[-2000:]}"
        assert re.search(pattern, told, re.DOTALL), f"not told: {pattern!r}, but {told[-2000:]}"
        return self


class Stage:
    """A folder with ``train.jsonl`` and its audio, and the undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make = np.random.Generator(np.random.Philox(7))
        clips = [voice(make, 1.0 + 0.125 * (number % 9)) for number in range(24)]
        for number, clip in enumerate(clips):
            write_wav(folder / f"a{number}.wav", clip)
        self.entries = [{"audio_filepath": f"a{n}.wav", "duration": len(clip) / 16000} for n, clip in enumerate(clips)]
        self.manifest = folder / "train.jsonl"
        write_manifest(self.manifest, self.entries)
        self.undisturbed = folder / "undisturbed"
        self.train(self.undisturbed).expect(0, f"step {STEPS}/{STEPS}")

    def words(self, run: Path, *more: str) -> list[str]:
        """A command line for a second of training."""
        return ["pretrain", "-c", "tiny", "--folder", str(run), f"data.train={self.manifest}", *SMALL, *more]

    def start(self, words: Sequence[str], prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        """``nest-fn WORDS`` in a process of its own."""
        command = [*prefix, sys.executable, "-m", "nest_fn.train", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe)

    def command(self, *words: str, prefix: Sequence[str] = ()) -> Ended:
        """The same, waited for."""
        return ended(self.start(words, prefix))

    def train(self, run: Path, *more: str, prefix: Sequence[str] = ()) -> Ended:
        """A whole run."""
        return self.command(*self.words(run, *more), prefix=prefix)

    @contextmanager
    def paused(self, run: Path, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
        """A run held still after its first checkpoint; it goes on when the block ends."""
        process = self.start(self.words(run), prefix)
        try:
            end = time.monotonic() + SECONDS
            while not step_path(run / "checkpoints", EVERY).exists():
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < end, f"no checkpoint in {SECONDS:.0f} s"
                time.sleep(0.002)
            process.send_signal(signal.SIGSTOP)
            assert not step_path(run / "checkpoints", STEPS).exists(), "the run was too fast to be held"
            yield process
        except BaseException:
            process.kill()
            process.communicate()
            raise
        process.send_signal(signal.SIGCONT)

    def as_at(self, step: int, name: str) -> Path:
        """A copy of the undisturbed run as it was when it had just saved ``step``."""
        run = self.folder / name
        shutil.copytree(self.undisturbed, run)
        for later in range(step + EVERY, STEPS + 1, EVERY):
            shutil.rmtree(step_path(run / "checkpoints", later))
        return run

    def intact(self, run: Path, step: int) -> None:
        """Assert that the newest checkpoint whose digests hold is that of ``step``."""
        newest = newest_valid(run / "checkpoints")[0]
        assert newest == step_path(run / "checkpoints", step), f"newest whole checkpoint: {newest}"

    def same_end(self, run: Path) -> None:
        """Assert that the last checkpoint is the undisturbed run's, byte for byte."""
        ours, theirs = (_content(step_path(path / "checkpoints", STEPS)) for path in (run, self.undisturbed))
        assert len(theirs) >= 6, f"the checkpoint has {len(theirs)} files"
        differing = [name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
        assert not differing, f"not as undisturbed: {', '.join(differing)}"

    def recovers(self, run: Path) -> None:
        """Assert that the same command, given again, ends as the undisturbed run did."""
        self.train(run).expect(0, "resumed at step")
        self.same_end(run)

    def row(self, fault: str, ended: Ended, lost: str) -> Row:
        """A line of the table, with paths as seen from the folder of the corpus, and without this very machine."""
        message = ended.message().replace(f"{self.folder}/", "").replace("|", "\\|")
        message = re.sub(r"process \d+ on \S+", "process 4321 on HOST", message)
        return Row(fault, message, str(ended.code), lost)


def ended(process: subprocess.Popen[str]) -> Ended:
    """Wait for a command."""
    out, err = process.communicate(timeout=SECONDS)
    return Ended(process.returncode, out, err)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.exists() else {}

"""Faults of disks for ``tests.show_faults``: full, limited, read-only from the start, read-only in the middle."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import unprivileged
from tests.show_faults_stage import EVERY, STEPS, Row, Skipped, Stage, ended


def _unsaved(steps: int) -> str:
    return (
        f"the {steps} steps since the last save; started again with room, the run ends with the undisturbed one's bytes"
    )


@contextmanager
def file_system(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own in memory."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise Skipped(f"no mount ({error.strerror})") from None
    if done.returncode:
        raise Skipped("no file system may be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full(stage: Stage) -> Row:
    """The disk is full after two checkpoints."""
    with file_system(stage.folder / "disk", 2200) as disk:
        run = disk / "run"
        seen = stage.train(run).expect(4, rf"step {STEPS}: .*needs .* MB, the disk has .* MB free")
        stage.intact(run, 2 * EVERY)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        stage.recovers(run)
    return stage.row("disk full after two checkpoints (a file system of 2.2 MB)", seen, _unsaved(STEPS - 2 * EVERY))


def filled(stage: Stage) -> Row:
    """Another program fills the disk to the last byte in the middle of a run."""
    with file_system(stage.folder / "disk_filled", 20_000) as disk:
        run = disk / "run"
        with stage.paused(run) as process:
            while _put(disk / "filler", 1 << 16) or _put(run / "metrics.jsonl", 1):
                pass
        seen = ended(process).expect(4, rf"step {STEPS}: .*metrics\.jsonl.* No space left.*disk has 0.0 MB free")
        stage.intact(run, EVERY)
        (disk / "filler").unlink()
        stage.recovers(run)
    return stage.row("disk filled to the last byte by another program", seen, _unsaved(STEPS - EVERY))


def _put(path: Path, size: int) -> bool:
    """Append blanks, as long as there is room."""
    try:
        with open(path, "ab", buffering=0) as file:
            return file.write(b"\n" * size) > 0
    except OSError:
        return False


def file_limit(stage: Stage) -> Row:
    """A limit on file sizes (ulimit -f) falls below a checkpoint's in the middle of a run."""
    run = stage.folder / "limited"
    with stage.paused(run) as process:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    seen = ended(process).expect(4, rf"step {STEPS}: .*File too large; what was there is unchanged")
    stage.intact(run, EVERY)
    stage.recovers(run)
    return stage.row("files may not grow above 50 kB any more (ulimit -f)", seen, _unsaved(STEPS - EVERY))


def read_only(stage: Stage) -> Row:
    """The run folder's parent is read-only at the start."""
    place = stage.folder / "read_only"
    place.mkdir(mode=0o555)
    seen = stage.train(place / "run", prefix=unprivileged.command_prefix())
    if seen.code == unprivileged.REFUSED:
        raise Skipped("root may not give up its capabilities")
    seen.expect(2, "Permission denied; choose another with --folder")
    return stage.row("run folder in a read-only folder", seen, "nothing: no step was made")


def becomes_read_only(stage: Stage) -> Row:
    """The run folder becomes read-only in the middle of a run."""
    run = stage.folder / "becomes_read_only"
    with stage.paused(run, unprivileged.command_prefix()) as process:
        for folder in (run, run / "checkpoints"):
            folder.chmod(0o555)
    seen = ended(process).expect(4, rf"step {STEPS}/{STEPS}.*step {STEPS}: .*cannot be written: Permission denied")
    for folder in (run, run / "checkpoints"):
        folder.chmod(0o755)
    stage.intact(run, EVERY)
    stage.recovers(run)
    return stage.row("run folder becomes read-only in the middle", seen, _unsaved(STEPS - EVERY))

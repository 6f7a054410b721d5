"""The checkpoints of a run: folders ``step_00001000`` in one folder, ordered by step, not by file time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nest_fn.errors import CheckpointError
from nest_fn.files.atomic import remove

from .folder import read_meta, verify

_STEP = re.compile(r"step_(\d{1,18})")
_LEFT_OVER = re.compile(r"\.step_\d+\.(\d+\.tmp|old|gone)")


def step_path(folder: str | Path, step: int) -> Path:
    """Path of a step's checkpoint: ``folder/step_00001000``."""
    return Path(folder) / f"step_{step:08d}"


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints by increasing step, complete or damaged; none if the folder is missing."""
    folder = Path(folder)
    found = [child for child in _children(folder) if _STEP.fullmatch(child.name) and child.is_dir()]
    return sorted(found, key=step_of)


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step; None if there is none."""
    return next(iter(reversed(list_checkpoints(folder))), None)


def newest_valid(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose digests all match, or None, and what is wrong with each newer one."""
    problems = []
    for path in reversed(list_checkpoints(folder)):
        try:
            verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return path, problems
    return None, problems


def prune(
    folder: str | Path, keep_last: int = 3, keep_best: int = 0, keep_every: int = 0, best_by: str = "valid_loss"
) -> list[Path]:
    """Remove old checkpoints of a run and temporary files of killed writers; returns the removed checkpoints.

    Kept are the ``keep_last`` newest, the ``keep_best`` with the lowest ``meta[best_by]``, and those of steps divisible
    by ``keep_every``. Damaged checkpoints are neither counted nor removed. Only the single writer of the folder may
    call it, after a save. Raises ``ValueError`` if ``keep_last`` is less than 1.
    """
    if keep_last < 1:
        raise ValueError(f"prune: keep_last is {keep_last}, so that nothing would be left; want 1 or more.")
    whole: dict[Path, float | None] = {}
    for path in list_checkpoints(folder):
        try:
            score = read_meta(path)["meta"].get(best_by)
        except CheckpointError:
            continue
        whole[path] = float(score) if isinstance(score, int | float) and score == score else None
    scored = sorted((score, -step_of(path), path) for path, score in whole.items() if score is not None)
    kept = set(list(whole)[-keep_last:]) | {path for _, _, path in scored[:keep_best]}
    kept |= {path for path in whole if keep_every and step_of(path) % keep_every == 0}
    gone = [path for path in whole if path not in kept]
    for path in gone:
        _set_aside(path)
    for child in _children(Path(folder)):
        if _LEFT_OVER.fullmatch(child.name):
            remove(child, strict=False)
    return gone


def discard(path: Path) -> None:
    """Remove a checkpoint, complete or damaged. Only the single writer of the folder may call it."""
    remove(_set_aside(path), strict=False)


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint before its removal, so that a partly removed one is never found."""
    aside = path.with_name(f".{path.name}.gone")
    remove(aside, strict=False)
    return path.rename(aside)


def _children(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}.") from error


def step_of(path: Path) -> int:
    """The step of a checkpoint, from its name."""
    return int(path.name.removeprefix("step_"))

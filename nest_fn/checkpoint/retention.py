"""The checkpoints of a run, ``step_00001000`` and so on in one folder, in the order of their steps, never of clocks."""

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
    """``folder/step_00001000``."""
    return Path(folder) / f"step_{step:08d}"


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints by rising step, whole or damaged; none where the folder is missing."""
    folder = Path(folder)
    found = [child for child in _children(folder) if _STEP.fullmatch(child.name) and child.is_dir()]
    return sorted(found, key=step_of)


def latest(folder: str | Path) -> Path | None:
    """The checkpoint of the highest step, or None. There is no link that could point elsewhere."""
    return next(iter(reversed(list_checkpoints(folder))), None)


def newest_valid(folder: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every digest holds, or None, and what is wrong with each newer one."""
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
    """Remove checkpoints but the ``keep_last`` newest, the ``keep_best`` with the lowest ``meta[best_by]``, and those
    of steps divisible by ``keep_every``; also what killed writers left. Returns what was removed.

    Call it after a save, by the one writer of the folder. Damaged checkpoints neither count nor go.
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
    """Remove a checkpoint, whole or damaged. Call it as the one writer of the folder."""
    remove(_set_aside(path), strict=False)


def _set_aside(path: Path) -> Path:
    """Give a checkpoint another name, so that none is ever seen half removed."""
    aside = path.with_name(f".{path.name}.gone")
    remove(aside, strict=False)
    return path.rename(aside)


def _children(folder: Path) -> Iterable[Path]:
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror or error}.") from error


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step_"))

"""Protection of outputs: a command overwrites and deletes only what the same command wrote before.

A command claims its output path before it starts, and the path is checked again when it is written::

    place = claim(path, origin, folder=False, inputs=[source], overwrite=args.overwrite)
    if place.done:
        return
    with written(place) as temporary:
        ...

Every output has a mark, which records what it was made from and how (its *origin*) and lists its files:
``origin.json`` in a folder, ``.NAME.origin.json`` beside a file. A path that exists is refused unless its mark has the
same origin (then the work is finished, or is resumed), or unless ``overwrite`` is set and it holds only what its mark
lists.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nest_fn.errors import OutputError

from .atomic import Replaces, atomic_write, is_temporary, remove
from .inputs import read_plain
from .lock import holder
from .quoting import clip, shown

MARK = "origin.json"
_CHANGED = "was changed since it was written"
Origin = Mapping[str, Any]
"""How an output was made, as values for JSON: ``command``, ``version``, digests of inputs, settings."""


@dataclass(frozen=True)
class Place:
    """An output path that is free, or replaceable, or was begun by the same command on the same inputs."""

    path: Path
    origin: dict[str, Any]
    folder: bool
    begun: bool = False  # output of the same origin exists, complete or in part
    done: bool = False  # and it is complete
    replaced: tuple[str, ...] | None = None  # files of another origin to replace, relative to ``path``

    @property
    def mark(self) -> Path:
        """Path of the file that records the origin."""
        return mark_of(self.path, self.folder)


def mark_of(path: Path, folder: bool) -> Path:
    """Path of the mark of an output."""
    return path / MARK if folder else path.with_name(f".{path.name}.{MARK}")


def claim(
    path: str | Path, origin: Origin, *, folder: bool, inputs: Iterable[str | Path] = (),
    overwrite: bool | None = False,
) -> Place:  # fmt: skip
    """Check whether ``path`` may be written to, without changing anything. Raises ``OutputError`` if it may not.

    ``overwrite`` is None for a command without such an option.
    """
    path = Path(path)
    place = Place(Path(os.path.abspath(path)), json.loads(json.dumps(dict(origin))), folder)
    if not os.path.lexists(path):
        _check_parents(path)
        return place
    _check_kind(path, folder, list(inputs))
    if folder and not any(True for _ in path.iterdir()):
        return place
    mark = _read_mark(mark_of(place.path, folder))
    if mark is None:
        raise OutputError(f"{path}: {contents(path)}; nothing there was touched: choose another name.")
    differs, done = _difference(mark["origin"], place.origin), bool(mark.get("done")) and _is_whole(path, mark)
    if differs is None and not (overwrite and done):
        if not folder and not done:
            raise OutputError(f"{path}: {_CHANGED}; nothing there was touched: choose another name.")
        return replace(place, begun=True, done=done)
    if not overwrite:
        hint = "" if overwrite is None else ", or --overwrite it"
        raise OutputError(f"{path}: was made of something else ({differs}): choose another name{hint}.")
    obstacle = _obstacle(path, mark)
    if obstacle is not None:
        raise OutputError(f"{path}: {obstacle}; nothing there was touched: choose another name.")
    return replace(place, replaced=tuple(sorted({*map(str, mark["files"]), *([MARK] if folder else [])})))


def begin(place: Place, files: Iterable[str] | None = None) -> None:
    """Create the folder and its mark, and remove the files to replace. ``files``: all that will be in it, if known."""
    for name in place.replaced or ():
        remove(place.path / name)
        for folder in (place.path / name).relative_to(place.path).parents:
            with suppress(OSError):  # not empty
                (place.path / folder).rmdir()
    absent = [folder for folder in (place.path, *place.path.parents) if not folder.exists()]
    try:
        place.path.mkdir(parents=True, exist_ok=True)
        _write_mark(place, files, done=False)
    except BaseException:
        for folder in absent:
            with suppress(OSError):
                folder.rmdir()
        raise


def abandon(place: Place, made: bool) -> None:
    """Remove the mark that ``begin`` wrote and the folder, if it ``made`` it, after work without a file."""
    with suppress(OSError):
        if not place.begun and os.listdir(place.path) == [MARK]:
            place.mark.unlink()
            if made:
                place.path.rmdir()


def finish(place: Place, files: Iterable[str]) -> None:
    """Record in a folder's mark that all its files are written."""
    _write_mark(place, files, done=True)


@contextmanager
def written(place: Place, size: int = 0) -> Iterator[Path]:
    """A temporary path at which the block creates a file (or a folder); on success it is renamed and its mark written.

    Raises ``OutputError`` and ``CheckpointError`` as ``atomic_write`` does.
    """
    taken = place.replaced is not None or place.begun
    with atomic_write(place.path, size, place.folder, _may_still_replace(place.folder) if taken else None) as temporary:
        if place.folder:
            temporary.rmdir()  # the block creates it
        yield temporary
        if place.folder:
            files = [path.relative_to(temporary).as_posix() for path in sorted(temporary.rglob("*")) if path.is_file()]
            _write_mark(replace(place, path=temporary), files, done=True)
        else:
            digest = _sha256(temporary)
    if not place.folder:
        _write_mark(place, [place.path.name], done=True, sha256=digest)


def contents(path: Path) -> str:
    """Describe what exists at a path, for a message."""
    if not path.is_dir():
        return "is there already"
    if (path / "checkpoints").is_dir() and any((path / name).exists() for name in ("command.txt", "lock")):
        live = holder(path / "lock")
        return f"is the folder of a run that {live} is writing" if live else "is the folder of a run"
    names = sorted(entry.name for entry in path.iterdir())
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"holds {', '.join(shown(name) for name in names[:2])}{more}"


def _check_parents(path: Path) -> None:
    """Raise ``OutputError`` unless the nearest existing parent is a writable folder."""
    above = Path(os.path.abspath(path)).parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise OutputError(f"{path}: {above} is no folder; choose another name.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: {above} cannot be written to; choose another name.")


def _check_kind(path: Path, folder: bool, inputs: list[str | Path]) -> None:
    if path.is_symlink():
        raise OutputError(f"{path}: is a link to {os.readlink(path)}; name a place that is none.")
    if path.is_dir() != folder or not (folder or path.is_file()):
        found = "a folder" if path.is_dir() else "a file" if path.is_file() else "no plain file"
        raise OutputError(f"{path}: is {found}; {'a folder' if folder else 'a file'} is written: choose another name.")
    whole = Path(os.path.realpath(path))
    for source in inputs:
        given = Path(os.path.realpath(source))
        with suppress(OSError):
            if given == whole or os.path.samefile(path, source):
                raise OutputError(f"{path}: is the input itself; choose another name.")
        if folder and given.is_relative_to(whole):
            raise OutputError(f"{path}: holds the input {source}; choose another name.")
    if folder and Path.cwd().is_relative_to(whole):
        raise OutputError(f"{path}: is the current folder, or holds it; choose another name.")


def _difference(old: Origin, new: Origin) -> str | None:
    """The first difference of two origins, for a message; None if they are equal."""
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            return f"{key} was {clip(json.dumps(old.get(key)))}, is {clip(json.dumps(new.get(key)))}"
    return None


def _is_whole(path: Path, mark: Mapping[str, Any]) -> bool:
    """Whether all files that a mark lists exist; for an output of one file, whether its SHA-256 matches."""
    if path.is_dir():
        return all((path / str(name)).exists() for name in mark.get("files") or ())
    return bool(mark.get("sha256") == _sha256(path))


def _obstacle(path: Path, mark: Mapping[str, Any]) -> str | None:
    """Why an output must not be replaced, such as a file that its mark does not list; None if it may be."""
    if not isinstance(mark.get("files"), list):
        return "was not finished, so not all in it is known to be ours"
    if not path.is_dir():
        return None if _is_whole(path, mark) else _CHANGED
    ours = {*map(str, mark["files"]), MARK}
    for where, folders, names in os.walk(path):
        inside = os.path.relpath(where, path)
        for name in (*names, *(one for one in folders if os.path.islink(os.path.join(where, one)))):
            relative = os.path.normpath(os.path.join(inside, name))
            if relative not in ours and not is_temporary(name):
                return f"also holds {shown(relative)}, which was not written with it"
    return None


def _may_still_replace(folder: bool) -> Replaces:
    """The argument ``replaces`` of ``atomic_write``: the same check again, as the path may have changed meanwhile."""

    def judge(path: Path) -> str | None:
        mark = _read_mark(mark_of(path, folder))
        return contents(path) if mark is None else _obstacle(path, mark)

    return judge


def _read_mark(path: Path) -> dict[str, Any] | None:
    """Content of a mark; None if there is no mark of this library."""
    try:
        content = json.loads(read_plain(path))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("origin"), dict) else None


def _may_replace_mark(path: Path) -> str | None:
    return None if _read_mark(path) is not None else "is there already, and no mark of this library"


def _write_mark(place: Place, files: Iterable[str] | None, done: bool, **more: Any) -> None:
    content = {"written_by": "nest_fn", "origin": place.origin, "done": done, **more}
    content["files"] = None if files is None else list(files)
    with atomic_write(place.mark, 0, replaces=_may_replace_mark) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The functions of ``nest-fn data``: scan a folder, validate a manifest, describe it, pack it into shards."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nest_fn.config.training import DataConfig
from nest_fn.files.inputs import read_plain
from nest_fn.files.outputs import claim, written
from nest_fn.train.errors import DataError, UsageError
from nest_fn.version import versions

from .audio_files.audio import AUDIO_SUFFIXES, AudioInfo, audio_info, read_audio
from .audio_files.foreign import UNREAD_SUFFIXES, is_companion
from .audio_files.remote import cache_of
from .batch_plan import plan_epoch
from .buckets import choose_shapes
from .corpus.manifest import load_manifest, write_manifest
from .corpus.manifest_table import Manifest
from .corpus.reading import read_entry
from .corpus.shard_index import write_shards
from .corpus.thread_map import ordered_map

_FULL_SCALE = 32767
_END = 0.01  # seconds at the end of a file that scan decodes: it is there, and the header is right
_CLIPPED = 0.001  # an utterance with a larger fraction of full-scale samples counts as clipped


@dataclass(frozen=True)
class Report:
    """The problems that ``validate`` or ``scan`` found: one line each, in the order of the utterances or files."""

    checked: int
    problems: tuple[str, ...]
    without_hash: int = 0  # utterances whose line has no sha256 to compare with

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


def scan(
    folder: str | Path, manifest: str | Path, *, workers: int = 4, hashes: bool = False, overwrite: bool = False
) -> Report:
    """Write a manifest of all audio files below ``folder``, sorted by path; files that cannot be read are left out.

    Paths are relative to the manifest; ``hashes`` adds each file's ``sha256``. Raises ``DataError`` if nothing is
    found.
    """
    base = Path(os.path.realpath(Path(os.path.abspath(manifest)).parent))  # links resolved, as for a reader of it
    files = list(audio_files(os.path.realpath(folder)))
    origin = {"command": "data scan", "folder": os.path.abspath(folder), "hashes": hashes, **versions()}
    place = claim(manifest, origin | {"files": _listing(files)}, folder=False, inputs=files, overwrite=overwrite)

    def examine(path: str) -> dict[str, Any] | str:
        try:
            info = audio_info(path)
            begin = max(0.0, info.duration - _END)
            read_audio(path, begin, info.duration - begin, channel="first", sample_rate=info.sample_rate)
            entry = {"audio_filepath": os.path.relpath(path, base).replace(os.sep, "/"), "duration": info.duration}
            entry |= {"sample_rate": info.sample_rate}
            entry |= {"num_channels": info.channels} if info.channels != 1 else {}
            return entry | ({"sha256": _sha256(read_plain(path))} if hashes else {})
        except (DataError, OSError) as error:
            return str(error)

    found = list(ordered_map(examine, files, workers=workers, ahead=64))
    entries = [entry for entry in found if isinstance(entry, dict)]
    problems = tuple(problem for problem in found if isinstance(problem, str))
    if not entries:
        why = f": {problems[0]}" if problems else f"; looked for {', '.join(AUDIO_SUFFIXES)}"
        raise DataError(f"scan: {folder} holds no readable audio{why}")
    if not place.done:
        with written(place) as temporary:
            write_manifest(temporary, entries)
    return Report(len(files), problems)


def _listing(files: Sequence[str]) -> str:
    """SHA-256 of the files' paths and sizes."""
    return _sha256(json.dumps([[path, _size(path)] for path in files]).encode())


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def validate(
    files: Sequence[str], config: DataConfig, *, hashes: bool = False, shards: Sequence[str] = (),
    sample_rate: int = 16000,
) -> Report:  # fmt: skip
    """Read every utterance as a run does; report all that one would refuse (empty, cut, NaN, ...), and wrong hashes.

    Raises ``DataError`` with the first 20 problems if lines of the manifest are invalid.
    """
    manifest = _load(files, config, shards)

    def examine(index: int) -> tuple[str | None, bool]:
        try:
            read_entry(manifest, index, config, sample_rate)
            return _compare_hash(manifest, index) if hashes else (None, True)
        except DataError as error:
            return str(error), True

    answers = list(ordered_map(examine, range(len(manifest)), workers=config.num_workers, ahead=64))
    return Report(
        len(manifest), tuple(text for text, _ in answers if text), sum(not has_hash for _, has_hash in answers)
    )


def stats(
    files: Sequence[str], config: DataConfig, *, shards: Sequence[str] = (), sample_rate: int = 16000
) -> dict[str, Any]:
    """Statistics of a dataset: hours, lengths, rates, formats, clipped and silent utterances, the batch plan.

    ``clipped`` counts utterances with more than 0.1 % of their samples at full scale, ``silent`` those whose samples
    are all 0. Unreadable utterances are counted, not raised; raises ``DataError`` for an invalid manifest.
    """
    manifest = load_manifest(
        files, min_duration=config.min_duration, max_duration=config.max_duration, long=config.long,
        root=config.root, shards=shards, channel=config.channel, cache=cache_of(config),
        workers=config.num_workers,
    )  # fmt: skip
    config = replace(config, channel="first" if config.channel == "error" else config.channel)

    def examine(index: int) -> tuple[AudioInfo, float, bool] | None:
        try:
            info = audio_info(manifest.source(index), manifest.where(index))
            clip = read_entry(manifest, index, config, info.sample_rate if config.resample else sample_rate)
        except DataError:
            return None
        full = (clip >= _FULL_SCALE) | (clip <= -_FULL_SCALE)
        return info, float(full.mean()), not clip.any()

    answers = list(ordered_map(examine, range(len(manifest)), workers=config.num_workers, ahead=64))
    good = [answer for answer in answers if answer is not None]
    least, middle, most = np.quantile(manifest.duration, (0.0, 0.5, 1.0)).tolist()
    return {
        "utterances": len(manifest),
        "hours": float(manifest.duration.sum() / 3600),
        "duration_s": {"min": least, "median": middle, "max": most},
        "dropped": dict(manifest.dropped),
        "unreadable": len(answers) - len(good),
        "sample_rates": _counts(info.sample_rate for info, _, _ in good),
        "channels": _counts(info.channels for info, _, _ in good),
        "formats": _counts(info.format for info, _, _ in good),
        "clipped": sum(fraction > _CLIPPED for _, fraction, _ in good),
        "clipped_share": float(np.mean([fraction for _, fraction, _ in good])) if good else 0.0,
        "silent": sum(silent for _, _, silent in good),
        "digest": manifest.digest,
        "plan": _plan_numbers(manifest, config, sample_rate),
    }


def shard(
    files: Sequence[str], config: DataConfig, out_dir: str | Path, shards: int, *, tar: Sequence[str] = (),
    overwrite: bool = False,
) -> Path:  # fmt: skip
    """Pack the audio of manifests, perhaps held by archives ``tar``, into tar shards; returns the new manifest's path.

    Raises ``DataError``.
    """
    manifest = _load(files, config, tar)
    return write_shards(manifest, out_dir, shards, overwrite=overwrite)


def _plan_numbers(manifest: Manifest, config: DataConfig, sample_rate: int) -> dict[str, Any]:
    """Statistics of the first epoch's batch plan."""
    least = max(1, round(config.min_audio * sample_rate))
    length = np.maximum(np.rint(manifest.duration * sample_rate).astype(np.int64), least)
    try:
        shapes = choose_shapes(length, config, sample_rate)
    except UsageError as error:
        return {"error": str(error)}
    plan = plan_epoch(length, manifest.utterance, shapes, seed=0, epoch=0)
    return {
        "batches": len(plan),
        "shapes": [[int(rows), int(width)] for rows, width in zip(shapes.rows, shapes.width, strict=True)],
        "efficiency": plan.efficiency(length),
    }


def _load(files: Sequence[str], config: DataConfig, shards: Sequence[str]) -> Manifest:
    return load_manifest(
        files, root=config.root, shards=shards, channel=config.channel, cache=cache_of(config),
        workers=config.num_workers,
    )  # fmt: skip


def _compare_hash(manifest: Manifest, index: int) -> tuple[str | None, bool]:
    """A problem if the file's SHA-256 differs from that of its line, else None; and whether the line has one."""
    expected = manifest.fields(index).get("sha256")
    if expected is None:
        return None, False
    got = _sha256(manifest.read_bytes(index))
    same = isinstance(expected, str) and expected.lower() == got
    text = f"{manifest.where(index)}: {manifest.source(index)}: sha256 is {got}, the manifest says {expected}"
    return (None if same else f"{text}; the file changed"), True


def audio_files(folder: str) -> Iterator[str]:
    """Paths of audio files below a folder in a fixed order; links to folders are not followed, so that no loop occurs.

    Audio that is not read is among them, so that it is named; files that macOS adds beside audio are not. Raises
    ``DataError`` if ``folder`` is not one.
    """
    if not os.path.isdir(folder):
        raise DataError(f"scan: {folder} is not a folder")
    for where, folders, names in os.walk(folder):
        folders.sort()
        paths = (os.path.join(where, name) for name in sorted(names))
        yield from (path for path in paths if looks_like_audio(path) and not is_companion(path))


def looks_like_audio(path: str) -> bool:
    """Whether a name ends as one of an audio file does, be it one that is read or not."""
    return path.lower().endswith((*AUDIO_SUFFIXES, *UNREAD_SUFFIXES))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _counts(values: Any) -> dict[str, int]:
    """The count of each value; keys are strings, for JSON."""
    return {str(value): count for value, count in sorted(Counter(values).items())}

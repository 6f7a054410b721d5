"""The fault catalogue (docs/faults.md), part B: manifests and archives. What a person who has one is told.

Each case breaks one thing in a corpus that is otherwise whole. The command ends with the exit code of its kind and with
one message that names the file and line; nothing is left half done.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nest_fn.train.data.audio_files.wav import write_wav
from tests.train.faults import Captured, entries, refused, train, write_entries

CPU = torch.device("cpu")


LINES: dict[str, tuple[str, str]] = {
    "B1 not JSON": ("{nonsense}", "JSON"),
    "B1 cut": ('{"audio_filepath": "a2.wav", "dur', "JSON"),
    "B1 no object": ('["a2.wav", 1.5]', "object"),
    "B1 twice": ('{"audio_filepath": "a1.wav", "duration": 1.5}', r"stands already in .*m\.jsonl:2"),
    "B2 no path": ('{"duration": 1.5}', "audio_filepath"),
    "B2 path of another type": ('{"audio_filepath": 7, "duration": 1.5}', "audio_filepath is int"),
    "B2 negative": ('{"audio_filepath": "a2.wav", "duration": -1}', "duration -1.0 is not positive"),
    "B2 words": ('{"audio_filepath": "a2.wav", "duration": "long"}', "duration 'long' is not a number"),
    "B2 NaN": ('{"audio_filepath": "a2.wav", "duration": NaN}', "nan"),
    "B2 a list": ('{"audio_filepath": "a2.wav", "duration": [1.5]}', "duration is list"),
    "B3 beyond the end": ('{"audio_filepath": "a2.wav", "duration": 1.5, "offset": 100}', r"a2\.wav"),
    "B3 without a duration": ('{"audio_filepath": "a2.wav", "offset": 100}', "beyond 1.500 s"),
}


@pytest.mark.parametrize("case", LINES)
def test_manifest(six: Path, capsys: Captured, case: str) -> None:
    line, words = LINES[case]
    lines = (six / "m.jsonl").read_text().splitlines()
    (six / "m.jsonl").write_text("\n".join([*lines[:2], line, *lines[3:]]))
    refused(six, capsys, 3, rf"m\.jsonl:3: .*{words}")


def test_b1_all_bad_lines_are_told_at_once(six: Path, capsys: Captured) -> None:
    (six / "m.jsonl").write_text("".join(f"bad {n}\n" for n in range(30)))
    refused(six, capsys, 3, r"30 problems\n.*m\.jsonl:1: .*m\.jsonl:20: .*and 10 more")


def test_b1_windows_lines_blank_lines_and_a_byte_order_mark(six: Path) -> None:
    text = (six / "m.jsonl").read_text().replace("\n", "\r\n\r\n")
    (six / "m.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert train(six) == 0


def test_b2_numbers_in_quotes_and_missing_durations(six: Path) -> None:
    durations: list[Any] = ["1.5", None, 1.5, 1.5, 1.5, "1.50"]
    write_entries(six, [e | {"duration": d} for e, d in zip(entries(), durations, strict=True)])
    assert train(six) == 0


def test_b4_data_that_changed_between_save_and_resume(six: Path, capsys: Captured) -> None:
    assert train(six) == 0
    capsys.readouterr()
    write_entries(six, entries()[:5])
    more = "trainer.max_steps=4"
    refused(six, capsys, 4, "data: the manifests or the batching are not those of the checkpoint", more)
    assert train(six, more, "--allow-changes") == 0
    assert "the run is no longer one: data" in capsys.readouterr().err


def test_b4_data_that_moved_is_the_same_data(six: Path, capsys: Captured) -> None:
    assert train(six) == 0
    moved = six / "moved"
    moved.mkdir()
    for path in [*six.glob("*.wav"), six / "m.jsonl"]:
        path.rename(moved / path.name)
    assert train(six, f"data.train={moved / 'm.jsonl'}", "trainer.max_steps=4") == 0
    assert "resumed at step 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../outside.wav", "link.wav"])
def test_b5_paths_that_leave_the_data_folder(six: Path, capsys: Captured, name: str) -> None:
    inside = six / "inside"
    inside.mkdir()
    write_wav(six / "outside.wav", np.ones(24000, np.int16))
    (inside / "link.wav").symlink_to(six / "outside.wav")
    (inside / "m.jsonl").write_text(json.dumps({"audio_filepath": name, "duration": 1.5}) + "\n")
    jail = [f"data.train={inside / 'm.jsonl'}", f"data.root={inside}"]
    refused(six, capsys, 3, r"inside/m\.jsonl:1: .*outside of data\.root", *jail)
    assert train(six, jail[0]) == 0


def _tar(six: Path, members: list[tuple[str, bytes]], link: str | None = None) -> None:
    with tarfile.open(six / "audio_0.tar", "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link is not None:
            info = tarfile.TarInfo("link.wav")
            info.type, info.linkname = tarfile.SYMTYPE, link
            archive.addfile(info)


@pytest.mark.parametrize("case", ["absolute", "above", "link", "twice", "missing", "cut"])
def test_b5_b6_archives(six: Path, capsys: Captured, case: str) -> None:
    members = [(f"a{number}.wav", (six / f"a{number}.wav").read_bytes()) for number in range(6)]
    wicked = {"absolute": [("/etc/a.wav", b"x")], "above": [("../a.wav", b"x")], "twice": members[:1]}
    _tar(six, members[case == "missing" :] + wicked.get(case, []), "/etc/passwd" if case == "link" else None)
    archive = six / "audio_0.tar"
    if case == "cut":
        archive.write_bytes(archive.read_bytes()[:100_000])
    pattern = r"m\.jsonl:1: .*a0\.wav" if case == "missing" else r"audio_0\.tar"
    refused(six, capsys, 3, pattern, f"data.train_shards={archive}")


def test_b6_a_whole_archive_is_read(six: Path) -> None:
    _tar(six, [(f"a{number}.wav", (six / f"a{number}.wav").read_bytes()) for number in range(6)])
    for number in range(6):
        (six / f"a{number}.wav").unlink()
    assert train(six, f"data.train_shards={six / 'audio_0.tar'}") == 0

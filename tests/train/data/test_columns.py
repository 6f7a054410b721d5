"""Columns of strings and numbers, and the manifest's lines read a block at a time, against lists and single lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nest_fn.train.data.corpus import manifest_lines
from nest_fn.train.data.corpus.columns import NumberBuilder, TextBuilder, TextColumn, compact
from nest_fn.train.data.corpus.manifest import load_manifest
from nest_fn.train.data.corpus.manifest_lines import Entry, LineProblems, parse_entry, read_blocks
from nest_fn.train.errors import DataError

_texts = st.lists(st.text(st.characters(), max_size=5) | st.sampled_from(["", "a.wav", "ä 音", "\udcff"]), max_size=12)


@given(_texts, st.lists(st.integers(0, 11), max_size=15), st.integers(0, 12), st.integers(0, 12))
def test_a_column_of_strings_is_a_list_of_them(texts: list[str], numbers: list[int], first: int, last: int) -> None:
    column = TextColumn.of(texts)
    assert list(column) == texts and len(column) == len(texts) and column[1:-1] == texts[1:-1]
    assert [column[index] for index in range(-len(texts), len(texts))] == texts + texts
    assert column.block(first, last) == texts[first:last]
    indices = np.array([number for number in numbers if number < len(texts)], np.int64)
    assert list(column.take(indices)) == [texts[index] for index in indices]
    with pytest.raises(IndexError):
        column[len(texts)]


def test_blocks_of_more_than_one_size() -> None:
    texts = [f"{number:x}" * (number % 7) for number in range(10_000)]
    builder = TextBuilder()
    for first in range(0, len(texts), 3333):
        builder.extend(texts[first : first + 3333])
    assert len(builder) == len(texts)
    column = builder.column()
    assert list(column) == texts and list(column.take(np.arange(len(texts))[::-3])) == texts[::-3]


@given(
    st.lists(st.sampled_from([0, 1, -1, 2**32 - 1, 2**32, 2**40]), max_size=4), st.sampled_from([np.int64, np.float64])
)
def test_columns_of_numbers_keep_their_values(numbers: list[int], dtype: type) -> None:
    builder = NumberBuilder(dtype)
    builder.extend(numbers)
    assert len(builder) == len(numbers)
    assert builder.column().tolist() == numbers == compact(np.array(numbers, dtype)).tolist()


_LINES = [
    json.dumps({"audio_filepath": "a.wav", "duration": 2.5}), json.dumps({"audio_filepath": "b", "duration": 3}),
    json.dumps({"audio_filepath": "ä", "duration": 1.0, "offset": 2}, ensure_ascii=False), "", "  ", "\r", "{}\r", "{",
    '{"audio_filepath": "c", "duration": 1e400}', '{"audio_filepath": "c", "duration": true}', "[1]", "3",
    '{"audio_filepath": "c", "duration": 1} ', ' {"audio_filepath": "c", "duration": 1}\r', '{"audio_filename": "d"}',
    '{"audio_filepath": "x", "duration": 1, "shard_id": "3"}', '{"audio_filepath": "x", "duration": 1, "shard_id": 2}',
    '{"audio_filepath": "x", "duration": 1, "shard_id": -1}',
    '{"audio_filepath": "x", "duration": 1, "shard_id": null}',
    '{"audio_filepath": "x", "duration": 1, "shard_id": true}',
    '{"audio_filepath": "x", "duration": 1, "channel": 1}', '{"audio_filepath": "x", "channel": [0, 2], "duration": 1}',
    '{"audio_filepath": "x", "duration": 1, "channel": "left"}', '{"audio_filepath": "x", "channel": -1}',
 '{"audio_filepath": "x", "duration": -1}', "\ufeff{}",
    '{"audio_filepath": "\\udcff", "duration": 1}', '{"audio_filepath": "\\ud800", "duration": 1}', '{"a": [',
    '1]}', '{"a": "', '"}', '{"audio_filepath": " ", "duration": 1}', '{"audio_filepath": "c", "duration": NaN}',
    '{"audio_filepath": "c", "duration": 1} {}', '{"audio_filepath": "c", "offset": -0.5, "duration": 1}',
    '{"audio_filepath": "c", "duration": 1, "duration": 2, "offset": null}',
]  # fmt: skip


@given(st.lists(st.sampled_from([line.encode() for line in _LINES] + [b"\xff", b"\xff\xfe{\0}\0"]), max_size=8))
def test_a_block_reads_what_its_lines_say_one_by_one(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    file = tmp_path_factory.getbasetemp() / "blocks.jsonl"
    file.write_bytes(b"\n".join(lines))
    wanted, expected = LineProblems(), []
    for number, raw in enumerate(lines, 1):
        try:
            entry = parse_entry(raw, number)
            place = sum(len(line) + 1 for line in lines[: number - 1])
            expected += [(number, place, entry)] if entry is not None else []
        except DataError as error:
            wanted.add(f"{file}:{number}", error)
    for size in (1, 60, manifest_lines.BLOCK):
        found, problems = [], LineProblems()
        for block in read_blocks(str(file), problems, size):
            columns = zip(block.names, block.offset, block.duration, block.shard, strict=True)
            entries = [Entry(*values, block.channel.get(index, ())) for index, values in enumerate(columns)]
            found += list(zip(block.line, block.position.tolist(), entries, strict=True))
        assert problems == wanted
        assert [_comparable(entry) for entry in found] == [_comparable(entry) for entry in expected]


def _comparable(found: tuple[int, int, Entry]) -> tuple[int, int, str, float, float | None, object]:
    line, place, (name, offset, duration, *others) = found
    return line, place, name, offset, None if math.isnan(duration) else duration, others


def test_a_line_beyond_the_limit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_lines, "LONGEST", 200)
    good = json.dumps({"audio_filepath": "a.wav", "duration": 2.5}) + "\n"
    for before in (0, 1, 30_000):  # in the first block, and in a later one
        (tmp_path / "m.jsonl").write_text(good * before + " " * 199 + "\n" + " " * 201 + "\n" + good)
        with pytest.raises(DataError, match=rf"m\.jsonl:{before + 2}: the line is longer than 200 bytes"):
            list(read_blocks(str(tmp_path / "m.jsonl"), LineProblems(), 100))


def test_a_manifest_of_many_blocks_and_files(tmp_path: Path) -> None:
    names = [f"ä{number}/{number % 100}.wav" if number % 5000 == 0 else f"{number}.wav" for number in range(30_000)]
    for part in range(2):
        lines = [json.dumps({"audio_filepath": name, "duration": 2.0 + part, "text": name}) for name in names]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
    manifest = load_manifest([tmp_path / "0.jsonl", tmp_path / "1.jsonl"], check_files=False, max_duration=2.5)
    assert list(manifest.names) == names and manifest.dropped == (("longer than max_duration=2.5 s", 30_000),)
    for index in (0, 5000, 12_345, 29_999):
        assert manifest.fields(index)["text"] == names[index] and manifest.line[index] == index + 1

"""YAML as people write it, as they break it, and as an attacker would write it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nest_fn.config import Config, ConfigError
from nest_fn.config.parse.yaml_io import MAX_BYTES, MAX_DEPTH, parse, read


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),  # text in YAML 1.1 as PyYAML reads it
        ("1E5", 1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),  # 8 in YAML 1.1
        ("0x10", 16),
        ("0o10", 8),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("no", "no"),  # False in YAML 1.1
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),  # a date in YAML 1.1
        ("1_000", "1_000"),
        ("'1e-4'", "1e-4"),
        ("[1, 2.5, x]", [1, 2.5, "x"]),
        ("a: ${b.c}", {"a": "${b.c}"}),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    found = parse(text)
    assert found == value
    assert type(found) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63))
def test_numbers_come_back(number: float) -> None:
    assert parse(repr(number)) == number
    assert parse(yaml.safe_dump({"x": number}))["x"] == number


def test_merge_keys_and_aliases_work() -> None:
    assert parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    "text, line, words",
    [
        ("a: 1\nb: 2\na: 3\n", 3, "key 'a' stands twice, first on line 1"),
        ("m:\n  x: 1\n  x: 1\n", 3, "key 'x' stands twice"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "tag .*os.system' is not allowed"),
        ("a: 1\nb: !mine 2\n", 2, "tag '!mine' is not allowed"),
        ("a: [1, 2\n", 2, "expected"),
        ("a: b: c\n", 1, "mapping values are not allowed"),
        ("a: &a [*a]\n", 1, "must not contain itself"),
        ("? [1, 2]\n: 3\n", 1, "a key must be plain text"),
        ("a: 1\n---\nb: 2\n", 2, "but found another document"),
        ("\ta: 1\n", 1, "cannot start any token"),
    ],
)
def test_faults_name_the_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"broken.yaml:{line}: .*{words}"):
        Config.from_yaml(path)


def test_bomb_does_not_go_off() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"config:\d+: aliases grow beyond"):
        parse("\n".join(lines))
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("text", ["[" * 5000, "{a: " * 5000, "- " * 5000 + "x", "[" * 100 + "]" * 100])
def test_deep_nesting(text: str) -> None:
    with pytest.raises(ConfigError, match=f"nested deeper than {MAX_DEPTH}"):
        parse(text)


def test_chain_of_aliases_is_as_deep_as_it_looks_written_out() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100)]
    with pytest.raises(ConfigError, match="aliases grow"):
        parse("\n".join(lines))


@pytest.mark.parametrize("content, words", [(b"", "holds nothing"), (b"# only a remark\n", "holds nothing")])
def test_empty_files(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read(path)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"17", "a int"),
        (b"text", "a str"),
        (b"- 1", "a list"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"a: \x00", "special char"),
    ],
)
def test_roots_that_are_no_mapping(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"odd.yaml.*{words}"):
        read(path)


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfencoder:\r\n  n_layers: 2\r\n")
    assert Config.from_yaml(path).encoder.n_layers == 2


def test_large_files_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(ConfigError, match=f"larger than {MAX_BYTES} bytes"):
        read(path)
    with pytest.raises(ConfigError, match=r"nowhere.yaml: cannot be read: No such file"):
        read(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)


@given(st.text(max_size=60))
def test_any_text_is_a_value_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):  # any other error fails
        parse(text)

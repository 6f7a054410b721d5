"""``nest-fn config keys``: every key, from the one source in the code, right about defaults, types and ranges."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nest_fn.config import Config
from nest_fn.config.keys import UNITS, ConfigKey, all_keys, as_markdown, as_text, find_keys
from nest_fn.config.limits import LIMITS
from nest_fn.train.cli.main import main

KEYS = all_keys()
Captured = pytest.CaptureFixture[str]


def names(section: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from names(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_every_key_is_there_once() -> None:
    assert sorted(key.name for key in KEYS) == sorted(names(Config()))


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_says_what_it_means(key: ConfigKey) -> None:
    """A new key wants a comment at the end of its line: ``unit; meaning``, or the meaning alone."""
    assert len(key.meaning.split()) >= 2, f"{key.name}: say in a comment at the end of its line what it means"
    assert "\n" not in key.meaning and not key.meaning.endswith(".")
    assert key.unit in UNITS | {""}
    assert bool(key.range) == (key.name in LIMITS)


def test_defaults_are_those_of_the_config() -> None:
    """Every default, given as an override, changes nothing; where it is null the config may derive a value."""
    alone = ("preprocessor.window_size", "preprocessor.window_stride", "optim.sched.warmup_steps")  # exclude others
    overrides = [f"{key.name}={key.default}" for key in KEYS if key.default != "null" and key.name not in alone]
    assert Config.from_dict({}, overrides) == Config()
    shown = Config().to_dict()
    for key in KEYS:
        value = shown
        for part in key.name.split("."):
            value = value[part]
        if key.default != "null" and value is not None:
            assert yaml.safe_load(key.default) in (value, str(value)), key.name


def test_known_keys() -> None:
    found = {key.name: key for key in KEYS}
    assert found["trainer.rank_timeout_s"][1:5] == ("float", "60.0", "seconds", "above 0, at most 1e8")
    assert found["encoder.att_context_size"].type == "list of [int, int]"
    assert found["data.channel"].type == "error or mix or first or int"
    assert found["masking.mask_value"].meaning.startswith("null: embedding")  # as YAML has it, not None


def test_patterns() -> None:
    assert [key.name for key in find_keys(["trainer.keep_*"])] == [
        f"trainer.keep_{x}" for x in ("last", "best", "every")
    ]
    assert {key.name for key in find_keys(["DROPOUT"])} >= {"encoder.dropout", "encoder.dropout_att"}
    assert "data.timeout_s" in {key.name for key in find_keys(["wait for a worker"])}
    assert find_keys([]) == KEYS
    assert [key for key in KEYS if key in find_keys(["optim.*", "sample_rate"])] == find_keys(
        ["sample_rate", "optim.*"]
    )


def test_the_command(capsys: Captured) -> None:
    assert main(["config", "keys", "batch_seconds"]) == 0
    assert capsys.readouterr().out == as_text(find_keys(["batch_seconds"])) and len(find_keys(["batch_seconds"])) == 1
    assert main(["config", "keys", "--markdown"]) == 0
    assert capsys.readouterr().out == as_markdown(KEYS)
    assert main(["config", "keys", "bath_seconds"]) == 2
    assert "similar are data.batch_seconds" in capsys.readouterr().err


def test_completion(tmp_path: Path, capsys: Captured) -> None:
    """In a bash: commands, options, and keys of the config, without a space behind the ``=``."""
    pytest.importorskip("shtab", reason="the optional package shtab makes the script")
    if shutil.which("bash") is None:
        pytest.skip("no bash to try the script in")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    ask = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); compopt() { echo nospace; }; _nest_fn; '
    ask += 'echo "${COMPREPLY[@]}"'

    def completed(line: str) -> list[str]:
        words = ["bash", "-c", ask, "bash", str(tmp_path / "script"), *line.split(" ")]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout.split()

    assert completed("nest-fn pretr") == ["pretrain"]
    assert completed("nest-fn pretrain --resume mu") == ["must"]
    assert completed("nest-fn pretrain trainer.keep_b") == ["nospace", "trainer.keep_best="]

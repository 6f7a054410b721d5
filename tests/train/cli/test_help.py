"""Help and version: at once, without torch; every command with its defaults and an example that is right."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys

import pytest

from nest_fn.train.cli.examples import EXAMPLES
from nest_fn.train.cli.main import _parser, _read, main
from nest_fn.version import __version__

MEGABYTES = 100  # of memory at the most

ALONE = """
import json, re, sys
from pathlib import Path
from nest_fn.train.cli.main import main
codes = []
for argv in json.loads(sys.argv[1]):
    try:
        codes.append(main(argv))
    except SystemExit as end:
        codes.append(end.code)
# Not getrusage: on Linux its peak is at least that of the process that started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
print(json.dumps({"codes": codes, "torch": "torch" in sys.modules, "peak": peak}))
"""


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every parser that runs something, by the command's words."""
    found, waiting = {}, [_parser()]
    while waiting:
        parser = waiting.pop()
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        waiting += [inner for group in groups for inner in group.choices.values()]
        if not groups:
            found[parser.prog.partition(" ")[2]] = parser
    return found


def test_every_command_has_an_example() -> None:
    assert EXAMPLES.keys() == commands().keys()


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_shows_a_right_example_and_all_defaults(name: str) -> None:
    program, *words = shlex.split(EXAMPLES[name])
    assert program == "nest-fn" and EXAMPLES[name].startswith(f"nest-fn {name} ")
    assert callable(_read(words).run_command)
    parser = commands()[name]
    text = parser.format_help()
    assert f"example:\n  {EXAMPLES[name]}" in text
    flat = re.sub(r"\s+", " ", text)
    for action in parser._actions:
        if action.option_strings and action.default not in (None, False, [], argparse.SUPPRESS):
            assert action.help and f"(default: {action.default})" in flat, action.dest


def test_words_alone_need_no_torch() -> None:
    asked = [["--help"], ["--version"], ["pretrain", "--help"], ["data", "scan", "--help"], ["extract", "--nonsense"]]
    done = subprocess.run([sys.executable, "-c", ALONE, json.dumps(asked)], capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["codes"] == [0, 0, 0, 0, 2] and not found["torch"]
    assert found["peak"] < MEGABYTES


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"nest-fn {__version__}\n"

"""A small, repeatable part of ``python -m tests.fuzz_cli``: every command, every option, every kind of file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nest_fn.train.cli import main as cli
from nest_fn.train.cli import option_types
from nest_fn.train.errors import UsageError
from tests import fuzz_cli
from tests.fuzz_stage import Stage, staged

SLOW = ("pretrain", "finetune-ctc", "probe", "analyse")  # a line that is accepted trains, or computes for long


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with staged() as made:
        yield made


def test_every_command_has_a_good_line(stage: Stage) -> None:
    """Or else nothing but its missing arguments would be tried."""
    for command, parser in fuzz_cli.commands().items():
        takes = fuzz_cli.arguments(parser)
        needed = {name for name, action in takes.items() if action.required and action.nargs not in ("*", "?")}
        assert needed <= stage.good(command).keys() <= takes.keys(), f"give fuzz_stage a good value for {command}"


@pytest.mark.parametrize("command", list(fuzz_cli.commands()))
def test_nonsense(command: str, stage: Stage) -> None:
    fuzz_cli.fuzz(command, stage, 8 if command in SLOW else 25, derandomize=True)


@pytest.mark.parametrize("command", list(fuzz_cli.commands()))
@pytest.mark.parametrize("value", ["", "\0", "\ud800", "\n"])
def test_what_no_option_takes(command: str, value: str, stage: Stage) -> None:
    """Refused in one line that names the option."""
    takes, good = fuzz_cli.arguments(fuzz_cli.commands()[command]), stage.good(command)
    for name, action in takes.items():
        if action.option_strings and action.nargs != 0 and (value != "\n" or action.type is not option_types.path):
            others = [word for other in good if other != name for word in fuzz_cli.written(takes[other], good[other])]
            with pytest.raises(UsageError, match=f"argument {'/'.join(action.option_strings)}: ") as caught:
                cli._read([*command.split(), *others, *fuzz_cli.written(action, [value])])
            assert len(str(caught.value)) < 600

"""Nonsense on the command line: ``python -m tests.fuzz_cli [EXAMPLES]`` tries so many lines of every command.

Options and arguments are read off the parser itself, so that a new one is tried at once. A line starts from a good one;
some of its values are replaced: numbers that cannot be, texts of any letters, files of every kind. What must hold: the
command ends within its time with an exit code of the table; if it failed, standard error holds one error, told in short
lines, and no file that was not there before.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nest_fn.train.cli import main as cli
from tests.fuzz_stage import Stage, staged

CODES = {0, 1, 2, 3, 4, 5, 6, 75, 130, 141}
LIMIT_S = 60
LONGEST = 1000  # characters of a line of an error
LINES = 22  # of a list of problems
NUMBERS = (
    "0", "-1", "1", "nan", "inf", "-inf", "1e400", "9" * 30, "-" + "9" * 30, "9" * 5000, "0x10", "1_0", " 1", "1.5", "",
    " ", "٣", "1e-320", "True", "null",
)  # fmt: skip
TEXTS = (
    "\n", "a\nb", "\x1b[31m", "\0", "\ud800", "\udcff", "é", "语音", "'", '"', "%s", "{}", "x" * 300, "x" * 5000, "a,b",
    ",", "=", "a=", "=b", "a=b=c", "-", "--", ".", "*", "${x}", "!!python/object", "[" * 100, "&a [*a]", "{a: 1}",
    "[1, 2]",
)  # fmt: skip
# What takes long once its arguments are right is not run to the end, unless the file that it reads is the odd one.
NEVER_RUN = ("bench", "demo", "data synth")
RUN_ON_ODD_INPUT = ("export", "probe")


class Case(NamedTuple):
    """One line, and which of its arguments were replaced."""

    command: str
    argv: list[str]
    changed: tuple[str, ...]


def commands(parser: argparse.ArgumentParser | None = None, name: str = "") -> dict[str, argparse.ArgumentParser]:
    """Every command's own parser by name, ``data scan``."""
    parser = parser or cli._parser()
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        return {name: parser}
    found: dict[str, argparse.ArgumentParser] = {}
    for word, child in below[0].choices.items():
        found |= commands(child, f"{name} {word}".strip())
    return found


def arguments(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a command takes, by name, without ``--help``."""
    return {action.dest: action for action in parser._actions if not isinstance(action, argparse._HelpAction)}


def written(action: argparse.Action, values: list[str]) -> list[str]:
    """Values as they stand on a command line. An option's are joined to it, for they may begin with a dash."""
    if not action.option_strings:
        return values
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return [flag]
    return [f"{flag}={values[0]}"] if action.nargs is None else [flag, *values]


@st.composite
def cases(draw: st.DrawFn, command: str, stage: Stage) -> Case:
    """A line of a command with one or two of its values replaced."""
    takes = arguments(commands()[command])
    good = stage.good(command)
    changed = draw(st.lists(st.sampled_from(sorted(takes)), min_size=1, max_size=2, unique=True))
    argv = command.split()
    for name, action in takes.items():
        if name in changed:
            count = 1 if action.nargs in (None, "?") else draw(st.integers(1, 2))
            argv += written(action, [draw(_values(name, action, stage)) for _ in range(count)])
        elif name in good:
            argv += written(action, good[name])
    return Case(command, argv, tuple(changed))


def _values(name: str, action: argparse.Action, stage: Stage) -> st.SearchStrategy[str]:
    nonsense = st.sampled_from([*NUMBERS, *TEXTS]) | st.text(max_size=20).filter(_stays_here)
    if name in ("overrides", "rest"):
        keys = st.sampled_from(stage.keys)
        return nonsense | st.builds(lambda key, value: f"{key}={value}", keys, nonsense | st.sampled_from(stage.odd))
    return nonsense | st.sampled_from(stage.odd)


def _stays_here(text: str) -> bool:
    """Whether a path stays below the folder at hand."""
    return "/" not in text and ".." not in text and "~" not in text


def runs(case: Case) -> bool:
    """Whether the command is to be run, and not only its line read."""
    if case.command in RUN_ON_ODD_INPUT:
        return bool({"checkpoint", "train", "test"} & set(case.changed))
    return case.command not in NEVER_RUN


class Ended(NamedTuple):
    """What came of a line."""

    code: object
    out: str
    err: str
    seconds: float


def run(case: Case) -> Ended:
    """The command in this process."""
    out, err, start = io.StringIO(), io.StringIO(), time.monotonic()
    with _limited(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("default")
        code: object
        if runs(case):
            code = cli.main(case.argv)
        else:
            try:
                cli._read(case.argv)
                code = 0
            except Exception as error:  # as main tells it
                code, _ = cli.exit_code(error), err.write(cli.error_text(error) + "\n")
    return Ended(code, out.getvalue(), err.getvalue(), time.monotonic() - start)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """An end to what waits for ever."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"no end within {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(case: Case, stage: Stage) -> Ended:
    """Run a line and raise ``AssertionError`` if its end is not as it must be."""
    before = stage.files()
    ended = run(case)
    after = stage.files()
    made = after.keys() - before.keys()
    changed = sorted(path for path in before if before[path] != after.get(path))
    stage.tidy(made, changed)
    say = f"{[word[:200] for word in case.argv]} -> {ended.code!r}\n{ended.err[-3000:]}"
    assert ended.code in CODES, say
    assert not changed, f"{say}\nchanged or lost: {changed[:5]}"
    assert "Traceback" not in ended.err + ended.out, say
    if ended.code in (0, 1) and case.command == "doctor":
        return ended
    if ended.code != 0 and case.command != "data scan":  # which writes what it can read, and ends with 3
        assert not made, f"{say}\nleft behind: {sorted(made)[:5]}"
        _check_error(ended, say)
    return ended


def _check_error(ended: Ended, say: str) -> None:
    """One error, in one line or with a short list below it; problems of data may stand on standard output."""
    lines = ended.err.splitlines()
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if not errors:
        assert ended.code in (3, 5) and ended.out, say
        return
    told = lines[errors[0] :]
    assert len(errors) == 1 and len(told) <= LINES and all(line.startswith("  ") for line in told[1:]), say
    assert max(map(len, told)) < LONGEST, say
    assert all(letter.isprintable() for line in told for letter in line), say


def fuzz(command: str, stage: Stage, examples: int, derandomize: bool) -> Counter[str]:
    """Try so many lines of a command; how often each exit code came."""
    ends: Counter[str] = Counter()

    @settings(max_examples=examples, derandomize=derandomize, deadline=None, database=None, print_blob=False,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=cases(command, stage))
    def attempt(case: Case) -> None:
        ends[str(check(case, stage).code)] += 1

    attempt()
    return ends


def main(argv: list[str]) -> int:
    """A table: command, lines tried, exit codes; what failed after it."""
    examples, failed = int(argv[0]) if argv else 300, []
    names = argv[1:] or list(commands())
    with staged() as stage:
        for name in names:
            start = time.monotonic()
            try:
                ends = fuzz(name, stage, examples, derandomize=False)
            except (Exception, ExceptionGroup) as error:
                failed.append(name)
                found = error.exceptions if isinstance(error, ExceptionGroup) else [error]
                for number, one in enumerate(found):
                    print(f"{name:<16} FAILURE {number}: {str(one)[-2500:]}", flush=True)
                continue
            codes = "  ".join(f"{code}: {count}" for code, count in sorted(ends.items()))
            print(f"{name:<16} {sum(ends.values()):6} lines  {time.monotonic() - start:6.1f} s  {codes}", flush=True)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a person sees: a bar that is written over on a terminal, plain lines in a log."""

from __future__ import annotations

import io
import itertools
from typing import Any

import pytest

from nest_fn.train.cli.console import ConsoleReporter, fit_line
from nest_fn.train.run.record.sentences import bar, clock, sentence


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def _line(step: int, **values: Any) -> dict[str, Any]:
    numbers = {
        "loss": 4.0,
        "accuracy": 0.25,
        "unigram_accuracy": 0.125,
        "masked_share": 0.3,
        "lr": 1e-3,
        "grad_norm": 2,
    }
    return {"step": step, **numbers, "time": {"seconds": 1.0, "audio_seconds_per_second": 321.4}, **values}


VALID = {"loss": 3.5, "accuracy": 0.5, "unmasked_accuracy": 0.6, "unigram_accuracy": 0.1, "coverage": 0.9,
         "perplexity": 30.0}  # fmt: skip


def _clock() -> Any:
    ticks = itertools.count(0, 10)
    return lambda: float(next(ticks))


def _run(out: io.StringIO) -> str:
    reporter = ConsoleReporter(out, _clock())
    reporter.say("hello")
    for step in (10, 20, 30):
        reporter.progress(step, 40, _line(step))
    reporter.warn("it looks sick")
    reporter.progress(30, 40, {"step": 30, "valid": VALID})
    reporter.progress(40, 40, _line(40))
    return out.getvalue()


def test_a_log_gets_plain_lines() -> None:
    lines = _run(io.StringIO()).splitlines()
    assert len(lines) == 7 and not any("\r" in line or "\033" in line for line in lines)
    assert lines[0] == "hello" and lines[4] == "warning: it looks sick"
    assert lines[1].startswith("step 10/40  loss 4.0000  accuracy 0.2500 (commonest 0.1250)  masked 30%")
    assert "321 audio-s/s" in lines[1] and "to go" not in lines[1]
    assert lines[2].endswith("0:20 to go") and lines[3].endswith("0:10 to go")
    assert "validation: loss 3.5000  accuracy 0.5000 masked, 0.6000 unmasked" in lines[5]


def test_a_terminal_gets_a_bar_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = _run(Terminal())
    assert text.count("\n") == 4  # said, warned, validated, the last step; the bar itself never ends a line
    assert "\r\033[K[######------------------] step 10/40" in text
    assert text.index("[############------------] step 20/40") < text.index("[##################------] step 30/40")
    assert "\r\033[Kwarning: it looks sick\n" in text and text.endswith("\n")


def test_the_time_to_go_counts_from_where_this_run_began() -> None:
    out = io.StringIO()
    reporter = ConsoleReporter(out, _clock())
    reporter.progress(1000, 1100, _line(1000))  # resumed: 1000 steps took no time of this run
    reporter.progress(1050, 1100, _line(1050))
    assert out.getvalue().splitlines()[1].endswith("0:10 to go")


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_bar_and_sentence() -> None:
    assert bar(0, 10, 4) == "[----]" and bar(10, 10, 4) == "[####]" and bar(0, 0, 4) == "[----]"
    assert "to go" not in sentence(_line(3), 9, None) and sentence(_line(3), 9, 61.0).endswith("1:01 to go")


@pytest.mark.parametrize("columns", [1, 20, 80, 400])
def test_a_bar_fits_the_terminal_as_wide_as_it_is_now(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Terminal()
    reporter = ConsoleReporter(out, _clock())
    reporter.progress(1, 100, _line(1))
    monkeypatch.setenv("COLUMNS", str(columns))
    start = len(out.getvalue())
    reporter.progress(2, 100, _line(2))
    drawn = out.getvalue()[start:].removeprefix("\r\033[K")
    assert len(drawn) < columns and "\n" not in drawn
    assert drawn.startswith("[") == (columns == 400)


def test_the_bar_goes_before_the_words() -> None:
    assert fit_line("[##--]", "step 1/2", 16) == "[##--] step 1/2"
    assert fit_line("[##--]", "step 1/2", 15) == "step 1/2"
    assert fit_line("[##--]", "step 1/2", 6) == "step "

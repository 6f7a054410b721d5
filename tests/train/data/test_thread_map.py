"""The thread pool: order, limits, errors, time-outs (faults G1, G2)."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator

import pytest

from nest_fn.train.data.corpus.thread_map import ordered_map
from nest_fn.train.errors import DataError


@pytest.mark.parametrize("workers", [0, 1, 3, 8])
@pytest.mark.parametrize("ahead", [0, 1, 20])
def test_results_come_in_order(workers: int, ahead: int) -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.02 if number % 5 == 0 else 0)
        return number * number

    assert list(ordered_map(slow_at_first, range(30), workers=workers, ahead=ahead)) == [n * n for n in range(30)]
    assert list(ordered_map(slow_at_first, [], workers=workers, ahead=ahead)) == []


def test_waiting_ends_when_it_is_asked_to() -> None:
    held, asked = threading.Event(), threading.Event()

    def wait_at_two(number: int) -> int:
        if number == 2:
            held.wait(60)
        return number

    threading.Timer(0.3, asked.set).start()
    begin = time.monotonic()
    assert list(ordered_map(wait_at_two, range(9), workers=2, timeout_s=50, stopped=asked.is_set)) == [0, 1]
    assert 0.2 < time.monotonic() - begin < 5
    held.set()


def test_signals_disturb_no_waiting() -> None:
    """A signal just before a slice of waiting ends must not make it endless, as SimpleQueue.get does in Python 3.11."""
    program = """
import signal, time
from nest_fn.train.data.corpus.thread_map import ordered_map
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
end = time.monotonic() + 3
found = list(ordered_map(lambda n: n and time.sleep(60), range(3), workers=1, stopped=lambda: time.monotonic() > end))
signal.setitimer(signal.ITIMER_REAL, 0)
print(found)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "[0]\n"


@pytest.mark.parametrize("workers, ahead, most", [(0, 9, 1), (1, 1, 1), (2, 5, 5), (4, 1, 4)])
def test_no_more_than_asked_is_taken_ahead(workers: int, ahead: int, most: int) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number

    for done, _ in enumerate(ordered_map(lambda n: n, items(), workers=workers, ahead=ahead)):
        assert len(taken) - done <= most


def _raise_at_five(number: int) -> int:
    if number == 5:
        raise DataError("item five: cut")
    return number


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_in_its_place_with_its_traceback(workers: int) -> None:
    results = ordered_map(_raise_at_five, range(20), workers=workers, ahead=9)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="item five: cut") as caught:
        next(results)
    assert "_raise_at_five" in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError])
def test_no_way_for_a_worker_to_end_unseen(error: type[BaseException]) -> None:
    def die(_: int) -> None:
        raise error

    with pytest.raises(error):
        list(ordered_map(die, range(3), workers=2))


def test_a_hanging_worker_is_noticed() -> None:
    release = threading.Event()
    started = time.monotonic()
    try:
        with pytest.raises(DataError, match=r"loader: no answer in 0.2 s for batch-7"):
            list(ordered_map(lambda _: release.wait(), ["batch-7"], workers=1, timeout_s=0.2, name="loader"))
        assert time.monotonic() - started < 5
    finally:
        release.set()


def test_threads_end_when_the_consumer_does() -> None:
    before = threading.active_count()
    stream = ordered_map(lambda n: n, iter(int, 1), workers=4, ahead=8)  # without end
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before


def test_a_program_ends_although_a_worker_hangs() -> None:
    program = (
        "import time\nfrom nest_fn.train.data.corpus.thread_map import ordered_map\n"
        "stream = ordered_map(lambda n: time.sleep(n), [0, 600], workers=2)\nnext(stream)\nprint('done')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr

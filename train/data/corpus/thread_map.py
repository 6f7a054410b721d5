"""A function over many items in threads, with the results in order and only so many ahead.

Threads, not processes: decoding and reading release the interpreter's lock, results need no copy between processes,
there is nothing to fork beside a GPU, and no worker can be killed without the whole command. Two threads decode FLAC
1.7 times as fast as one on two cores. The threads are daemons: a command that ends never waits for them.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from nest_fn.train.errors import DataError

A = TypeVar("A")
B = TypeVar("B")

_SLICE = 0.2  # seconds between two looks at ``stopped``


class _Task(Generic[A, B]):
    """One item on its way: set once by a worker, awaited by the consumer."""

    def __init__(self, item: A) -> None:
        self.item = item
        self.done = threading.Event()  # SimpleQueue.get may wait for ever after a signal near its timeout (Python 3.11)
        self.value: B | None = None
        self.error: BaseException | None = None


def ordered_map(
    function: Callable[[A], B],
    items: Iterable[A],
    *,
    workers: int = 0,
    ahead: int = 0,
    timeout_s: float | None = None,
    name: str = "worker",
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[B]:
    """``map(function, items)`` by ``workers`` threads (0: in the caller), at most ``ahead`` items ahead.

    The order of results is that of the items for any number of workers. An exception is raised where its item would
    have come, with its own traceback. Raises ``DataError`` when a worker needs more than ``timeout_s`` seconds.
    The results end early if ``stopped`` turns true while one is waited for.
    """
    if workers <= 0:
        yield from map(function, items)
        return
    queue: SimpleQueue[_Task[A, B] | None] = SimpleQueue()
    for number in range(workers):
        threading.Thread(target=_work, args=(function, queue), name=f"{name}-{number}", daemon=True).start()
    source = iter(items)
    waiting: deque[_Task[A, B]] = deque()
    try:
        while True:
            for item in islice(source, max(workers, ahead) - len(waiting)):
                waiting.append(_Task(item))
                queue.put(waiting[-1])
            if not waiting:
                return
            yield _result(waiting.popleft(), timeout_s, name, stopped)
    except _GivenUp:
        return
    finally:
        _drain(queue)
        for _ in range(workers):
            queue.put(None)


class _GivenUp(Exception):
    """Nobody wants the results any more."""


def _result(task: _Task[A, B], timeout_s: float | None, name: str, stopped: Callable[[], bool]) -> B:
    """What came of a task, awaited in slices so that a request to stop is heard."""
    end = math.inf if timeout_s is None else time.monotonic() + timeout_s
    while not task.done.wait(min(_SLICE, max(end - time.monotonic(), 0.0))):
        if stopped():
            raise _GivenUp
        if time.monotonic() >= end:
            raise DataError(
                f"{name}: no answer in {timeout_s} s for {task.item}; is the storage reachable? "
                "Raise data.timeout_s if it is only slow"
            )
    if task.error is not None:
        raise task.error
    return task.value  # type: ignore[return-value]


def _work(function: Callable[[A], B], queue: SimpleQueue[_Task[A, B] | None]) -> None:
    """A worker's life: tasks until the end mark."""
    while (task := queue.get()) is not None:
        try:
            task.value = function(task.item)
        except BaseException as error:  # whatever it is, the consumer shall raise it
            task.error = error
        task.done.set()
        del task  # a result must not stay alive while the worker waits


def _drain(queue: SimpleQueue[_Task[A, B] | None]) -> None:
    """Forget tasks that no worker has begun."""
    while True:
        try:
            queue.get_nowait()
        except Empty:
            return

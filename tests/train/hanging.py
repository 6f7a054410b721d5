"""Storage that hangs: plain files that are there, and whose opening never returns.

    python -m tests.train.hanging PATTERN pretrain ...

is ``nest-fn pretrain ...`` on a machine where no file whose path matches PATTERN ever opens.
"""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_stuck: dict[re.Pattern[str], threading.Event] = {}


def _wait(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _stuck or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    path = os.fsdecode(arguments[0])
    for pattern, opened in list(_stuck.items()):
        if pattern.search(path):
            opened.wait()


sys.addaudithook(_wait)


@contextmanager
def hanging(pattern: str) -> Iterator[None]:
    """Within the block no file whose path matches opens; after it those that were waited for do."""
    key, opened = re.compile(pattern), threading.Event()
    _stuck[key] = opened
    try:
        yield
    finally:
        del _stuck[key]
        opened.set()


if __name__ == "__main__":
    from nest_fn.train.cli.main import process

    with hanging(sys.argv.pop(1)):
        process()

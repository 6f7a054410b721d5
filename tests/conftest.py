"""For all tests: few threads, no network, hypothesis without a clock."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tests run side by side

import hypothesis

hypothesis.settings.register_profile("nest_fn", deadline=None, print_blob=True)
hypothesis.settings.load_profile("nest_fn")


def _only_this_machine(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse connections to other machines; ranks of one test talk to each other over the loopback."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if isinstance(address, tuple) and not str(address[0]).startswith(("127.", "::1", "localhost")):
            raise PermissionError(f"tests must not use the network; a connection to {address!r} was asked for")


sys.addaudithook(_only_this_machine)


def pytest_configure() -> None:
    """Under nohup or in the background of a shell signals come ignored, and children would ignore them too."""
    for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)

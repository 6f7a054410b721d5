"""``nest-fn replay``: repeats one step of a run in order to inspect it."""

from __future__ import annotations

import argparse
from typing import Any

from nest_fn.train.errors import NonFiniteError

from . import option_types
from .stream import show


def add_commands(commands: Any) -> None:
    """Add the subcommand ``replay``."""
    text = "make one step of a run again and look into it; nothing is written"
    parser = commands.add_parser("replay", help=text, description=text)
    parser.set_defaults(run_command=_replay)
    parser.add_argument("run", type=option_types.path, help="run folder")
    parser.add_argument(
        "step",
        type=option_types.whole(0, 10**18 - 1),
        help="updates done before the one to look at, as messages name it",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. trainer.compile=off trainer.device=cpu")


def _replay(args: argparse.Namespace) -> int:
    from nest_fn.train.commands.replay import replay, report

    from .console import ConsoleReporter

    found = replay(args.run, args.step, args.overrides, ConsoleReporter())
    for line in report(found):
        show(line)
    return 0 if found.finite else NonFiniteError.exit_code

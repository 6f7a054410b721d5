"""``nest-fn completion``: a script with which a shell completes commands, options, file names and keys of the config.

The script is made by the package shtab (extra ``completion``) and calls nothing: completion starts no Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from nest_fn.extras import load_extra
from nest_fn.train.errors import UsageError

from . import option_types
from .stream import show

SHELLS = ("bash", "zsh", "fish", "tcsh")
_BASH = """_nest_fn_keys() {{ compgen -W "{keys}" -- "$1"; }}"""
_BASH_END = """
_nest_fn() {  # no space after the = of a key
  _shtab_nest_fn "$@"
  [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o bashdefault -F _nest_fn nest-fn
"""
_ZSH = """_nest_fn_keys() {{
  local -a keys=({keys})
  compadd -S '' -a keys
}}"""


def add_commands(commands: Any, parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Add the subcommand ``completion``; ``parser`` makes the parser of all commands."""
    text = "print a script for a shell to complete commands, options and keys (extra completion)"
    completion = commands.add_parser("completion", help=text, description=text)
    completion.add_argument(
        "shell", choices=SHELLS, help="bash: save it as ~/.local/share/bash-completion/completions/nest-fn"
    )
    completion.set_defaults(run_command=lambda args: _completion(args.shell, parser()))


def _completion(shell: str, parser: argparse.ArgumentParser) -> None:
    try:
        shtab = load_extra("shtab")
    except ImportError as error:
        raise UsageError(f"completion: {error}") from error
    from nest_fn.config.keys import all_keys

    names = " ".join(f"{key.name}=" for key in all_keys())
    known = {"bash": _BASH.format(keys=names), "zsh": _ZSH.format(keys=names)}
    for action in _actions(parser):
        if action.type is option_types.path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar == "KEY=VALUE":
            action.complete = dict.fromkeys(known, "_nest_fn_keys")  # type: ignore[attr-defined]
    show(shtab.complete(parser, shell=shell, preamble=known) + (_BASH_END if shell == "bash" else ""))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options and arguments of a parser and of all its subcommands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from _actions(inner)

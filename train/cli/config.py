"""The config that a command line names, and ``nest-fn config``: show a config, compare two, list the keys."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nest_fn.config import Config
from nest_fn.config.writer import to_text
from nest_fn.files.quoting import clip
from nest_fn.train.errors import UsageError

from . import option_types
from .stream import show

DEFAULT = "nest_large"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``-c CONFIG`` and overrides, which ``read_config`` reads."""
    parser.add_argument(
        "-c",
        "--config",
        type=option_types.path,
        default=DEFAULT,
        help="YAML file, or a preset's name (nest_small, tiny)",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. data.train=a.jsonl optim.lr=2e-3")


def read_config(args: argparse.Namespace) -> Config:
    """The config that ``-c`` and the overrides name. Raises ``ConfigError``."""
    return config_of(args.config or DEFAULT, args.overrides)


def config_of(name: str, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file or, if there is no such file, of a preset. Raises ``ConfigError``."""
    if Path(name).exists() or name.endswith((".yaml", ".yml")) or "/" in name:
        return Config.from_yaml(name, overrides)
    return Config.preset(name, overrides)


def add_commands(commands: Any) -> None:
    """Add the subcommands of ``config``."""
    text = "show a config, how two differ, or what each key means"
    actions = commands.add_parser("config", help=text, description=text).add_subparsers(required=True, metavar="ACTION")
    shown = _add(actions, "show", _show, "print a complete config")
    shown.add_argument("config", type=option_types.path, help="YAML file or preset")
    shown.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to it")
    diff = _add(actions, "diff", _diff, "print the keys in which two configs differ")
    diff.add_argument("config", type=option_types.path, help="YAML file or preset")
    diff.add_argument("other", type=option_types.path, help="another")
    diff.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to both")
    keys = _add(actions, "keys", _keys, "print keys with type, default, unit, range and meaning")
    keys.add_argument(
        "pattern", nargs="*", type=option_types.key, help="part of a name or of its meaning, or a name with * and ?"
    )
    keys.add_argument("--markdown", action="store_true", help="as tables")


def _add(actions: Any, name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    parser.set_defaults(run_command=run)
    return parser


def _show(args: argparse.Namespace) -> None:
    _check_overrides("show", args.overrides)
    show(to_text(config_of(args.config, args.overrides).to_dict()), end="")


def _diff(args: argparse.Namespace) -> None:
    from nest_fn.layers.tree import flatten

    if "=" in args.other:
        raise UsageError("config diff: want two configs, got 1.")
    _check_overrides("diff", args.overrides)
    before, after = (flatten(config_of(name, args.overrides).to_dict()) for name in (args.config, args.other))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            show(f"{key}: {before.get(key)} -> {after.get(key)}")


def _check_overrides(action: str, words: list[str]) -> None:
    """Raise ``UsageError`` for a word that is no override, such as a further config."""
    for word in words:
        if "=" not in word:
            configs = "one config" if action == "show" else "two configs"
            raise UsageError(f"config {action}: want {configs} and KEY=VALUE, got '{clip(word, 100)}' besides.")


def _keys(args: argparse.Namespace) -> None:
    from nest_fn.config.keys import as_markdown, as_text, find_keys

    try:
        found = find_keys(args.pattern)
    except ValueError as error:
        raise UsageError(f"config keys: {error}; nest-fn config keys lists all.") from error
    show(as_markdown(found) if args.markdown else as_text(found), end="")

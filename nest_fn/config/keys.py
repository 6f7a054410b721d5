"""Every key of a configuration with its type, default, unit, range and meaning: ``nest-fn config keys``, and a page.

One source: the fields of the dataclasses. The comment that ends a field's line is ``unit; meaning``, or the meaning
alone where there is no unit; the range is that of ``limits.py``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import fnmatch
import inspect
import io
import json
import re
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from . import Config
from .limits import LIMITS

UNITS = frozenset(
    "Hz, dB, MB, seconds, samples, frames, frames of 10 ms, encoder frames, mel bins, steps, batches, utterances, "
    "checkpoints, probability, fraction".split(", ")
)


class ConfigKey(NamedTuple):
    """One key, as text."""

    name: str  # dotted path, as on the command line
    type: str
    default: str  # as in YAML
    unit: str  # "" where there is none
    range: str  # "" where it is no number
    meaning: str


def all_keys() -> list[ConfigKey]:
    """Every key in the order of the sections. Reads the source of the dataclasses, which is installed with them."""
    return list(_keys(Config(), ""))


def find_keys(patterns: Sequence[str]) -> list[ConfigKey]:
    """The keys that a pattern names: with ``*``, ``?`` or ``[`` a whole name, else a part of a name or its meaning.

    No pattern: all. Raises ``ValueError``, with the most similar names, for a pattern that names none.
    """
    keys = all_keys()
    found: set[ConfigKey] = set() if patterns else set(keys)
    for pattern in patterns:
        named = {key for key in keys if _fits(key, pattern.lower())}
        if not named:
            near = difflib.get_close_matches(pattern, [key.name for key in keys], n=3, cutoff=0.5)
            raise ValueError(f"no key has {pattern!r} in it" + (f"; similar are {', '.join(near)}" if near else ""))
        found |= named
    return [key for key in keys if key in found]


def as_text(keys: Sequence[ConfigKey]) -> str:
    """Two lines a key: ``name: type = default``, then unit, range and meaning."""
    lines = []
    for key in keys:
        facts = ", ".join(fact for fact in (key.unit, key.range) if fact)
        lines += [f"{key.name}: {key.type} = {key.default}", f"    {f'[{facts}] ' if facts else ''}{key.meaning}"]
    return "\n".join(lines) + "\n"


def as_markdown(keys: Sequence[ConfigKey]) -> str:
    """A table for each section."""
    lines: list[str] = []
    section = None
    for key in keys:
        here, _, name = key.name.rpartition(".")
        if here != section:
            section = here
            heading = f"`{here}`" if here else "Top level"
            head = "| key | type | default | unit | range | meaning |"
            lines += ["", f"## {heading}", "", head, "|---|---|---|---|---|---|"]
        cells = (f"`{name}`", f"`{key.type}`", f"`{key.default}`", key.unit, key.range, key.meaning)
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines).strip() + "\n"


def _fits(key: ConfigKey, pattern: str) -> bool:
    if any(letter in pattern for letter in "*?["):
        return fnmatch.fnmatchcase(key.name.lower(), pattern)
    return pattern in key.name.lower() or pattern in key.meaning.lower()


def _keys(section: Any, prefix: str) -> Iterator[ConfigKey]:
    comments, hints = _comments(type(section)), typing.get_type_hints(type(section))
    nested = []
    for field in dataclasses.fields(section):
        default = getattr(type(section)(), field.name) if prefix else _top_default(field)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(default):
            nested.append((default, f"{name}."))
            continue
        comment = comments[field.name]
        unit, separator, meaning = comment.partition("; ")
        if not separator or unit not in UNITS:
            unit, meaning = "", comment
        limit = LIMITS.get(name)
        kind, value = _type(hints[field.name]), default if isinstance(default, str) else json.dumps(default)
        yield ConfigKey(name, kind, value, unit, str(limit) if limit else "", _as_yaml(meaning))
    for inner, name in nested:
        yield from _keys(inner, name)


def _top_default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field of ``Config``, as its instances hold derived values."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def _comments(section: type) -> dict[str, str]:
    """The comment that ends each field's line, from the source of its class."""
    source = inspect.getsource(section)
    lines = source.splitlines()
    (body,) = ast.parse(source).body
    fields = [node for node in ast.iter_child_nodes(body) if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(node.target): _comment(lines[(node.end_lineno or node.lineno) - 1]) for node in fields}


def _comment(line: str) -> str:
    tokens = tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline)
    return next((token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT), "")


def _type(hint: Any) -> str:
    """A type in short: ``int or null``, ``error or mix or first or int``, ``list of float``."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(one) for one in inner)
    if origin is tuple:
        inner = inner[:1] if inner[-1] is Ellipsis else inner
        return f"list of {_type(inner[0])}" if len(inner) == 1 else f"[{', '.join(_type(one) for one in inner)}]"
    return "null" if hint is types.NoneType else str(hint.__name__)


def _as_yaml(text: str) -> str:
    """The constants in a comment as users write them."""
    return re.sub(r"\b(None|True|False)\b", lambda match: {"None": "null"}.get(match[0], match[0].lower()), text)

"""Converts a plain mapping to a frozen dataclass by its annotations, and collects all problems.

Accepted in addition to the annotated type: ``"1e-4"`` for a number (PyYAML reads it as a string), ``3.0`` and ``"3"``
for an int, ``yes/no/on/off`` for a bool, a string for a list of strings (split at commas), ``[left, right]`` for a list
of such pairs. Refused: a bool for a number, NaN, infinity, a number for a string. ``null`` is ``None`` if the field
allows it; otherwise the key is treated as missing.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union

from nest_fn.files.quoting import shown

from .problems import Problems

T = TypeVar("T")

_INT = re.compile(r"[-+]?[0-9]{1,20}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class _Refused(Exception):
    """A value has the wrong type; the message names the expected one: ``a whole number``."""


def build(cls: type[T], mapping: Mapping[str, Any], path: str, problems: Problems) -> T | None:
    """Build the dataclass ``cls`` from plain values; ``None`` if there were problems, recorded under ``path``."""
    hints = typing.get_type_hints(cls)
    hints = {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}
    before = len(problems.lines)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        below = f"{path}.{key}" if path else key
        if key not in hints:
            problems.unknown(below, hints)
        elif value is None and not _optional(hints[key]):
            continue
        elif (section := _dataclass(hints[key])) and value is not None:
            if isinstance(value, Mapping):
                values[key] = build(section, value, below, problems)
            else:
                problems.add(below, f"wants a mapping, got {_show(value)}")
        else:
            try:
                values[key] = _coerce(value, hints[key])
            except _Refused as refusal:
                problems.add(below, f"wants {refusal}, got {_show(value)}")
    return cls(**values) if len(problems.lines) == before else None


def to_plain(value: Any) -> Any:
    """Convert dataclasses and tuples to dicts and lists, for YAML and JSON."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _optional(hint: Any) -> bool:
    return type(None) in _members(hint)


def _dataclass(hint: Any) -> type[Any] | None:
    return next((member for member in _members(hint) if dataclasses.is_dataclass(member)), None)  # type: ignore[return-value]


def _show(value: Any) -> str:
    return f"{shown(value, 60)} ({type(value).__name__})"


def _coerce(value: Any, hint: Any) -> Any:
    """Convert a value to an annotated type. Raises ``_Refused``."""
    members = _members(hint)
    if value is None and type(None) in members:
        return None
    # Numbers before text: "1e-5" for `float | str` is a number, "tiny" is not.
    candidates = sorted((m for m in members if m is not type(None)), key=lambda member: member is str)
    refusals = []
    for member in candidates:
        try:
            return _coerce_one(value, member)
        except _Refused as refusal:
            refusals.append(str(refusal))
    raise _Refused(" or ".join(refusals))


def _coerce_one(value: Any, hint: Any) -> Any:
    origin = typing.get_origin(hint)
    if origin is tuple:
        return _tuple(value, typing.get_args(hint))
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise _Refused(f"one of {', '.join(map(str, choices))}")
        return value
    return {bool: _bool, int: _int, float: _float, str: _str}[hint](value)


def _bool(value: Any) -> bool:
    if isinstance(value, str) and value.lower() in _BOOLS:
        return _BOOLS[value.lower()]
    if not isinstance(value, bool):
        raise _Refused("true or false")
    return value


def _int(value: Any) -> int:
    if isinstance(value, str) and _INT.fullmatch(value.strip()):
        value = int(value)
    elif isinstance(value, float) or (isinstance(value, str) and _FLOAT.fullmatch(value.strip())):
        number = float(value)
        value = int(number) if number.is_integer() and abs(number) <= 2**53 else None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _Refused("a whole number")
    if not -(2**63) <= value < 2**64:
        raise _Refused("a whole number of at most 64 bits")
    return value


def _float(value: Any) -> float:
    if isinstance(value, str) and _FLOAT.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused("a number")
    if not abs(value) <= sys.float_info.max:
        raise _Refused("a finite number")
    return float(value)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise _Refused("text")
    return value


def _tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert a list to ``tuple[X, ...]`` or to a pair ``tuple[X, Y]``."""
    if isinstance(value, str) and args[0] is str:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if not isinstance(value, list | tuple):
        raise _Refused("a list")
    if args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise _Refused(f"a list of {len(args)}")
        return tuple(_coerce(item, hint) for item, hint in zip(value, args, strict=True))
    if typing.get_origin(args[0]) is tuple and value and not any(isinstance(item, list | tuple) for item in value):
        value = [value]  # a single pair instead of a list of pairs
    return tuple(_coerce(item, args[0]) for item in value)

"""Writes a plain mapping as YAML that our reader and YAML 1.1 readers read as the same mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from .parse.yaml_io import resolvers

_FIRST = resolvers().keys() | yaml.SafeDumper.yaml_implicit_resolvers.keys()


class _Dumper(yaml.SafeDumper):
    """Quotes strings that a reader would parse as another type, and writes lists of plain values on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _list(dumper: yaml.SafeDumper, values: list[Any]) -> yaml.Node:
    plain = not any(isinstance(value, list | dict) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    breaks = any(character in text for character in "\x85\u2028\u2029\ufeff")  # would be read as spaces unless escaped
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if breaks else None)


_Dumper.yaml_implicit_resolvers = {
    first: resolvers().get(first, []) + yaml.SafeDumper.yaml_implicit_resolvers.get(first, []) for first in _FIRST
}
_Dumper.add_representer(list, _list)
_Dumper.add_representer(str, _text)


def to_text(mapping: Mapping[str, Any]) -> str:
    """Convert nested dicts, lists and plain values to YAML, in their order."""
    return str(yaml.dump(dict(mapping), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))

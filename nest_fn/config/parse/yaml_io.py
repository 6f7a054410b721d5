"""Reads YAML to a plain mapping: a SafeLoader with the scalars of YAML 1.2 and additional checks.

``1e-4`` is a number, ``no`` and ``1:30`` are strings, ``010`` is ten. Duplicate keys, tags, aliases that contain
themselves, and files that are too large, too deep or too large after expansion of their aliases are errors, which name
the line.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from nest_fn.files.inputs import open_plain

from .problems import ConfigError

MAX_BYTES = 1_000_000
MAX_NODES = 100_000  # after expansion of aliases
MAX_DEPTH = 64


class _Loader(yaml.SafeLoader):
    """Limits the number of nodes and the depth, and refuses duplicate keys, before objects are constructed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.nesting = 0
        self.extent: dict[int, tuple[int, int]] = {}  # id(node) -> number of nodes, number of levels, including itself

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node and check its size at once, so that nested aliases cannot exhaust the memory."""
        mark = self.peek_event().start_mark
        self.nesting += 1
        if self.nesting > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self.nesting -= 1
        if alias and id(node) not in self.extent:
            raise yaml.MarkedYAMLError(problem="an alias must not contain itself", problem_mark=mark)
        nodes, levels = self.extent.setdefault(id(node), self._extent(node))
        if nodes > MAX_NODES or levels > MAX_DEPTH:
            problem = f"aliases grow beyond {MAX_NODES} nodes or {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return node

    def _extent(self, node: yaml.Node | None) -> tuple[int, int]:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        below = [self.extent[id(child)] for child in children]
        return 1 + sum(nodes for nodes, _ in below), 1 + max((levels for _, levels in below), default=0)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping and check that its keys are distinct plain strings."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            mark = key.start_mark
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=mark)
            if key.value in seen:
                problem = f"key '{key.value}' stands twice, first on line {seen[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
            seen[key.value] = mark.line + 1
        return node

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        """Parse an int of YAML 1.2: ``010`` is ten, ``0x10`` is hexadecimal, ``0o10`` octal."""
        text = node.value
        return int(text, 0) if text[:2] in ("0x", "0o") else int(text, 10)


def _resolver(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), list(first))


_Loader.yaml_implicit_resolvers = {}  # PyYAML's are those of YAML 1.1
_resolver("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_resolver("null", "~|null|Null|NULL|", "~nN")
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^$"), [""])
_resolver("int", r"[-+]?[0-9]{1,40}|0x[0-9a-fA-F]{1,16}|0o[0-7]{1,22}", "-+0123456789")
_resolver(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+.0123456789",
)
_resolver("merge", "<<", "<")
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_core_int)


def resolvers() -> dict[str, list[Any]]:
    """The rules that assign types to plain scalars, by first character; the writer uses them to quote strings."""
    return {first: list(rules) for first, rules in _Loader.yaml_implicit_resolvers.items()}


def parse(text: str, source: str = "config") -> Any:
    """Parse a YAML document; an empty one is ``None``. Raises ``ConfigError`` with the line."""
    if len(text) > MAX_BYTES:
        raise ConfigError([f"{len(text)} characters; a configuration has at most {MAX_BYTES}"], source)
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise ConfigError([_explain(error)], where) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError([" ".join(str(error).split())], source) from None
    finally:
        if loader is not None:
            loader.dispose()


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context)
    if "could not determine a constructor for the tag" in problem:
        return f"tag {problem.rpartition('tag ')[2]} is not allowed; plain values only"
    return problem


def read(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping, in UTF-8. Raises ``ConfigError`` naming the file."""
    source = str(path)
    try:
        with open_plain(path) as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError([f"cannot be read: {error.strerror or error}"], source) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"is not UTF-8 text (byte {error.start})"], source) from None
    if len(content) > MAX_BYTES:
        raise ConfigError([f"larger than {MAX_BYTES} bytes; a configuration is a few thousand"], source)
    value = parse(text, source)
    if not isinstance(value, dict):
        came = "nothing" if value is None else f"a {type(value).__name__}"
        raise ConfigError([f"holds {came}; want a mapping such as 'model: {{encoder: {{n_layers: 17}}}}'"], source)
    return value

"""Overrides ``a.b=c`` and references ``${a.b}`` on the plain mapping, before any key is given a meaning."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nest_fn.files.quoting import shown

from .problems import ConfigError, Problems
from .yaml_io import MAX_DEPTH, MAX_NODES, parse

MISSING = "???"
"""The reference's mark for "the user must give this"; read as if the key were absent."""

OWN_SECTIONS = ("data", "trainer")
"""Sections that stand beside ``model:``, never in it."""

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_MAX_TEXT = 10_000  # characters of one text after its references are written out


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the tree with ``"encoder.n_layers=2"`` and the like set; values are YAML, a leading ``model.`` is free.

    Raises ``TypeError`` for one text instead of a list, ``ConfigError`` for text without ``=`` and for a path that runs
    through a plain value.
    """
    if isinstance(overrides, str | bytes) or not all(isinstance(text, str) for text in overrides):
        raise TypeError(f"overrides: pass a list of texts, as ['encoder.n_layers=2']; got {shown(overrides)}.")
    problems = Problems()
    for text in overrides:
        path, equals, value = text.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            problems.lines.append(f"override {shown(text)} wants the form 'encoder.n_layers=2'")
            continue
        try:
            tree = _with(tree, _place(tree, keys), parse(value), path, problems)
        except ConfigError as error:
            problems.lines.append(f"override {shown(text)}: {error.problems[0]}")
    problems.raise_if_any()
    return tree


def _place(tree: Mapping[str, Any], keys: list[str]) -> list[str]:
    """The path with or without ``model.``, as the tree has it."""
    if keys[0] == "model" and len(keys) > 1:
        keys = keys[1:]
    inside = isinstance(tree.get("model"), Mapping) and keys[0] not in OWN_SECTIONS and keys[0] not in tree
    return ["model", *keys] if inside else keys


def _with(tree: Any, keys: list[str], value: Any, path: str, problems: Problems) -> Any:
    if not keys:
        return value
    if tree is not None and not isinstance(tree, Mapping):
        problems.lines.append(f"override {shown(path)} runs through a plain value, {shown(tree)}")
        return tree
    return {**(tree or {}), keys[0]: _with((tree or {}).get(keys[0]), keys[1:], value, path, problems)}


class _Resolver:
    """Writes references out, counting nodes as it goes: sharing would let a small file stand for a huge one."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root
        self.problems = Problems()
        self.nodes = 0

    def value(self, value: Any, path: str, chain: tuple[str, ...]) -> Any:
        """The value with every reference below it replaced; ``chain`` holds the references being followed."""
        self.nodes += 1
        if self.nodes > MAX_NODES or path.count(".") + len(chain) > MAX_DEPTH:
            raise ConfigError([f"'{path}': references grow beyond {MAX_NODES} nodes or {MAX_DEPTH} levels"])
        if isinstance(value, Mapping):
            return self.mapping(value, path, chain)
        if isinstance(value, list | tuple):
            return [self.value(item, f"{path}.{i}", chain) for i, item in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            return self.text(value, path, chain)
        return value

    def mapping(self, value: Mapping[Any, Any], path: str, chain: tuple[str, ...]) -> dict[str, Any]:
        """A mapping without its missing keys."""
        plain = {}
        for key, item in value.items():
            below = f"{path}.{key}" if path else str(key)
            if not isinstance(key, str):
                self.problems.add(below, f"is a key of type {type(key).__name__}; keys are text")
                continue
            resolved = self.value(item, below, chain)
            if not (isinstance(resolved, str) and resolved == MISSING):
                plain[key] = resolved
        return plain

    def text(self, value: str, path: str, chain: tuple[str, ...]) -> Any:
        """A text with references: the value itself where the text is one reference, else their texts put in."""
        whole = _REFERENCE.fullmatch(value)
        if whole:
            return self.follow(whole[1].strip(), path, chain)
        if "${" in _REFERENCE.sub("", value):
            self.problems.add(path, f"holds a reference that is nested or not closed: {shown(value)}")
            return MISSING
        written = _REFERENCE.sub(lambda match: str(self.follow(match[1].strip(), path, chain)), value)
        if len(written) > _MAX_TEXT:
            raise ConfigError([f"'{path}': references make a text of more than {_MAX_TEXT} characters"])
        return written

    def follow(self, target: str, path: str, chain: tuple[str, ...]) -> Any:
        """The value that ``${target}`` stands for."""
        if target in chain:
            self.problems.add(path, f"is a cycle of references: {' -> '.join((*chain, target))}")
            return MISSING
        try:
            value = self.look_up(target)
        except KeyError:
            why = "resolvers are not supported" if ":" in target else "no such key"
            self.problems.add(path, f"refers to '${{{target}}}': {why}")
            return MISSING
        return self.value(value, path, (*chain, target))

    def look_up(self, target: str) -> Any:
        """The value at a dotted path from the root, from ``model``, or, in a bare model section, without ``model.``."""
        keys = target.split(".")
        for path in (keys, ["model", *keys], keys[keys[0] == "model" :]):
            try:
                return functools.reduce(_child, path, self.root)
            except KeyError:
                continue
        raise KeyError(target)


def _child(node: Any, key: str) -> Any:
    if not isinstance(node, Mapping):
        raise KeyError(key)
    return node[key]


def resolve(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree as plain dicts and lists with all references written out and missing keys (``???``) left out.

    Raises ``ConfigError`` for cycles, for references to nothing, and for trees that grow beyond the reader's budget.
    """
    resolver = _Resolver(tree)
    plain = resolver.mapping(tree, "", ())
    resolver.problems.raise_if_any()
    return plain

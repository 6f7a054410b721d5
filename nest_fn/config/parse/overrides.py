"""Overrides ``a.b=c`` and references ``${a.b}``, applied to the plain mapping before keys are interpreted."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from nest_fn.files.quoting import shown

from .problems import ConfigError, Problems
from .yaml_io import MAX_DEPTH, MAX_NODES, parse

MISSING = "???"
"""Marks values that the user must set, in the reference's files; treated as a missing key."""

OWN_SECTIONS = ("data", "trainer")
"""Sections at the top level, beside ``model:``."""

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_MAX_TEXT = 10_000  # maximum characters of a string after its references are resolved


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides such as ``"encoder.n_layers=2"`` to a copy of the tree.

    Values are YAML; a leading ``model.`` is optional. Raises ``TypeError`` for a string instead of a list,
    ``ConfigError`` for an override without ``=`` and for a path below a plain value.
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
            tree = _set(tree, _place(tree, keys), parse(value), path, problems)
        except ConfigError as error:
            problems.lines.append(f"override {shown(text)}: {error.problems[0]}")
    problems.raise_if_any()
    return tree


def _place(tree: Mapping[str, Any], keys: list[str]) -> list[str]:
    """The path of an override in the tree, with ``model`` in front if the tree has such a section."""
    if keys[0] == "model" and len(keys) > 1:
        keys = keys[1:]
    inside = isinstance(tree.get("model"), Mapping) and keys[0] not in OWN_SECTIONS and keys[0] not in tree
    return ["model", *keys] if inside else keys


def _set(tree: Any, keys: list[str], value: Any, path: str, problems: Problems) -> Any:
    if not keys:
        return value
    if tree is not None and not isinstance(tree, Mapping):
        problems.lines.append(f"override {shown(path)} runs through a plain value, {shown(tree)}")
        return tree
    return {**(tree or {}), keys[0]: _set((tree or {}).get(keys[0]), keys[1:], value, path, problems)}


class _Resolver:
    """Resolves references and counts nodes, because references let a small file expand to a huge one."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root = root
        self.problems = Problems()
        self.nodes = 0

    def value(self, value: Any, path: str, chain: tuple[str, ...]) -> Any:
        """Resolve all references in a value; ``chain`` has the references being followed.

        Raises ``ConfigError`` if there are too many nodes or levels.
        """
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
        """Resolve a mapping; keys whose value is ``???`` are dropped."""
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
        """Resolve a string: to the referenced value if it is one reference, else by substitution.

        Raises ``ConfigError`` if it becomes too long.
        """
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
        """Resolve the reference ``${target}``."""
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
        """Look up a dotted path from the root, then in ``model``, then without a leading ``model.``.

        Raises ``KeyError``.
        """
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
    """Resolve all references of a tree, to plain dicts and lists; keys with the value ``???`` are dropped.

    Raises ``ConfigError`` for cycles, for references to missing keys and for trees that become too large.
    """
    resolver = _Resolver(tree)
    plain = resolver.mapping(tree, "", ())
    resolver.problems.raise_if_any()
    return plain

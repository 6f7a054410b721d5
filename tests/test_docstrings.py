"""What a docstring must say: the errors that a function raises, and the shapes of its tensors; read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    path
    for folder in ("layers", "nest_fn")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)
]
Function = ast.FunctionDef | ast.AsyncFunctionDef
_SHAPE = re.compile(r"``[^`]*\[[^\[\]()`]*\][^`]*``")
_MAPPINGS = ("dict", "Mapping", "Callable", "Iterable")  # of tensors of any shape


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def public_functions(tree: ast.Module) -> Iterator[Function]:
    """Functions and methods without an underscore before their name or their class's; of overloads the last alone."""
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    for node in (node for body in bodies for node in body):
        if isinstance(node, Function) and node.name[0] != "_" and "overload" not in map(_name, node.decorator_list):
            yield node


def own_errors(function: Function) -> set[str]:
    """Names of the error classes in ``raise X(...)`` and ``raise X``, outside of functions defined inside."""
    found: set[str] = set()
    todo: list[ast.AST] = list(function.body)
    while todo:
        node = todo.pop()
        if isinstance(node, Function | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise):
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id.endswith("Error"):
                found.add(raised.id)
        todo += ast.iter_child_nodes(node)
    return found - {"AssertionError"}  # an error of the library's, not of its caller's


def _names_tensor(annotation: ast.AST | None) -> bool:
    """Whether an annotation names ``Tensor``, other than as the values of a mapping, which may have any shape."""
    if isinstance(annotation, ast.Subscript) and _name(annotation.value) in _MAPPINGS:
        return False
    if isinstance(annotation, ast.Name):
        return annotation.id == "Tensor"
    return any(map(_names_tensor, ast.iter_child_nodes(annotation))) if annotation else False


def handles_tensors(function: Function) -> bool:
    """Whether a parameter or the result is annotated as a tensor."""
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return any(map(_names_tensor, [*(one.annotation for one in given), function.returns]))


def faults(tree: ast.Module) -> list[str]:
    """What the docstrings of a file leave out: ``12: linear does not name ValueError``."""
    found = []
    for function in public_functions(tree):
        text = ast.get_docstring(function) or ""
        unnamed = sorted(error for error in own_errors(function) if f"``{error}``" not in text)
        found += [f"{function.lineno}: {function.name} does not name {error}" for error in unnamed]
        if handles_tensors(function) and not _SHAPE.search(text):
            found.append(f"{function.lineno}: {function.name} has no shape")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_name_errors_and_shapes(path: Path) -> None:
    assert not faults(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: Tensor) -> None:\n    'Nothing about it.'",
        "def f(x: Tensor | None) -> None: ...",
        "def f() -> tuple[Tensor, int]:\n    'In [0, 1].'",
        "class A:\n    def f(self, *, x: Tensor) -> None:\n        '``y`` in [0, 1].'",
        "def f() -> None:\n    'Raises ``TypeError``.'\n    raise ValueError('x')",
        "def f() -> None:\n    if 1:\n        raise CheckpointError",
        "def f() -> None:\n    try:\n        pass\n    except A as error:\n        raise ValueError from error",
    ],
)
def test_the_rule_fires(source: str) -> None:
    assert faults(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: Tensor) -> None:\n    'Of ``x [B, T]``.'",
        "def f(x: Tensor) -> Tensor:\n    '``[..., D] -> [..., D]``'",
        "def _f(x: Tensor) -> None: ...",
        "class _A:\n    def f(self, x: Tensor) -> None: ...",
        "def f(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:\n    'By name.'",
        "def f() -> None:\n    def g() -> None:\n        raise ValueError",
        "def f() -> None:\n    try:\n        pass\n    except ValueError as error:\n        raise error",
        "def f() -> None:\n    'Raises ``ValueError`` for 3.'\n    raise ValueError",
        "@overload\ndef f(x: Tensor) -> Tensor: ...",
    ],
)
def test_the_rule_allows(source: str) -> None:
    assert not faults(ast.parse(source))

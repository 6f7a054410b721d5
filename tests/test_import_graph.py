"""The import graph of the folders: one way, no circle, few files each. ``python -m tests.test_import_graph`` prints it.

Every import counts, inside of functions and for type checkers too. Two kinds of module are nodes of their own: those at
the base, which import nothing of this library, and the entries, which nothing imports: the lazy face
``nest_fn/__init__.py``, and ``python -m nest_fn.train``.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.test_conventions import LIBRARY, ROOT, imported, module_name

BASE = ("nest_fn.errors", "nest_fn.extras", "nest_fn.version")
ENTRIES = ("nest_fn", "nest_fn.train", "nest_fn.train.__main__")
MAX_FILES = 10  # of a folder, beside its __init__.py
LARGER = {
    "train/cli": 14,  # one file a group of commands, and four of the terminal
    "layers": 24,  # flat: one file a layer, and the kernels of two layers and of the random bits
    "nest_fn": 15,  # nine files of the paper, parts, arguments, summary, and the base modules
}

MODULES = {module_name(path): path for path in LIBRARY}


def node(module: str) -> str:
    """The folder of a module, or the module itself where it is an entry or at the base."""
    if module in (*BASE, *ENTRIES):
        return module
    return f"{MODULES[module].parent.relative_to(ROOT).as_posix()}/"


def targets(module: str, for_types: bool = True) -> set[str]:
    """The modules of this library that one imports; ``for_types``: also where only a type checker does."""
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set() if for_types else type_checking_only(tree)
    found = set()
    for statement, name in imported(tree, module, path.name == "__init__.py"):
        if statement in skipped:
            continue
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {"", module}


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    """Statements that never run."""
    blocks = [one for one in tree.body if isinstance(one, ast.If) and ast.unparse(one.test).endswith("TYPE_CHECKING")]
    return {inner for block in blocks for inner in ast.walk(block)}


def graph() -> dict[str, set[str]]:
    """Which nodes each node imports."""
    edges: dict[str, set[str]] = defaultdict(set)
    for module in MODULES:
        edges[node(module)] |= {node(target) for target in targets(module)} - {node(module)}
    return dict(edges)


def floors(edges: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Nodes by floor, the lowest first: each imports from lower floors alone. Raises ``CycleError``."""
    sorter = TopologicalSorter(edges)
    sorter.prepare()
    found = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        found.append(ready)
        sorter.done(*ready)
    return found


def test_folders_import_one_way() -> None:
    for floor in floors(graph()):
        print("  ".join(floor))


def test_modules_of_a_folder_import_one_way() -> None:
    """No circle among single modules either; a class and the checks of it may name each other's types."""
    modules = MODULES.keys() - set(ENTRIES)
    floors({module: targets(module, for_types=False) - set(ENTRIES) for module in modules})


def test_layers_know_nothing_above_them() -> None:
    assert graph()["layers/"] == set()


def test_the_base_imports_nothing_and_nothing_imports_an_entry() -> None:
    edges = graph()
    assert not {name: edges[name] for name in BASE if edges[name]}
    assert not {name for name, below in edges.items() if below & set(ENTRIES)}


def test_a_folder_has_few_files() -> None:
    folders: dict[str, int] = defaultdict(int)
    for path in LIBRARY:
        folders[path.parent.relative_to(ROOT).as_posix()] += path.name != "__init__.py"
    assert not {name: count for name, count in folders.items() if count > LARGER.get(name, MAX_FILES)}


def test_a_circle_is_found() -> None:
    with pytest.raises(CycleError):
        floors({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def _main() -> None:
    edges, modules = graph(), defaultdict(list)
    for module, path in MODULES.items():
        modules[node(module)].append(len(path.read_text(encoding="utf-8").splitlines()))
    for number, floor in enumerate(floors(edges)):
        for name in floor:
            sizes = modules[name]
            imports = ", ".join(sorted(edges.get(name, ())))
            size = f"{len(sizes):3} files {sum(sizes):5} lines, longest {max(sizes):3}"
            print(f"{number:2}  {name:22} {size}  <-  {imports}")


if __name__ == "__main__":
    _main()

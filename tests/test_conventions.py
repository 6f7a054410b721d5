"""The conventions of docs/design.md, read from the source; each rule is also shown to fire."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE, MAX_FUNCTION = 300, 50  # lines
FOLDERS = {"layers": "nest_fn.layers", "nest_fn": "nest_fn", "train": "nest_fn.train"}
Finding = tuple[int, str]


def sources(*folders: str) -> list[Path]:
    """Python files below the folders, not through the links in nest_fn."""
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if not any(parent.is_symlink() for parent in path.parents)]


LIBRARY = sources(*FOLDERS)


def module_name(path: Path) -> str:
    """``layers/linear.py -> nest_fn.layers.linear``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((FOLDERS.get(parts[0], parts[0]), *parts[1:])).removesuffix(".__init__")


def _called(node: ast.AST) -> str:
    """``torch.nn.functional.dropout`` for the expression of that name, else what is known of its end."""
    if isinstance(node, ast.Attribute):
        return f"{_called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST, name: str, is_package: bool = False) -> Iterator[tuple[ast.stmt, str]]:
    """Every imported module or member by its full name, relative ones resolved against module ``name``."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node, f"{start}.{alias.name}") for alias in node.names)


def _lazy(tree: ast.Module) -> set[ast.AST]:
    """Statements that run only when a name is asked for (``__getattr__``) or never (``TYPE_CHECKING``)."""
    late = [
        node
        for node in tree.body
        if (isinstance(node, ast.FunctionDef) and node.name == "__getattr__")
        or (isinstance(node, ast.If) and _called(node.test).endswith("TYPE_CHECKING"))
    ]
    return {inner for node in late for inner in ast.walk(node)}


def imports_run_one_way(tree: ast.Module, name: str, is_package: bool = False) -> list[Finding]:
    """train -> nest_fn -> layers; only the face, ``nest_fn/__init__.py``, hands names of train on, lazily."""
    found = []
    skip = _lazy(tree) if name == "nest_fn" else set()
    for node, target in imported(tree, name, is_package):
        if node in skip or name.startswith("nest_fn.train"):
            continue
        inside_layers = target == "nest_fn.layers" or target.startswith("nest_fn.layers.")
        if name.startswith("nest_fn.layers") and target.split(".")[0] == "nest_fn" and not inside_layers:
            found.append((node.lineno, f"layers imports {target}"))
        elif f"{target}.".startswith("nest_fn.train."):
            found.append((node.lineno, f"nest_fn imports {target}"))
    return found


def one_import_name(tree: ast.Module, name: str, is_package: bool = False) -> list[Finding]:
    """Never ``import layers``: that would load a second copy."""
    targets = imported(tree, name, is_package)
    return [(n.lineno, f"bare import {t}") for n, t in targets if t.split(".")[0] in ("layers", "train", "configs")]


def functions_are_short(tree: ast.Module) -> list[Finding]:
    """One job each, at most ``MAX_FUNCTION`` lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION:
                found.append((node.lineno, f"{node.name} has {lines} lines, at most {MAX_FUNCTION}"))
    return found


def public_names_have_docstrings(tree: ast.Module) -> list[Finding]:
    """Every module, public function and public class says what it is."""
    found = [] if ast.get_docstring(tree) else [(1, "module without docstring")]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        overload = any(_called(decorator).endswith("overload") for decorator in node.decorator_list)
        if not overload and not ast.get_docstring(node):
            found.append((node.lineno, f"{node.name} has no docstring"))
    return found


_DRAWS = (
    "manual_seed|seed|initial_seed|get_rng_state|set_rng_state|rand|randn|randint|randperm|bernoulli|multinomial|normal|"
    "poisson|rand_like|randn_like|randint_like|dropout|feature_dropout|alpha_dropout"
)
_GLOBAL_RANDOM = re.compile(
    rf"torch\.(cuda\.)?({_DRAWS})$|(F|functional)\.\w*dropout\w*$|(np|numpy)\.random\.(?!Generator$|Philox$|SeedSequence$)"
    r"|\.(normal_|uniform_|random_|bernoulli_|exponential_|log_normal_|cauchy_|geometric_)$"
)


def no_global_randomness(tree: ast.Module) -> list[Finding]:
    """All chance comes from keys: no call that draws from a hidden generator, no ``import random``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _GLOBAL_RANDOM.search(_called(node.func)):
            if not any(keyword.arg == "generator" for keyword in node.keywords):
                found.append((node.lineno, f"{_called(node.func)} draws from a global generator"))
        elif isinstance(node, ast.Import) and any(alias.name == "random" for alias in node.names):
            found.append((node.lineno, "imports Python's random"))
        elif isinstance(node, ast.ImportFrom) and node.module == "random" and node.level == 0:
            found.append((node.lineno, "imports from Python's random"))
    return found


_WALL_CLOCK = re.compile(
    r"^time\.(time(_ns)?|localtime|gmtime|ctime|asctime|strftime)$|(^|\.)(datetime|date)\.(now|utcnow|today)$|mtime|ctime$"
    r"|^os\.(urandom|getrandom)$|^(secrets|uuid)(\.|$)"
)
_SEEDED = re.compile(r"(^|\.)(default_rng|Philox|SeedSequence|PCG64|RandomState)$")  # from the system if not told


def no_wall_clock(tree: ast.Module) -> list[Finding]:
    """Nothing is named that jumps with the clock or that the system draws, and no generator is without its seed."""
    named = [(n.lineno, _called(n)) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    named += [(statement.lineno, target) for statement, target in imported(tree, "module")]
    found = [(line, f"names {name}") for line, name in named if _WALL_CLOCK.search(name)]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and not node.args and not node.keywords]
    return found + [(c.lineno, f"{_called(c.func)} without a seed") for c in calls if _SEEDED.search(_called(c.func))]


def no_calls(tree: ast.Module, pattern: str) -> list[Finding]:
    """No call whose dotted name matches the pattern."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(call.lineno, f"calls {_called(call.func)}") for call in calls if re.search(pattern, _called(call.func))]


def _check(files: list[Path], rule: Callable[[Path, ast.Module], list[Finding]]) -> None:
    found = []
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(ROOT)}:{line}: {what}" for line, what in rule(path, tree)]
    assert files, "no source was found"
    assert not found, "\n" + "\n".join(found)


def test_imports_run_one_way() -> None:
    _check(LIBRARY, lambda path, tree: imports_run_one_way(tree, module_name(path), path.name == "__init__.py"))


def test_one_import_name() -> None:
    files = LIBRARY + sources("tests", "configs")
    _check(files, lambda path, tree: one_import_name(tree, module_name(path), path.name == "__init__.py"))


def test_files_are_short() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in LIBRARY}
    assert not {str(path): lines for path, lines in lengths.items() if lines > MAX_FILE}


def test_functions_are_short() -> None:
    _check(LIBRARY, lambda _, tree: functions_are_short(tree))


def test_public_names_have_docstrings() -> None:
    _check(LIBRARY, lambda _, tree: public_names_have_docstrings(tree))


def test_the_library_does_not_print() -> None:
    files = [path for path in LIBRARY if not re.fullmatch(r"train/(cli/\w+|__main__)\.py", str(path.relative_to(ROOT)))]
    _check(files, lambda _, tree: no_calls(tree, r"^print$"))


def test_no_global_randomness() -> None:
    _check(LIBRARY, lambda _, tree: no_global_randomness(tree))


def test_the_core_never_waits_for_the_device() -> None:
    """``.item()`` reads a tensor on the host: it breaks compiled graphs and vmap."""
    core = [path for path in sources("layers", "nest_fn") if path.parent.name in ("layers", "nest_fn")]
    _check(core, lambda _, tree: no_calls(tree, r"\.item$"))


def test_nothing_follows_the_clock_of_the_wall() -> None:
    """Times are differences of ``time.monotonic``, and no number follows from the hour or from the system (faults G3).

    A run's log alone tells the hour, to people, and the cache of remote files knows which was used last.
    """
    exempt = {"train/run/record/log_file.py", "train/data/audio_files/remote_cache.py"}
    files = [path for path in LIBRARY if path.relative_to(ROOT).as_posix() not in exempt]
    _check(files, lambda _, tree: no_wall_clock(tree))


@pytest.mark.parametrize("name", ["layers", "train", "configs"])
def test_links_point_at_the_folders(name: str) -> None:
    link = ROOT / "nest_fn" / name
    if not link.exists():
        pytest.skip("a checkout without links; test_packaging.py shows that it installs")
    assert link.is_symlink()
    assert link.resolve() == ROOT / name
    assert str(link.readlink()) == f"../{name}"


_HOST = re.compile(r"https?://|--?(extra-)?index-url|--find-links|(?<![\w.])/(work|root|home|tmp|opt|Users)/")


def test_nothing_names_a_host_or_a_path_of_one_machine() -> None:
    build = [ROOT / "Makefile", ROOT / "constraints.txt", ROOT / "pyproject.toml", *sorted((ROOT / ".ci").rglob("*"))]
    found = [
        f"{p.name}: {line}" for p in build if p.is_file() for line in p.read_text().splitlines() if _HOST.search(line)
    ]
    assert not found
    places = re.compile(r"(?<![\w.])/(work|root|tmp)/\w")
    library = [*LIBRARY, *sorted((ROOT / "configs").glob("*.yaml"))]
    assert not [path for path in library if places.search(path.read_text(encoding="utf-8"))]


def test_pins_are_public_versions() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert not [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", pin)]
    names = [re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "name, source",
    [
        ("nest_fn.layers.linear", "from ..model import init"),
        ("nest_fn.layers.linear", "import nest_fn.model"),
        ("nest_fn.layers.linear", "from nest_fn import model"),
        ("nest_fn.model", "from .train.loop import run"),
        ("nest_fn.model", "def __getattr__(name):\n    from nest_fn import train"),
        ("nest_fn", "import nest_fn.train"),
    ],
)
def test_rule_fires_on_imports(name: str, source: str) -> None:
    assert imports_run_one_way(ast.parse(source), name, is_package=name == "nest_fn")


def test_rule_allows_the_lazy_face_and_the_right_direction() -> None:
    lazy = "def __getattr__(name):\n    from .train.ssl_model import PureTorchSSLModel"
    assert not imports_run_one_way(ast.parse(lazy), "nest_fn", is_package=True)
    assert not imports_run_one_way(ast.parse("from ..model import init"), "nest_fn.train.run.loop")
    assert not imports_run_one_way(ast.parse("from nest_fn.layers import random"), "nest_fn.layers.dropout")


@pytest.mark.parametrize(
    "source", ["torch.rand(3)", "np.random.normal()", "import random", "from random import choice", "x.uniform_()"]
)
def test_rule_fires_on_randomness(source: str) -> None:
    assert no_global_randomness(ast.parse(source))


def test_rule_allows_randomness_from_keys() -> None:
    tree = ast.parse("from . import random\nrandom.uniform(key, [3])\nrandom.normal(key, [3])\ndropout(x, key=key)")
    assert not no_global_randomness(tree)


@pytest.mark.parametrize(
    "source",
    [
        "x = time.time()",
        "def f(clock=time.time): ...",
        "from time import time",
        "datetime.datetime.now()",
        "date.today()",
        "path.stat().st_mtime",
        "os.path.getmtime(p)",
        "import uuid",
        "os.urandom(8)",
        "np.random.default_rng()",
        "Generator(Philox())",
    ],
)
def test_rule_fires_on_the_clock_of_the_wall(source: str) -> None:
    assert no_wall_clock(ast.parse(source))


def test_rule_allows_differences_of_time_and_seeds() -> None:
    source = "import time\nfrom datetime import timedelta\ntime.monotonic()\ntime.perf_counter()\nPhilox(3)\nmy.time()"
    assert not no_wall_clock(ast.parse(source))


def test_other_rules_fire() -> None:
    assert one_import_name(ast.parse("from layers.linear import linear"), "nest_fn.model")
    assert functions_are_short(ast.parse("def f():\n" + "    x = 1\n" * MAX_FUNCTION))
    assert public_names_have_docstrings(ast.parse('"""Module."""\ndef f(): ...'))
    assert no_calls(ast.parse("y = x.sum().item()"), r"\.item$")

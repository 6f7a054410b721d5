"""What is below one training step is pure: by its source, and by its bits in another process."""

from __future__ import annotations

import ast
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Tensor
from nest_fn.train.step.step import init_train_state, make_step
from tests.test_conventions import ROOT, _called, imported, sources

# Where every result follows from the arguments alone. One question without an argument is left (nest_fn/losses.py):
# whether a transform of torch.func is active, which decides how masked tokens are gathered, not what the loss is.
PURE = [
    *sources("layers", "train/step"),
    *(ROOT / "nest_fn" / f"{name}.py" for name in (
        "model", "frontend", "mel", "quantizer", "masking", "encoder", "decoder", "losses", "hidden_states", "parts",
    )),
    *(ROOT / "train" / name for name in ("keys.py", "augment/mixing.py", "augment/mix_plan.py", "augment/reverb.py")),
]  # fmt: skip
_MODULES = re.compile(
    r"^(time|os|io|shutil|tempfile|socket|subprocess|threading|pathlib|signal|resource|platform|sys)(\.|$)"
)
_CALLS = re.compile(
    r"^(open|input|print|eval|exec|globals|vars)$"
    # A kernel of Triton is launched under ``device_index``, which asks nothing and puts things back.
    r"|^torch\.(cuda|mps|xpu|accelerator)\.(?!Event$|Stream$|device_index$)"
    r"|^torch\.((get|set)_\w+|load|save)$|^torch\.backends\."
)


def impurities(tree: ast.Module) -> list[str]:
    """Clocks, files, the environment and devices that a module imports or asks; ``global`` statements."""
    found = [f"{node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for statement, name in imported(tree, "module"):
        if _MODULES.search(name):
            found.append(f"{statement.lineno}: imports {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call | ast.Attribute):
            name = _called(node.func if isinstance(node, ast.Call) else node)
            if _CALLS.search(name):
                found.append(f"{node.lineno}: {name}")
    return found


def mutable_globals(tree: ast.Module) -> list[str]:
    """Module-level containers that some function of the module changes."""
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict | ast.List | ast.Set)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    changing = ("append", "add", "update", "pop", "clear", "setdefault", "extend", "remove", "insert", "discard")
    changed = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            changed.append((node.lineno, _called(node.value)))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changing:
            changed.append((node.lineno, _called(node.func.value)))
    return [f"{line}: changes {name}" for line, name in changed if name in names]


def test_the_source_below_a_step_is_pure() -> None:
    found = {}
    for path in PURE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[path.relative_to(ROOT).as_posix()] = impurities(tree) + mutable_globals(tree)
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "source",
    [
        "import time",
        "from os import environ",
        "x = open('f')",
        "def f():\n    global n\n    n = 1",
        "torch.cuda.is_available()",
        "torch.get_num_threads()",
        "C = {}\ndef f(x):\n    C[x] = 1",
        "C = []\ndef f(x):\n    C.append(x)",
    ],
)
def test_the_rule_fires(source: str) -> None:
    tree = ast.parse(source)
    assert impurities(tree) + mutable_globals(tree)


def batch(seed: int) -> dict[str, Tensor]:
    """Four rows of two seconds of noise, as a loader gives them."""
    signals = random.normal(random.key(seed), (2, 4, 32000)) * 2000
    audio, noise = signals.to(torch.int16).unbind(0)
    length = torch.tensor([32000, 24000, 20000, 32000])
    inside = torch.arange(32000) < length[:, None]
    row = torch.arange(4)
    return {"audio": audio * inside, "audio_len": length, "noise": noise * inside, "noise_len": length, "row": row,
            "utterance": row + 100 * seed, "weight": torch.ones(4)}  # fmt: skip


def digest_of_two_steps() -> str:
    """SHA-256 over every tensor of the train state and of the metrics after two updates of a tiny model."""
    cfg = Config.preset("tiny", ["encoder.n_layers=2", "data.augment.prob=0.7"])
    ts, step = init_train_state(random.key(0), cfg), make_step(cfg)
    sha = hashlib.sha256()
    for number in range(2):
        ts, metrics = step(ts, [batch(number)], random.fold_in(random.key(1), number))
        leaves = flatten({"params": ts.params, "state": ts.state, "metrics": metrics, "optimizer": list(ts.opt_state)})
        for path, leaf in sorted(leaves.items()):
            sha.update(path.encode() + leaf.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def test_another_process_makes_the_same_bits(tmp_path: Path) -> None:
    """In another folder, with other hashes of strings, after draws from every global generator."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import random, numpy, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "random.seed(5); numpy.random.seed(6); torch.manual_seed(7); torch.rand(9)\n"
        "from tests.train.step.test_pure import digest_of_two_steps\n"
        "print(digest_of_two_steps())\n"
    )
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "77", "LC_ALL": "C", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    assert made.stdout.split()[-1] == digest_of_two_steps()

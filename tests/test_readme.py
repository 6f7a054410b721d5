"""The README is true: its Python runs, its commands exist; ``tests/docs/test_site.py`` follows its links."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nest_fn import Config, init, key, save
from nest_fn.checkpoint.retention import step_path
from nest_fn.layers.tree import count
from nest_fn.model import abstract
from nest_fn.train.cli import main as cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


GUIDES = ["README.md", "docs/scaling.md", "docs/reproducibility.md"]


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it names a run, in a folder that has one."""
    monkeypatch.chdir(tmp_path)
    if "runs/nest_large" in code:
        cfg = Config.preset("tiny")
        save(step_path(tmp_path / "runs" / "nest_large" / "checkpoints", 3), *init(key(0), cfg), cfg)
    exec(compile(code, "README.md", "exec"), {})


def _container(job: str) -> dict[str, Any]:
    """The one container of a Kubernetes Job."""
    (container,) = yaml.safe_load(job)["spec"]["template"]["spec"]["containers"]
    return dict(container)


def spoken(text: str) -> list[list[str]]:
    """The arguments of every command of this library in a page's blocks and in its lines."""
    shell = re.sub("```yaml.*?```", "", text, flags=re.DOTALL)
    folded = [line for block in blocks("yaml", text) for line in _container(block)["args"]]
    joined = "\n".join([*blocks(r"\w*", shell), *folded]).replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.startswith("nest-fn ") or "-m nest_fn" in line]
    lines += re.findall(r"`(nest-fn [a-z][^`]*)`", text)
    words = [shlex.split(line.partition("-m ")[2] if "-m nest_fn" in line else line, comments=True) for line in lines]
    return [line[1:] for line in words]


@pytest.mark.parametrize("page", GUIDES)
def test_commands_are_understood(page: str) -> None:
    found = spoken((ROOT / page).read_text(encoding="utf-8"))
    assert len(found) >= {"README.md": 5, "docs/scaling.md": 4}.get(page, 0), found
    for words in found:
        if words in (["data", "validate"], ["config", "diff"]):  # named without their arguments
            continue
        args = cli._read(words)
        if args.run_command is cli._pretrain:
            assert cli.read_config(args).data.train or "data.train" not in " ".join(words)


def test_blocks_of_other_languages_parse() -> None:
    text = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    (job,) = blocks("yaml", text)
    (line,) = _container(job)["args"]
    assert yaml.safe_load(job)["kind"] == "Job" and line.startswith("exec torchrun ") and "-m nest_fn.train" in line
    (script,) = blocks("bash", text)
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_presets_have_the_parameters_that_are_told() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) ([MB]) \| (\d+) x (\d+) \|", TEXT, flags=re.MULTILINE)
    assert {row[0] for row in rows} == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    for name, number, unit, width, layers in rows:
        cfg = Config.preset(name)
        total = count(abstract(cfg)[0]) + count(abstract(cfg)[1]["quantizer"])
        assert total / {"M": 1e6, "B": 1e9}[unit] == pytest.approx(float(number), rel=0.3 if name == "tiny" else 0.05)
        assert (cfg.encoder.d_model, cfg.encoder.n_layers) == (int(width), int(layers))

"""The README is true: its Python runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from nest_fn import Config
from nest_fn.layers.tree import count
from nest_fn.model import abstract
from nest_fn.train import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_commands_are_understood() -> None:
    lines = "\n".join(blocks("sh")).splitlines()
    spoken = [line for line in lines if line.startswith("nest-fn")] + re.findall(r"`(nest-fn [a-z][^`]*)`", TEXT)
    spoken += [line.partition("-m ")[2] for line in lines if line.startswith("torchrun")]
    assert len(spoken) >= 5
    for line in spoken:
        words = shlex.split(line, comments=True)[1:]
        if words in (["data", "validate"], ["config", "diff"]):  # named without their arguments
            continue
        cli._parser().parse_args(words)


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_presets_have_the_parameters_that_are_told() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) ([MB]) \| (\d+) x (\d+) \|", TEXT, flags=re.MULTILINE)
    assert {row[0] for row in rows} == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    for name, number, unit, width, layers in rows:
        cfg = Config.preset(name)
        total = count(abstract(cfg)[0]) + count(abstract(cfg)[1]["quantizer"])
        assert total / {"M": 1e6, "B": 1e9}[unit] == pytest.approx(float(number), rel=0.3 if name == "tiny" else 0.05)
        assert (cfg.encoder.d_model, cfg.encoder.n_layers) == (int(width), int(layers))

"""The pages of ``docs/tour/`` run at a small size, and their outputs are those of the code that they show."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from nest_fn.train.data.synth import CorpusSpec, write_corpus

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("pretraining.md", "inside.md", "study.md")
MOST_BYTES = 1_000_000  # of all pages and pictures
SMALLER = {
    "nest-fn data synth corpus\n": "",  # the fixture's
    "nest-fn pretrain -c demo": "nest-fn pretrain -c tiny",
    "config: demo": "config: tiny",
    "data.batch_seconds=20": "data.batch_seconds=8",
    "max_steps=800": "max_steps=4 trainer.log_every=1",
    "max_steps=400": "max_steps=2",
    "valid_every=100": "valid_every=2",
    "save_every=400": "save_every=2",
    "step_00000400": "step_00000002",
    "--from 400 --steps 20": "--from 2 --steps 1",
    "--out report.html": "--out report.html --utterances 1",
    "encoder.d_model=64": "encoder.d_model=16",
    "encoder.n_layers=2": "encoder.n_layers=1",
    "split(key(1), 16)": "split(key(1), 2)",
    "steps=8, count=1": "steps=2, count=1",
    "linspace(-0.1, 0.1, 21)": "linspace(-0.05, 0.05, 3)",
    "[:24]": "[:3]",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]


def _tour() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_tour", ROOT / "docs" / "run_tour.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the pages run, with a corpus of half a minute."""
    place = tmp_path_factory.mktemp("tour")
    spec = CorpusSpec(
        train_minutes=0.5, valid_minutes=0.2, noise_minutes=0.3, probe_train_minutes=0.05, probe_test_minutes=0.05,
        train_speakers=4, valid_speakers=2, probe_train_speakers=1, probe_test_speakers=1, min_seconds=1.5,
        max_seconds=3.0,
    )  # fmt: skip
    write_corpus(place / "corpus", spec)
    with contextlib.chdir(place):
        yield place


def text(page: str) -> str:
    return (ROOT / "docs" / "tour" / page).read_text(encoding="utf-8")


def test_the_pages_run(folder: Path) -> None:
    """One after another, each on what those before it left; what is drawn is what the page shows."""
    tour = _tour()
    assert tour.PAGES == PAGES
    ran = [tour.run_page(text(page), SMALLER) for page in PAGES]
    drawn = [path for page in ran for path in tour.pictures(page.text)]
    assert len(drawn) == 8 and all((folder / path).read_text().rstrip().endswith("</svg>") for path in drawn)
    first, inside, study = ran
    assert "equal" in first.outputs[-1]
    assert abs(inside.names["slope"] - inside.names["difference"]) < 0.1 * abs(inside.names["slope"]) + 1e-3
    assert abs(inside.names["parabola"] - inside.names["true"]).max() < 0.01
    assert len(study.names["found"]) == 6 and "95 %" in study.outputs[3]


@pytest.mark.parametrize("page", PAGES)
def test_outputs_are_of_the_code_shown(page: str) -> None:
    """Else: ``python docs/run_tour.py FOLDER``."""
    tour = _tour()
    assert tour.recorded_digest(text(page)) == tour.code_digest(text(page))
    assert text(page).count("```text") >= 2


def test_every_smaller_setting_is_of_a_page() -> None:
    assert not [old for old in SMALLER if not any(old in text(page) for page in PAGES)]


def test_the_tour_is_small() -> None:
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "tour").iterdir()) < MOST_BYTES

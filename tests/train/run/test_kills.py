"""The harness that kills runs (``tests.kills``): it goes through on a short run, and it can tell when bytes differ."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kills import Seen, main, phase
from tests.kills_processes import Attempt, Setting, _children, _state
from tests.kills_report import compare
from tests.train.conftest import Corpus

LINES = [{"step": 1, "loss": 0.1, "time": {"seconds": 1}}, {"step": 2, "loss": 0.2, "time": {"seconds": 2}}]
BEFORE = Seen(8, 0, frozenset({"step_00000008"}), 8, False, False, "1 host")
AFTER = BEFORE._replace(lock="2 host")


@pytest.mark.slow
def test_three_kills(corpus: Corpus, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = ["--train", corpus.train, "--valid", corpus.valid, "--noise", corpus.noise]
    length = ["--steps", "48", "--kills", "3", "--seed", "3"]
    assert main(["--out", str(tmp_path), *length, *data, "--json", str(tmp_path / "found.json")]) == 0
    told = capfd.readouterr().out
    assert "| final checkpoint | equal to the byte |" in told and "| kills | 3 of 3" in told
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["good"] and found["verdict"]["compared"] >= 7 and found["verdict"]["lines"] == 16 + 5
    assert {kill["early"] for kill in found["kills"]} == {False, True}
    assert max(kill["resumed"] or 0 for kill in found["kills"]) > 0
    with pytest.raises(SystemExit, match="earlier experiment"):
        main(["--out", str(tmp_path), *length, *data])


def write_run(run: Path, lines: list[dict[str, object]], names: tuple[str, ...] = ("step_00000002",)) -> Path:
    """A run's folder with made-up bytes."""
    for name in names:
        (run / "checkpoints" / name).mkdir(parents=True)
        for file in ("meta.json", "params.pt"):
            (run / "checkpoints" / name / file).write_text(f"{name} {file}")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_equal_runs_are_equal_whatever_the_time(tmp_path: Path) -> None:
    reference = write_run(tmp_path / "reference", LINES, ("step_00000001", "step_00000002"))
    later = [line | {"time": {"seconds": 9}} for line in LINES]
    verdict = compare(write_run(tmp_path / "run", later), reference, 2)
    assert verdict.equal and (verdict.compared, verdict.lines, verdict.leftovers) == (2, 2, ())


def checkpoint(run: Path, step: int) -> Path:
    """A folder of made-up checkpoints."""
    return run / "checkpoints" / f"step_{step:08d}"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda run: (checkpoint(run, 2) / "params.pt").write_text("x"), "final"),
        (lambda run: (checkpoint(run, 2) / "params.pt").unlink(), "final"),
        (
            lambda run: checkpoint(run, 2).rename(run / "checkpoints" / ".step_00000002.old"),
            "final",
        ),
        (lambda run: (checkpoint(run, 1) / "meta.json").write_text("x"), "earlier"),
        (lambda run: (run / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n"), "metrics"),
        (lambda run: (run / "metrics.jsonl").write_text(json.dumps(LINES[0] | {"loss": 0.11}) + "\n"), "metrics"),
    ],
)
def test_what_differs_is_told(tmp_path: Path, change: Callable[[Path], object], part: str) -> None:
    names = ("step_00000001", "step_00000002")
    run, reference = (write_run(tmp_path / name, LINES, names) for name in ("run", "reference"))
    change(run)
    verdict = compare(run, reference, 2)
    assert not verdict.equal
    assert [name for name in ("final", "earlier", "metrics") if getattr(verdict, name)] == [part]


@pytest.mark.parametrize(
    ("after", "told", "wanted"),
    [
        (BEFORE, "", "imports"),
        (AFTER, "", "data and resume"),
        (AFTER, "run folder x", "steps"),
        (AFTER._replace(names=BEFORE.names | {".step_00000010.7.tmp"}), "run folder x", "save"),
        (AFTER._replace(names=BEFORE.names | {".step_00000002.gone"}), "run folder x", "removal of old checkpoints"),
        (AFTER._replace(checkpoint=10, measured=9), "run folder x", "validation"),
        (AFTER._replace(checkpoint=10, measured=10), "run folder x", "validation"),
        (AFTER._replace(checkpoint=10, measured=10, validated=True), "run folder x", "steps"),
    ],
)
def test_what_was_interrupted(after: Seen, told: str, wanted: str) -> None:
    assert phase(BEFORE, after, told, 10) == wanted


class Launched(Setting):
    """A launcher of two sleeping processes in sessions of their own, which ends them when one of them is lost."""

    def command(self, run: Path, steps: int) -> list[str]:
        start = "ranks = [subprocess.Popen(['sleep', '600'], start_new_session=True) for _ in range(2)]"
        watch = "while all(rank.poll() is None for rank in ranks): time.sleep(0.01)"
        return [sys.executable, "-c", f"import subprocess, time\n{start}\n{watch}\n[rank.kill() for rank in ranks]"]


@pytest.mark.parametrize(("draw", "victims"), [(0.1, "rank 0"), (0.7, "rank 1"), (0.9, "all")])
def test_no_process_is_left(tmp_path: Path, draw: float, victims: str) -> None:
    attempt = Attempt(Launched(2, ()), tmp_path / "run", 1)
    end = time.monotonic() + 30
    while len(ranks := _children(attempt.process.pid)) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(ranks) == 2 and all(_state(pid) for pid in ranks)
    assert attempt.kill(draw) == (victims, 0)
    assert attempt.process.returncode == (0 if victims != "all" else -9)
    assert not any(_state(pid) for pid in ranks)
    assert attempt.kill(draw) == ("all", 0)  # of what has ended, nothing

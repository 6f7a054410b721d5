"""``nest-fn study``: every arm and seed once, over kills; arms of a seed see the same; the table says what it holds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nest_fn.train.cli.main import main
from nest_fn.train.report.record import read_record
from nest_fn.train.studies.page import findings
from nest_fn.train.studies.plan import Task, read_study
from nest_fn.train.studies.table import collect, pairing
from tests.train.conftest import Corpus
from tests.train.report.test_page import Page

Captured = pytest.CaptureFixture[str]
SMALL = ("data.batch_seconds=8", "data.max_duration=8", "encoder.n_layers=1", "encoder.subsampling_conv_channels=8",
         "trainer.max_steps=4", "trainer.log_every=1", "trainer.valid_every=2", "trainer.save_every=1")  # fmt: skip


def written(folder: Path, corpus: Corpus, arms: str = "{a: [], b: [optim.lr=0.01]}", **more: str) -> str:
    """A study file of a tiny model."""
    folder.mkdir(exist_ok=True)
    data = (f"data.train={corpus.train}", f"data.valid={corpus.valid}", f"data.noise={corpus.noise}")
    entries = {"config": "tiny", "overrides": f"[{', '.join((*data, *SMALL))}]", "seeds": "[0, 1]", "arms": arms} | more
    text = "".join(f"{key}: {value}\n" for key, value in entries.items() if value)
    (folder / "study.yaml").write_text(text)
    return str(folder / "study.yaml")


@pytest.fixture(scope="module")
def done(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two arms and two seeds, whose command was killed once in the middle of a run."""
    folder = tmp_path_factory.mktemp("study")
    file = written(folder, corpus)
    argv = ["study", file, "--folder", str(folder / "made")]
    child = subprocess.Popen([sys.executable, "-m", "nest_fn.train", *argv], stderr=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, cwd=folder)  # fmt: skip
    second, deadline = folder / "made" / "runs" / "b" / "seed_0" / "checkpoints", time.monotonic() + 120
    while not any(second.glob("step_*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert main(argv) == 0
    return folder


def test_a_killed_study_goes_on_without_repeating_a_run(done: Path) -> None:
    study = read_study(done / "study.yaml")
    assert [str(task) for task in study.tasks] == ["a, seed 0", "b, seed 0", "a, seed 1", "b, seed 1"]
    for task in study.tasks:
        record = read_record(task.folder(done / "made"))
        assert record.finished and [line["step"] for line in record.steps] == [1, 2, 3, 4]
        begun = sum(line.startswith("command:") for line in record.log)
        assert begun == (2 if str(task) == "b, seed 0" else 1)


def test_a_finished_study_runs_nothing(done: Path, capsys: Captured) -> None:
    before = {p: p.read_bytes() for p in (done / "made").rglob("*") if p.is_file()}
    assert main(["study", str(done / "study.yaml"), "--folder", str(done / "made")]) == 0
    assert capsys.readouterr().err.count("is finished") == 4
    assert {p: p.read_bytes() for p in (done / "made").rglob("*") if p.is_file()} == before


def test_arms_of_a_seed_are_paired(done: Path) -> None:
    study, folder = read_study(done / "study.yaml"), done / "made"
    assert "the same data in the same order (equal digests)" in pairing(study, folder)
    first = {str(t): next(iter(read_record(t.folder(folder)).steps)) for t in study.tasks}
    same = ("loss", "masked_tokens", "unigram_accuracy", "padding_efficiency")  # before the rates make a difference
    for seed in (0, 1):
        a, b = first[f"a, seed {seed}"], first[f"b, seed {seed}"]
        assert [a[name] for name in same] == [b[name] for name in same]
    assert first["a, seed 0"]["loss"] != first["a, seed 1"]["loss"]


def test_the_table_holds_the_last_values(done: Path) -> None:
    study, folder = read_study(done / "study.yaml"), done / "made"
    loss = collect(study, folder)[0]
    for arm in loss.arms:
        for seed, value in arm.values.items():
            assert value == read_record(Task(arm.name, seed).folder(folder)).last("loss", valid=True)
    b = loss.arms[1]
    assert b.difference is not None and b.ignoring_pairs is not None
    assert b.difference.mean == pytest.approx(b.mean - loss.arms[0].mean) and b.holm == b.difference.p
    content = json.loads((folder / "table.json").read_text())
    assert content["valid.loss"]["arms"][1]["values"] == {str(seed): value for seed, value in b.values.items()}
    text = (folder / "table.md").read_text()
    assert "| a | 2 |" in text and "baseline" in text and "* valid.loss: b is " in text and "times as wide" in text


def test_the_report(done: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["study", str(done / "study.yaml"), "--folder", str(done / "made"), "--collect"]) == 0
    page = Page((done / "made" / "report.html").read_text())
    assert page.open == [] and page.kinds.count("svg") == 4
    assert all(address.startswith(("data:", "#")) for address in page.addresses)


def test_one_task_and_an_array(done: Path, corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    script = tmp_path / "array.sh"
    assert main(["study", str(done / "study.yaml"), "--folder", str(tmp_path / "made"), "--array", str(script)]) == 0
    text = script.read_text()
    assert "#SBATCH --array=0-3" in text and "#   3: b, seed 1" in text and os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0 and not (tmp_path / "made").exists()
    assert main(["study", str(done / "study.yaml"), "--folder", str(tmp_path / "made"), "--task", "3"]) == 0
    assert [str(p.relative_to(tmp_path / "made")) for p in (tmp_path / "made").glob("runs/*/*")] == ["runs/b/seed_1"]
    again = read_record(tmp_path / "made" / "runs" / "b" / "seed_1")
    assert again.last("loss") == read_record(done / "made" / "runs" / "b" / "seed_1").last("loss")
    assert main(["study", str(done / "study.yaml"), "--folder", str(tmp_path / "made"), "--collect"]) == 0
    assert "1 of 4 runs are finished" in capsys.readouterr().out


def test_a_run_that_fails_does_not_end_the_study(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    wild = "optim.sched=null, optim.name=sgd, optim.lr=1e30, optim.weight_decay=1"
    file = written(tmp_path, corpus, f"{{a: [], wild: [{wild}], z: []}}", seeds="[0]")
    assert main(["study", file, "--folder", str(tmp_path / "made")]) == 1
    told = capsys.readouterr()
    assert "1 runs failed: wild, seed 0" in told.err and "2 of 3 runs are finished" in told.out
    assert "| wild | 0 |" in told.out and "z is +0 from a, of one seed only" in told.out


def test_a_changed_arm_is_refused(done: Path, corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    shutil.copytree(done / "made", tmp_path / "made")
    file = written(tmp_path, corpus, "{a: [encoder.dropout=0.3]}", seeds="[0]")
    for path in (tmp_path / "made" / "runs" / "a" / "seed_0" / "checkpoints").glob("step_00000004"):
        shutil.rmtree(path)
    assert main(["study", file, "--folder", str(tmp_path / "made")]) == 1
    assert "encoder.dropout: was " in capsys.readouterr().err


def test_a_grid(corpus: Corpus, tmp_path: Path) -> None:
    grid = "{masking.block_size: [24, 40], optim.lr: [1e-3, 2e-3], encoder.dropout: [0.1]}"
    study = read_study(written(tmp_path, corpus, "", grid=grid))
    assert next(iter(study.arms)) == "masking.block_size=24, optim.lr=0.001" and len(study.arms) == 4
    assert "Mind that the arms differ in masking, " in " ".join(findings(study, collect(study, tmp_path)))
    cfg = study.cfg(study.tasks[3])
    assert (cfg.masking.block_size, cfg.optim.lr, cfg.encoder.dropout, cfg.trainer.seed) == (40, 2e-3, 0.1, 0)


@pytest.mark.parametrize(
    "more, told",
    [
        ({"armz": "{}"}, "'armz' is no key of a study"),
        ({"grid": "{optim.lr: [1]}"}, "want either arms"),
        ({"arms": "[]"}, "arms is []"),
        ({"arms": "{../x: []}"}, "names an arm and its folder"),
        ({"arms": "{a: [trainer.seed=1]}"}, "stand under seeds"),
        ({"arms": "{a: [optim.lrr=1]}"}, "a, seed 0: "),
        ({"arms": "", "grid": "{optim.lr: 1}"}, "want a list of values"),
        ({"seeds": "[1, 1]"}, "different whole numbers"),
        ({"baseline": "c"}, "baseline 'c' is no arm"),
        ({"measures": "7"}, "want a list of texts"),
    ],
)
def test_mistakes_are_one_line(
    corpus: Corpus, tmp_path: Path, capsys: Captured, more: dict[str, str], told: str
) -> None:
    file = written(tmp_path, corpus, **({"arms": "{a: []}"} | more))
    assert main(["study", file, "--folder", str(tmp_path / "made")]) == 2
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err and not (tmp_path / "made").exists()


def test_places_that_are_taken(done: Path, corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for argv, told in (
        (["--folder", str(tmp_path)], "nothing there was touched"),
        (["--folder", str(tmp_path / "no"), "--collect"], "holds no study yet"),
        (["--folder", str(tmp_path / "no"), "--task", "4"], "run 4 of 4; want 0 to 3"),
    ):
        assert main(["study", str(done / "study.yaml"), *argv]) == 2
        assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

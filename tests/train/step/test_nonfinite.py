"""Updates that cannot be made: left out and counted, or the end of the run with a dump (faults D1 to D4)."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nest_fn.checkpoint.folder import read_checkpoint
from nest_fn.layers.tree import flatten
from nest_fn.train.cli.main import main
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.errors import is_out_of_memory
from tests.train.conftest import Corpus
from tests.train.run.test_pretrain import checkpoints, metrics, words

Captured = pytest.CaptureFixture[str]

WILD = ["optim.sched=null", "optim.name=sgd", "optim.lr=1e30", "optim.weight_decay=1", "trainer.log_every=1"]
"""Parameters explode at the first update, so that no other one is finite."""


@pytest.fixture(scope="module")
def silent(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides: a 25th utterance is silent and the guard of its logarithm off, so its batch, and no other, is NaN."""
    folder = tmp_path_factory.mktemp("silent")
    write_wav(folder / "silence.wav", np.zeros(24000, np.int16))
    (folder / "m.jsonl").write_text(json.dumps({"audio_filepath": "silence.wav", "duration": 1.5}) + "\n")
    guard = ["preprocessor.log_zero_guard_value=1e-300", "preprocessor.dither=0", "trainer.log_every=4"]
    return [f"data.train={corpus.train},{folder / 'm.jsonl'}", *guard]


def state(run: Path, step: int, where: str = "checkpoints") -> Any:
    """A checkpoint."""
    return read_checkpoint(run / where / f"step_{step:08d}")


def test_a_bad_batch_is_left_out_and_counted(
    corpus: Corpus, silent: list[str], tmp_path: Path, capsys: Captured
) -> None:
    assert main(words(corpus, tmp_path / "none", *silent)) == 5
    capsys.readouterr()
    run = tmp_path / "run"
    assert main(words(corpus, run, *silent, "trainer.skip_nonfinite=1")) == 0
    told = capsys.readouterr().err
    lines = [line for line in metrics(run) if "valid" not in line]
    skipped = sum(line["skipped"] for line in lines)
    assert skipped == told.count("Left out.") == 2
    assert all("silence.wav" in part for part in told.split("Left out.\n")[1:])
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert not (run / "failures").exists()


def test_a_run_that_skips_is_the_same_when_interrupted(corpus: Corpus, silent: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    silent = [*silent, "trainer.skip_nonfinite=1"]
    assert main(words(corpus, one, *silent)) == 0
    for steps in (6, 12, 24):  # of which the first two are whole windows of saving, but not of metrics
        assert main(words(corpus, two, *silent, f"trainer.max_steps={steps}", "data.valid=")) == 0
    tensors = [name for name in checkpoints(one) if "00000024" in name and "window" not in name and "meta" not in name]
    tensors = [name for name in tensors if "config" not in name]
    assert len(tensors) >= 3 and all(checkpoints(one)[name] == checkpoints(two)[name] for name in tensors)
    assert sum(line["skipped"] for line in metrics(one) if "skipped" in line) == 2


def test_nothing_moves_in_a_step_that_is_left_out(corpus: Corpus, tmp_path: Path) -> None:
    run, often = tmp_path / "run", ["trainer.save_every=1", "trainer.max_steps=3", "data.valid="]
    assert main(words(corpus, run, "trainer.skip_norm=1e-6", *often)) == 0  # every gradient is a spike
    first, last = state(run, 1), state(run, 3)
    for tree in ("params", "state", "optimizer"):
        ours, theirs = flatten(first.trees[tree]), flatten(last.trees[tree])
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[path], leaf) for path, leaf in theirs.items())
    assert (last.meta["step"], last.meta["batch"] - first.meta["batch"]) == (3, 2)
    (line,) = metrics(run)
    assert line["skipped"] == 3 and line["loss"] == 0 and line["grad_norm"] == 0 and line["lr"] > 0


def test_a_spike_is_left_out(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    short = ["trainer.max_steps=12", "trainer.log_every=1", "data.valid=", "optim.lr=1e-5"]
    assert main(words(corpus, tmp_path / "plain", *short)) == 0
    norms = [line["grad_norm"] for line in metrics(tmp_path / "plain")]
    limit = sorted(norms)[-2]  # below the greatest of all
    capsys.readouterr()
    assert main(words(corpus, tmp_path / "run", *short, f"trainer.skip_norm={limit + 1e-6}")) == 0
    told = capsys.readouterr().err
    lines = metrics(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [int(norm == max(norms)) for norm in norms]
    assert told.count("above trainer.skip_norm") == 1 and f"step {norms.index(max(norms))}: loss" in told


def test_how_many_in_a_row_survives_a_resume(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    rule = [*WILD, "trainer.skip_nonfinite=3", "data.valid="]
    assert main(words(corpus, tmp_path / "whole", *rule)) == 5  # update 0 is made; 1, 2, 3 are left out; 4 ends it
    assert main(words(corpus, run, *rule, "trainer.max_steps=3")) == 0
    assert state(run, 3).meta["skipped"] == 2
    capsys.readouterr()
    assert main(words(corpus, run, *rule)) == 5
    told = capsys.readouterr().err
    assert told.count("Left out.") == 1 and "error: step 4: loss" in told
    assert metrics(run) == metrics(tmp_path / "whole")


def test_what_a_failure_leaves_behind(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    assert main(words(corpus, run, *WILD, "trainer.save_every=1")) == 5
    told = capsys.readouterr().err
    assert f"{run / 'failures' / 'step_00000001'}; nest-fn replay {run} 1 looks into it" in told
    assert "gradients not finite: encoder" in told and "Traceback" not in told
    dump, last = state(run, 1, "failures"), state(run, 1)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]
    for tree in ("params", "state", "optimizer"):
        ours, theirs = flatten(dump.trees[tree]), flatten(last.trees[tree])
        assert all(torch.equal(ours[path], leaf) for path, leaf in theirs.items())
    assert (dump.meta["epoch"], dump.meta["batch"]) == (last.meta["epoch"], last.meta["batch"])
    assert len(dump.meta["key"]) == 2 and not np.isfinite(float(dump.meta["grad_norm"]))
    assert set(dump.meta["gradients_not_finite"]) <= set(flatten(dump.trees["params"]))
    assert all(name in told for name in dump.meta["utterances"][:20])


def test_a_dump_that_fails_hides_nothing(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "command.txt").touch()
    (run / "failures").write_text("a file where the folder should be")
    assert main(words(corpus, run, *WILD)) == 5
    told = capsys.readouterr().err
    assert "nothing was updated" in told and "could not be written down" in told and "Traceback" not in told


LIMITED = """
import resource, sys
from nest_fn.train.cli.main import main
from nest_fn.train.run import loop
before = loop.make_step
def limited(*args, **options):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
    return before(*args, **options)
loop.make_step = limited
sys.exit(main(sys.argv[1:]))
"""


def test_out_of_memory_is_one_message(corpus: Corpus, tmp_path: Path) -> None:
    """The machine gives 300 MiB more once the run has begun; the first step needs more."""
    large = [
        "encoder.d_model=1024",
        "encoder.subsampling_conv_channels=1024",
        "data.batch_seconds=60",
        "data.num_workers=0",
    ]
    argv = words(corpus, tmp_path / "run", *large, "encoder.n_layers=2")
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", LIMITED, *argv], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "out of memory on cpu in a batch of" in done.stderr and "lower data.batch_seconds (60)" in done.stderr
    assert "utterances: train" in done.stderr and "Traceback" not in done.stderr


def test_other_errors_are_not_taken_for_memory() -> None:
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(1 << 60)
    assert is_out_of_memory(caught.value)
    for said in (
        "could not create a primitive",
        "std::bad_alloc",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED",
    ):
        assert is_out_of_memory(RuntimeError(said))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(RuntimeError("could not create a primitive descriptor for a convolution"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_collapse_can_end_a_run(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    """Without normalisation all features are alike, and few codes are used."""
    run = tmp_path / "run"
    flat = ["preprocessor.normalize=null", "masking.mask_prob=0.1", "num_classes=96", "data.valid="]
    flat += ["trainer.log_every=50", "trainer.max_steps=54"]
    assert main(words(corpus, run, *flat)) == 0
    warned = capsys.readouterr().err
    assert "the quantizer uses few codes" in warned
    assert main(words(corpus, tmp_path / "strict", *flat, "trainer.stop_on_collapse=true")) == 5
    told = capsys.readouterr().err
    assert "error: step 50: ended for codebook collapse, saved" in told
    again = words(corpus, tmp_path / "strict", *flat, "trainer.stop_on_collapse=false")
    assert main(again) == 0
    assert metrics(tmp_path / "strict") == metrics(run)
    assert checkpoints(tmp_path / "strict").keys() == checkpoints(run).keys()

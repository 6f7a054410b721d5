"""``nest-fn pretrain`` over two ranks from outside: the run of one rank, to the bit every time, and what each rank
says when one of them is stopped, lost or started otherwise (levels R0 to R2; faults F1 to F5, G5).
"""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn.checkpoint.folder import read_checkpoint
from nest_fn.layers.tree import flatten
from nest_fn.train.cli.main import _parser, main, read_config
from nest_fn.train.data.dataset import batches, open_dataset
from tests.train.conftest import Corpus
from tests.train.distributed.rank_runs import by_hand, by_torchrun, saved, steps
from tests.train.run.test_pretrain import checkpoints, metrics
from tests.train.run.test_pretrain import words as words_of_24_steps
from tests.train.step.test_nonfinite import WILD

STEPS = 48  # so many that a signal sent at the first checkpoint comes long before the last one
ENDLESS = "trainer.max_steps=100000"  # for runs that are lost anyway

# A bias before a batch norm, and one of keys before a softmax, has no gradient but rounding, of which Adam makes whole
# steps; training does not notice, running statistics do. So validation is less alike than training.
ALIKE, VALID_ALIKE = 1e-5, 3e-3  # relative


def words(corpus: Corpus, run: Path, *overrides: str) -> list[str]:
    """A command line whose lines, validations and checkpoints come at the same steps, however a run is cut."""
    often = ["trainer.log_every=6", "trainer.valid_every=12", "trainer.save_every=12", f"trainer.max_steps={STEPS}"]
    return words_of_24_steps(corpus, run, "data.row_multiple=2", *often, *overrides)


@pytest.fixture(scope="module")
def one(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one rank."""
    run = tmp_path_factory.mktemp("ranks") / "one"
    assert main(words(corpus, run)) == 0
    return run


@pytest.fixture(scope="module")
def two(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("ranks")
    with by_torchrun(words(corpus, folder / "two"), folder / "logs") as launcher:
        assert launcher.ended() == 0, launcher.told()
    assert launcher.told().count("2 ranks; each holds all parameters") == 1  # rank 1 is silent
    return folder / "two"


def assert_same_bytes(run: Path, other: Path) -> None:
    """Metrics and every file of every checkpoint."""
    ours, theirs = checkpoints(run), checkpoints(other)
    assert sorted(ours) == sorted(theirs) and f"checkpoints/step_{STEPS:08d}/meta.json" in ours
    assert not [name for name in ours if ours[name] != theirs[name]]
    assert metrics(run) == metrics(other)


def assert_alike(run: Path, other: Path) -> None:
    """Metrics are equal to rounding; what is counted is equal."""
    exact = ("masked_tokens", "masked_share", "unigram_accuracy", "coverage", "perplexity", "overflow")
    ours, theirs = metrics(run), metrics(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, same in zip(ours, theirs, strict=True):
        valid = "valid" in line
        a, b = line.get("valid", line), same.get("valid", same)
        more = () if valid else ("epoch", "accuracy", "lr", "skipped", "padding_efficiency")
        assert {name: a[name] for name in (*exact, *more)} == {name: b[name] for name in (*exact, *more)}
        assert a["loss"] == pytest.approx(b["loss"], rel=VALID_ALIKE if valid else ALIKE)
        assert abs(a["accuracy"] - b["accuracy"]) * a["masked_tokens"] < 1.5
        assert valid or a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def trees(run: Path, step: int, where: str = "checkpoints") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by tree and path."""
    found: dict[str, Any] = read_checkpoint(run / where / f"step_{step:08d}").trees
    return flatten({name: tree for name, tree in found.items() if name != "window"})


def test_two_ranks_make_the_run_of_one(one: Path, two: Path) -> None:
    assert_alike(two, one)
    assert steps(two) == steps(one) == [12, 24, 36, 48]


def test_only_rank_0_writes(two: Path) -> None:
    names = {path.name for path in two.iterdir()} - {"tensorboard"}
    texts = {"config.yaml", "command.txt", "environment.json", "data.json", "metrics.jsonl", "log.txt"}
    assert names == texts | {"checkpoints"}
    assert not (two / "tensorboard").exists() or len(list((two / "tensorboard").iterdir())) == 1
    lines = metrics(two)
    assert [line["step"] for line in lines if "valid" not in line] == list(range(6, STEPS + 1, 6))
    assert [line["step"] for line in lines if "valid" in line] == list(range(12, STEPS + 1, 12))


def test_the_same_ranks_again_make_the_same_bytes(corpus: Corpus, tmp_path: Path, two: Path) -> None:
    run = tmp_path / "run"
    with by_hand(tmp_path, words(corpus, run), words(corpus, run)) as ranks:
        assert [rank.ended() for rank in ranks] == [0, 0], ranks[0].told()
    assert ranks[1].told() == ""
    assert_same_bytes(run, two)


@pytest.mark.slow
def test_stopped_twice_and_started_again(corpus: Corpus, tmp_path: Path, two: Path) -> None:
    """Once one rank alone is asked to, once the launcher; all ranks stop after the same step, and go on to the bit."""
    run = tmp_path / "run"
    with by_hand(tmp_path, words(corpus, run), words(corpus, run)) as ranks:
        saved(run, 12, ranks)
        ranks[1].send(signal.SIGUSR1)
        assert [rank.ended() for rank in ranks] == [75, 75], ranks[0].told()
    assert f"asked to stop: saved at step {steps(run)[-1]};" in ranks[0].told() and ranks[1].told() == ""
    assert not (run / "lock").exists() and 12 <= steps(run)[-1] < 24
    with by_torchrun(words(corpus, run, "--resume", "must"), tmp_path) as launcher:
        saved(run, 24, [launcher])
        launcher.send(signal.SIGTERM)
        assert launcher.ended() == 1  # whatever its ranks end with
    assert f"asked to stop: saved at step {steps(run)[-1]};" in launcher.told()
    assert not (run / "lock").exists() and 24 <= steps(run)[-1] < STEPS
    with by_torchrun(words(corpus, run, "--resume", "must"), tmp_path) as launcher:
        assert launcher.ended() == 0, launcher.told()
    assert_same_bytes(run, two)


def lost(told: str, who: str) -> bool:
    """Whether a rank's last words name the one that was lost, and what to do; without a traceback."""
    return bool(re.search(rf"error: {who}.*start again, with as many ranks", told)) and "Traceback" not in told


@pytest.mark.slow
def test_a_killed_rank_is_named_and_one_rank_goes_on(corpus: Corpus, tmp_path: Path, one: Path) -> None:
    run = tmp_path / "run"
    with by_hand(tmp_path, words(corpus, run), words(corpus, run)) as ranks:
        saved(run, 12, ranks)
        ranks[1].send(signal.SIGKILL)
        assert ranks[0].ended(30) == 6
    assert lost(ranks[0].told(), "rank 1 of 2 was lost")
    assert 12 <= steps(run)[-1] < STEPS and f"saved at step {steps(run)[-1]};" in ranks[0].told()
    assert main(words(corpus, run, "--resume", "must")) == 0
    assert_alike(run, one)


def test_what_a_rank_holds_that_is_killed_cannot_be_saved(corpus: Corpus, tmp_path: Path) -> None:
    """Where parameters are cut over ranks; it is said, and the log says it too."""
    run = tmp_path / "run"
    argv = words(corpus, run, ENDLESS, "trainer.save_every=2", "trainer.log_every=1", "trainer.shard=true")
    with by_hand(tmp_path, argv, argv) as ranks:
        saved(run, 2, ranks)
        ranks[1].send(signal.SIGKILL)
        assert ranks[0].ended(60) == 6
    last = steps(run)[-1]
    log = (run / "log.txt").read_text()
    for told in (ranks[0].told(), log):
        assert "error: rank 1 of 2 was lost" in told and f"step {last}/100000" in told
        assert f"step {last + 1}/" not in told or f"step {last + 1} is not saved: its parameters are cut over 2" in told


@pytest.mark.slow
def test_a_hanging_rank_is_named(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = words(corpus, run, ENDLESS, "trainer.save_every=2", "trainer.rank_timeout_s=4")
    with by_hand(tmp_path, argv, argv) as ranks:
        saved(run, 2, ranks)
        ranks[1].send(signal.SIGSTOP)
        assert ranks[0].ended(60) == 6
        assert ranks[1].popen.poll() is None
    assert lost(ranks[0].told(), "rank 1 of 2 was lost")


def test_rank_0_is_killed_and_with_it_the_store(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = words(corpus, run, ENDLESS, "trainer.save_every=2")
    with by_hand(tmp_path, argv, argv) as ranks:
        saved(run, 2, ranks)
        ranks[0].send(signal.SIGKILL)
        assert ranks[1].ended(60) == 6
    assert lost(ranks[1].told(), "the job's store is gone, and with it rank 0")
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    assert main(words(corpus, run, f"trainer.max_steps={steps(run)[-1] + 1}", "--resume", "must")) == 0


@pytest.mark.parametrize("what", ["optim.lr is 0.06, on rank 0 0.05", "data is "])
def test_ranks_that_differ_do_not_begin(corpus: Corpus, tmp_path: Path, what: str) -> None:
    run = tmp_path / "run"
    other = [f"data.train={corpus.valid}"] if what.startswith("data") else ["optim.lr=0.06"]
    with by_hand(tmp_path, words(corpus, run), words(corpus, run, *other)) as ranks:
        assert [rank.ended() for rank in ranks] == [6, 6]
    for rank in ranks:
        assert f"1 of 2 ranks differ from rank 0; start all alike\n  rank 1: {what}" in rank.told()
        assert "Traceback" not in rank.told()
    assert not run.exists()


def test_a_file_that_one_rank_cannot_read(corpus: Corpus, tmp_path: Path) -> None:
    """All end after the same step, saved, although each holds a part of the parameters only."""
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(Path(corpus.train).parent, data)
    argv = words(corpus, run, f"data.train={data / 'train.jsonl'}", "trainer.shard=true")
    dataset = open_dataset(read_config(_parser().parse_args(argv)).data, 0)
    fifth = next(batches(dataset, batch=4, rank=1, world=2))
    bad = data / next(name for name in fifth["ids"] if name).split("@")[0]
    bad.write_bytes(bad.read_bytes()[:8000])
    with by_hand(tmp_path, argv, argv) as ranks:
        assert [rank.ended() for rank in ranks] == [6, 3], ranks[0].told()
    assert f"rank 1: error: {data / 'train.jsonl'}:" in ranks[1].told() and "frames wanted" in ranks[1].told()
    assert lost(ranks[0].told(), f"rank 1 ended: {data / 'train.jsonl'}:.*{bad.name}")
    assert not (run / "lock").exists() and steps(run) == [4]
    assert "saved at step 4; the same command goes on from there" in ranks[0].told()
    told, other = (run / "log.txt").read_text(), (run / "log_rank1.txt").read_text()
    assert f"error: rank 1 ended: {data / 'train.jsonl'}" in told and f"error: {data / 'train.jsonl'}" in other


def test_one_rank_then_two_with_shards_then_one(corpus: Corpus, tmp_path: Path, one: Path, two: Path) -> None:
    run = tmp_path / "run"
    assert main(words(corpus, run, "trainer.max_steps=12")) == 0
    argv = words(corpus, run, "trainer.max_steps=24", "trainer.shard=true", "--resume", "must")
    with by_hand(tmp_path, argv, argv) as ranks:
        assert [rank.ended() for rank in ranks] == [0, 0], ranks[0].told()
    assert "each holds 1/2 of the parameters" in ranks[0].told() and "resumed at step 12" in ranks[0].told()
    ours, theirs = trees(run, 24), trees(two, 24)
    assert {path: (x.shape, x.dtype) for path, x in ours.items()} == {p: (x.shape, x.dtype) for p, x in theirs.items()}
    assert {name for name in checkpoints(run) if "24/" in name} == {name for name in checkpoints(two) if "24/" in name}
    assert main(words(corpus, run, "--resume", "must")) == 0
    assert_alike(run, one)


def test_what_is_not_finite_ends_all_ranks(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where each rank holds a part of what goes into the dump."""
    run = tmp_path / "run"
    argv = words(corpus, run, *WILD, "trainer.save_every=1", "trainer.shard=true")
    with by_hand(tmp_path, argv, argv) as ranks:
        assert [rank.ended() for rank in ranks] == [5, 5], ranks[0].told()
    for number, rank in enumerate(ranks):
        assert f"rank {number}: error: step 1: loss nan" in rank.told() and "Traceback" not in rank.told()
        assert f"nest-fn replay {run} 1 looks into it" in rank.told()
    assert [path.name for path in (run / "failures").iterdir()] == ["step_00000001"]
    dump, last = trees(run, 1, "failures"), trees(run, 1)
    assert dump.keys() == last.keys() and all(torch.equal(dump[path], leaf) for path, leaf in last.items())
    assert main(["replay", str(run), "1"]) == 5
    assert capsys.readouterr().out.splitlines()[-1] == "not finite"

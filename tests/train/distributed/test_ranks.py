"""Several processes train as one does: the same sums to rounding (level R2), whole or cut into shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nest_fn.train.data.batch_plan import PlannedBatch
from nest_fn.train.distributed.collectives import ALONE
from nest_fn.train.distributed.launch import SINGLE
from nest_fn.train.distributed.sharding import REPLICATED
from nest_fn.train.errors import DistributedError
from tests.train.conftest import Corpus

KINDS = {
    "whole": "5 trainer.ema_decay=0.9",
    "sharded": "5 trainer.ema_decay=0.9 trainer.shard=true",
    "in parts": "5 trainer.accumulate=2",
    "sharded, compiled": "1 trainer.shard=true trainer.compile=on",
}


ROOT = Path(__file__).resolve().parents[3]


def program(*words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a program of Python to its end, by torchrun if there are several ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def found(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Steps in float64 by one and by two ranks, in each way: mixing, dropout, batch norm, clipping, averaging."""
    common = [
        f"data.train={corpus.train}", f"data.noise={corpus.noise}", "data.batch_seconds=8", "data.max_duration=8",
        "data.row_multiple=4", "data.num_workers=0", "data.augment.prob=1", "data.augment.noise_ratio=0.3",
        "encoder.n_layers=1", "encoder.subsampling_conv_channels=8", "masking.mask_prob=0.05", "trainer.clip_norm=1",
    ]  # fmt: skip
    words = " -- ".join([" ".join(common), *KINDS.values()]).split(" ")
    given = {}
    for ranks in (1, 2):
        out = tmp_path_factory.mktemp("ranks") / f"{ranks}.pt"
        ended = program("-m", "tests.train.distributed.rank_steps", str(out), *words, ranks=ranks)
        assert ended.returncode == 0, ended.stderr[-3000:]
        given[ranks] = dict(zip(KINDS, torch.load(out), strict=True))
    return given


def losses(run: dict[str, Any]) -> torch.Tensor:
    """Mean loss of each step, nats."""
    return torch.stack([line["loss_sum"] / line["masked_tokens"] for line in run["lines"]])


def furthest(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference between two runs' train states."""
    assert a["leaves"].keys() == b["leaves"].keys()
    return max(float((leaf.double() - b["leaves"][path].double()).abs().max()) for path, leaf in a["leaves"].items())


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_steps_of_one(found: dict[int, dict[str, Any]], kind: str) -> None:
    one, two = found[1][kind], found[2][kind]
    assert all(int(line["masked_tokens"]) > 10 for line in one["lines"])
    assert torch.equal(*(torch.stack([line["masked_tokens"] for line in run["lines"]]) for run in (one, two)))
    assert (losses(one) - losses(two)).abs().max() < 1e-10
    norms = [torch.stack([line["grad_norm"] for line in run["lines"]]) for run in (one, two)]
    assert (norms[0] - norms[1]).abs().max() < 1e-10
    assert furthest(one, two) < 1e-9  # Adam makes steps of rounding where a bias before a batch norm has no gradient


def test_batch_statistics_are_of_all_ranks(found: dict[int, dict[str, Any]]) -> None:
    means = [found[ranks]["whole"]["leaves"]["state.encoder.layers.0.conv.norm.running_var"] for ranks in (1, 2)]
    assert (means[0] - means[1]).abs().max() < 1e-12 and (means[0] - 1).abs().max() > 1e-3


def test_nothing_remembers_how_it_was_made(found: dict[int, dict[str, Any]]) -> None:
    assert not any(
        leaf.requires_grad for runs in found.values() for run in runs.values() for leaf in run["leaves"].values()
    )


def test_sharded_equals_whole(found: dict[int, dict[str, Any]]) -> None:
    whole, sharded = found[2]["whole"], found[2]["sharded"]
    assert furthest(whole, sharded) < 1e-9 and (losses(whole) - losses(sharded)).abs().max() < 1e-10
    assert sharded["cut"] > 10 and whole["cut"] == 0
    assert sharded["held"] < 0.6 * whole["held"]


def test_parts_are_cut_before_ranks() -> None:
    """Micro-batch k holds the same rows on any number of ranks, empty rows aside."""
    batch = PlannedBatch(8000, np.arange(10), np.arange(100, 110), np.zeros(10, np.int64))
    for world in (1, 2, 3):
        held = [batch.part(rank, world, 2) for rank in range(world)]
        assert len({len(part.index) for part in held}) == 1
        for k in range(2):
            rows = sorted(i for part in held for i in part.index[k::2].tolist() if i >= 0)
            assert rows == list(range(100 + k, 110, 2))


def test_alone_nothing_is_sent() -> None:
    x = torch.randn(3, 2)
    assert torch.equal(ALONE.all_gather(x), x[None]) and ALONE.all_reduce_sum({"x": x})["x"] is x
    assert ALONE.any(True) and not ALONE.any(False) and ALONE.broadcast_object("a") == "a"
    assert REPLICATED.shard({"x": x})["x"] is x and REPLICATED.all_gather({"x": x})["x"] is x
    assert REPLICATED.global_norm({"x": x}) == torch.linalg.vector_norm(x)
    SINGLE.agree({"anything": 1})


QUARREL = """
import os, time
from nest_fn.train.errors import DistributedError
from nest_fn.train.distributed.launch import init_ranks
try:
    with init_ranks(5.0, 60.0, lambda error: os._exit(9)) as job:
        if job.ranks.is_main:
            raise RuntimeError("gloo: what nobody expected")
        time.sleep(6)
except DistributedError as error:
    print(error, flush=True)
"""


def test_a_call_that_fails_although_all_live(tmp_path: Path) -> None:
    (tmp_path / "quarrel.py").write_text(QUARREL)
    ended = program(str(tmp_path / "quarrel.py"), ranks=2)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "a call to the other ranks failed, and all of them live: gloo: what nobody expected" in ended.stdout


def test_a_launcher_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from nest_fn.train.distributed.launch import init_ranks

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match=r"cannot join 2 ranks: .* start with torchrun"), init_ranks(1, 1, print):
        pass

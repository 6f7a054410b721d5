"""Fine-tuning under torchrun: two ranks make the run of one, up to rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn.checkpoint.folder import read_checkpoint
from nest_fn.layers.tree import flatten
from nest_fn.train.cli.main import main
from tests.train.distributed.rank_runs import by_torchrun

from .conftest import finetuning
from .test_finetune import measured

STEPS = 4
ROUNDOFF = 32 * torch.finfo(torch.float32).eps
"""Relative: sums over some thousand frames, in another order, through a few blocks and four updates."""


def parameters(run: Path) -> dict[str, torch.Tensor]:
    """Trained tensors and running statistics of the last checkpoint."""
    trees: dict[str, Any] = read_checkpoint(run / "checkpoints" / f"step_{STEPS:08d}").trees
    return flatten({name: trees[name] for name in ("params", "state", "head")})


def test_two_ranks_make_the_run_of_one(spoken: Path, tmp_path: Path) -> None:
    """Equal masks, dropout, batch statistics, gradients and error rates; plain SGD, for Adam makes steps of roundoff.

    A batch has an odd number of rows, so that one rank has an empty one.
    """
    settings = ["optim.name=sgd", "optim.betas=null", "optim.lr=1e-2", "data.batch_seconds=7", "--time-masks", "2",
                f"trainer.max_steps={STEPS}", f"trainer.save_every={STEPS}", f"trainer.valid_every={STEPS}",
                "trainer.log_every=1", "encoder.dropout=0.1", "trainer.device=cpu", "trainer.threads=1"]  # fmt: skip
    assert main(finetuning(spoken, tmp_path / "one", *settings)) == 0
    with by_torchrun(finetuning(spoken, tmp_path / "two", *settings), tmp_path / "logs") as launcher:
        assert launcher.ended() == 0, launcher.told()
    one, two = (measured(tmp_path / name, "loss") for name in ("one", "two"))
    assert len(one) == STEPS
    for line, same in zip(one, two, strict=True):
        assert {name: line[name] for name in ("step", "epoch", "utterances", "impossible", "lr")} == {
            name: same[name] for name in ("step", "epoch", "utterances", "impossible", "lr")
        }
        assert same["loss"] == pytest.approx(line["loss"], rel=ROUNDOFF)
        assert same["grad_norm"] == pytest.approx(line["grad_norm"], rel=10 * ROUNDOFF)
    ours, theirs = (parameters(tmp_path / name) for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        scale = float(leaf.abs().max()) if leaf.is_floating_point() else 0.0
        torch.testing.assert_close(theirs[path], leaf, rtol=0, atol=ROUNDOFF * max(scale, 1.0), msg=path)
    (last,), (same_last,) = (measured(tmp_path / name, "valid") for name in ("one", "two"))
    assert same_last["valid"]["cer"] == last["valid"]["cer"] and same_last["valid"]["wer"] == last["valid"]["wer"]
    assert json.loads((tmp_path / "two" / "origin.json").read_text())["done"]

"""What does not change during a fine-tuning run, and how batches get their targets."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nest_fn.config import Config
from nest_fn.frontend import frames
from nest_fn.layers.types import Key, Tensor
from nest_fn.mel import Tables
from nest_fn.parts import Parts
from nest_fn.train.ctc.model_files import Recogniser
from nest_fn.train.ctc.pieces import frames_needed
from nest_fn.train.ctc.step import FinetuneState, Recipe
from nest_fn.train.ctc.tokens import Tokenizer
from nest_fn.train.ctc.transcripts import Transcripts
from nest_fn.train.data.dataset import Dataset, RawBatch
from nest_fn.train.data.transfer import to_device
from nest_fn.train.distributed.collectives import Ranks
from nest_fn.train.distributed.launch import Job
from nest_fn.train.reporter import Reporter
from nest_fn.train.run.batch import micro_batches
from nest_fn.train.run.record.run_folder import RunFolder
from nest_fn.train.run.record.tensorboard import Board


@dataclass(frozen=True)
class FinetuneRun:
    """Settings, data, tokens, device, and the reporters."""

    cfg: Config
    recipe: Recipe
    tokenizer: Tokenizer
    folder: RunFolder
    board: Board
    train: Dataset
    valid: Dataset
    train_texts: Transcripts
    valid_texts: Transcripts
    device: torch.device
    key: Key
    tables: Tables
    parts: Parts
    reporter: Reporter  # of rank 0
    local_reporter: Reporter
    job: Job

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.job.ranks

    def record(self, line: Mapping[str, Any]) -> None:
        """Record a line of metrics: file, TensorBoard, reporter. A full disk does not end the run."""
        if not self.ranks.is_main:
            return
        try:
            self.folder.append(line)
            self.board.add(line)
        except OSError as error:
            name = os.fsdecode(error.filename or self.folder.metrics)
            self.reporter.warn(f"step {line['step']}: {name}: its line of metrics is lost: {error.strerror}.")
        self.reporter.progress(line["step"], self.cfg.trainer.max_steps, line)

    def recogniser(self, ts: FinetuneState) -> Recogniser:
        """The model at a moment of the run."""
        return Recogniser(ts.params, ts.state, ts.head, self.cfg, self.recipe.design, self.tokenizer)


def with_targets(
    raw: RawBatch, texts: Transcripts, cfg: Config, device: torch.device, parts: int = 1
) -> list[dict[str, Any]]:
    """This rank's rows of a batch as ``parts`` micro-batches for ``train.ctc.step``; rows without targets are empty."""
    targets = [texts.targets.get(name, []) for name in raw["ids"]]
    padded = torch.zeros(len(targets), max(1, *map(len, targets)), dtype=torch.int64)
    for row, target in enumerate(targets):
        padded[row, : len(target)] = torch.tensor(target, dtype=torch.int64)
    counts = {"target_len": list(map(len, targets)), "needed": list(map(frames_needed, targets))}
    made: dict[str, Tensor] = {"targets": padded} | {name: torch.tensor(value) for name, value in counts.items()}
    batch = to_device(raw, device) | {name: leaf.to(device) for name, leaf in made.items()}
    batch["frames"] = torch.as_tensor(frames(raw["audio_len"], cfg.preprocessor))  # on the host, as masks want it
    return micro_batches(batch, parts)

"""What does not change during a run: settings, data, device, root key, and the reporter."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import lcm
from typing import Any, NamedTuple

import torch

from nest_fn.config import Config
from nest_fn.encoder import subsampling_spec
from nest_fn.interop.convert import model_digest, read_any
from nest_fn.layers.subsampling import CONVOLUTIONAL
from nest_fn.layers.tree import count, flatten
from nest_fn.layers.types import Key, Params, State, Tensor
from nest_fn.mel import Tables, make_tables
from nest_fn.model import abstract
from nest_fn.train.data.clips import load_rirs
from nest_fn.train.data.dataset import Dataset, open_dataset
from nest_fn.train.distributed.collectives import Ranks
from nest_fn.train.distributed.launch import SINGLE, Job
from nest_fn.train.distributed.sharding import REPLICATED, Sharding, make_sharding
from nest_fn.train.errors import UsageError
from nest_fn.train.keys import root_key
from nest_fn.train.reporter import NullReporter, Reporter
from nest_fn.train.step.compiled import EAGER, StepParts, compile_parts
from nest_fn.train.step.recompute import recompute_blocks

from .device import is_compiled, prepare_device
from .inductor import inductor
from .record.background import BackgroundSave
from .record.loggers import Loggers, open_loggers
from .record.run_folder import RunFolder


class Initial(NamedTuple):
    """A model from which a run begins, on the CPU."""

    source: str
    params: Params
    state: State
    cfg: Config
    digest: str


@dataclass(frozen=True)
class Run:
    """What does not change: settings, data, device, root key, and the reporters."""

    cfg: Config
    folder: RunFolder
    loggers: Loggers
    reporter: Reporter
    train: Dataset
    valid: Dataset | None
    rirs: Tensor | None
    tables: Tables  # of the preprocessor, on the device
    device: torch.device
    key: Key
    local_reporter: Reporter  # reports on every rank; ``reporter`` on rank 0 alone
    job: Job = SINGLE
    sharding: Sharding = REPLICATED
    initial: Initial | None = None  # None: the run begins from its seed
    background: BackgroundSave = field(default_factory=BackgroundSave)  # of rank 0

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.job.ranks

    @property
    def digest(self) -> str:
        """SHA-256 of all the data that training depends on."""
        if self.rirs is None:
            return self.train.digest
        return hashlib.sha256(self.train.digest.encode() + self.rirs.cpu().numpy().tobytes()).hexdigest()

    def warn_local(self, problem: str) -> None:
        """Warn of something that only this rank has seen."""
        self.local_reporter.warn(problem if self.ranks.is_single else f"rank {self.ranks.rank}: {problem}")

    def record(self, line: Mapping[str, Any]) -> None:
        """Record a line of metrics: file, loggers, reporter. A full disk does not end the run."""
        if not self.ranks.is_main:
            return
        try:
            self.folder.append(line)
            self.loggers.add(line)
        except OSError as error:
            name = os.fsdecode(error.filename or self.folder.metrics)
            self.reporter.warn(f"step {line['step']}: {name}: its line of metrics is lost: {error.strerror}.")
        self.reporter.progress(line["step"], self.cfg.trainer.max_steps, line)


def step_parts(run: Run) -> StepParts:
    """The parts of the run's step, eager or compiled; compilations are reported."""
    parts = compile_parts(inductor(run.reporter.say)) if is_compiled(run.cfg, run.device) else EAGER
    return recompute_blocks(parts) if run.cfg.trainer.recompute else parts


def read_initial(source: str) -> Initial:
    """The model in any checkpoint, ours or the reference's, or a run folder. Raises ``CheckpointError``."""
    params, state, cfg = read_any(source)
    return Initial(source, params, state, cfg, model_digest(params, state, cfg))


def check_frames(cfg: Config) -> None:
    """Raise ``UsageError`` if the encoder does not make as many frames as the quantizer makes tokens."""
    if cfg.encoder.causal_downsampling and subsampling_spec(cfg.encoder).kind in CONVOLUTIONAL:
        raise UsageError(
            "encoder.causal_downsampling=true makes an encoder frame more than there are tokens, in the reference too, "
            "and the loss pairs them; set it to false (a causal encoder can be applied, not pre-trained)"
        )


def open_run(
    cfg: Config, folder: RunFolder, reporter: Reporter, job: Job = SINGLE, initial: Initial | None = None
) -> Run:
    """Read the data and choose the device. Raises ``DataError``, ``UsageError``."""
    device = prepare_device(cfg, job)
    check_frames(cfg)
    if cfg.trainer.deterministic:
        torch.use_deterministic_algorithms(True)
    speaker = reporter if job.ranks.is_main else NullReporter()
    loggers = open_loggers(cfg, folder, speaker)
    seed, rate = cfg.trainer.seed, cfg.sample_rate
    train = open_dataset(cfg.data, seed, split="train", sample_rate=rate)
    valid = open_dataset(cfg.data, seed, split="valid", sample_rate=rate) if cfg.data.valid else None
    rirs = load_rirs(cfg.data, rate)
    rirs = None if rirs is None else rirs.to(device)
    cut = make_sharding(flatten(abstract(cfg)[0]), job.ranks, device) if cfg.trainer.shard else Sharding(job.ranks)
    key = root_key(seed, device=device)
    tables = make_tables(cfg.preprocessor, device)
    return Run(cfg, folder, loggers, speaker, train, valid, rirs, tables, device, key, reporter, job, cut, initial)


def data_record(run: Run) -> dict[str, Any]:
    """Which files the run reads, and their digests."""
    record: dict[str, Any] = {"train": {"files": list(run.train.manifest.files), "digest": run.train.digest}}
    if run.valid is not None:
        record["valid"] = {"files": list(run.valid.manifest.files), "digest": run.valid.digest}
    if run.initial is not None:
        record["init"] = {"file": run.initial.source, "digest": run.initial.digest}
    return record


def announce(run: Run) -> None:
    """Report model, data, device and remarks before the first step."""
    say, cfg = run.reporter.say, run.cfg
    plan = run.train.plan(0)
    hours = float(run.train.manifest.duration.sum()) / 3600
    say(
        f"{count(abstract(run.cfg)[0]):,} parameters; {len(run.train.manifest):,} utterances, {hours:.2f} hours, "
        f"{len(plan)} batches an epoch of up to {cfg.data.batch_seconds:g} s, "
        f"padding efficiency {plan.efficiency(run.train.length):.3f}"
    )
    mode = "compiled, which takes minutes at first" if is_compiled(cfg, run.device) else "eager"
    say(f"{run.device.type}, {cfg.trainer.precision}, {mode}; run folder {run.folder.path}")
    if run.train.manifest.cropped:
        say(f"cropped: {run.train.manifest.cropped:,} utterances longer than max_duration={cfg.data.max_duration} s")
    for rule, dropped in run.train.manifest.dropped:
        say(f"left out: {dropped:,} utterances {rule}")
    for remark in cfg.advice:
        run.reporter.warn(remark)
    if not run.ranks.is_single:
        held = (
            f"each holds 1/{run.ranks.world} of the parameters" if run.sharding.sharded else "each holds all parameters"
        )
        say(f"{run.ranks.world} ranks; {held}")
    rows, parts = cfg.data.row_multiple, cfg.trainer.accumulate * run.ranks.world
    if rows % parts:
        run.reporter.warn(f"ranks and micro-batches get empty rows; data.row_multiple={lcm(rows, parts)} spares them")

"""The thin trainer: fetch, step, measure, save. All that it knows between two steps is in ``_Progress``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Key, Tensor

from . import measures
from .checkpoints import Saved, restore, save
from .data import RawBatch, batches
from .errors import CheckpointError, NonFiniteError
from .micro_batches import micro_batches, to_device
from .optimizer import global_norm
from .run import INIT, TRAIN, VALID, Reporter, Run, announce, compiled, data_record, open_run
from .run_folder import RunFolder
from .signals import StopRequest, stop_requests
from .step import TrainState, init_train_state, make_step, training_loss
from .validate import make_evaluate, validate


@dataclass
class _Progress:
    """What changes during a run."""

    ts: TrainState
    epoch: int = 0
    batch: int = 0  # the next one of the epoch
    window: measures.Sums = field(default_factory=dict)  # sums since the last line of metrics
    started: float = field(default_factory=time.monotonic)  # of the window
    sick: frozenset[str] = frozenset()  # what was warned of and has not gone since

    def saved(self) -> Saved:
        return Saved(self.ts, self.epoch, self.batch, self.window)


def pretrain(
    cfg: Config, folder: RunFolder, reporter: Reporter, *, resume: str = "auto", command: list[str] | None = None,
    allow_changes: bool = False,
) -> int:  # fmt: skip
    """Train until ``trainer.max_steps`` or a request to stop; the exit code.

    ``resume``: ``auto`` goes on from the newest good checkpoint if there is one, ``must`` wants one, ``never`` wants
    none. Raises the errors of ``train.errors``.
    """
    folder.open()
    try:
        with stop_requests() as stop:
            run = open_run(cfg, folder, reporter)
            progress = _begin(run, resume, allow_changes)
            folder.describe(cfg, command or [], data_record(run))
            announce(run, progress.ts.params)
            with closing(run.board):
                return _train(run, progress, stop)
    finally:
        folder.close()


def _begin(run: Run, resume: str, allow_changes: bool) -> _Progress:
    saved = restore(run.cfg, run.folder, run.digest, run.reporter.warn, run.device, resume, allow_changes)
    if saved is None:
        run.folder.cut_metrics(-1)  # of a run that ended before its first checkpoint
        return _Progress(init_train_state(random.fold_in(run.key, INIT), run.cfg))
    run.folder.cut_metrics(saved.ts.step)
    if saved.batch > len(run.train.plan(saved.epoch)):  # only if the data changed
        saved = saved._replace(epoch=saved.epoch + 1, batch=0)
    run.reporter.say(f"resumed at step {saved.ts.step}, epoch {saved.epoch}, batch {saved.batch}")
    return _Progress(saved.ts, saved.epoch, saved.batch, saved.window)


def _train(run: Run, progress: _Progress, stop: StopRequest) -> int:
    trainer = run.cfg.trainer
    loss = training_loss(run.cfg, run.rirs)
    step = make_step(run.cfg, compile=compiled(run.cfg, run.device), donate=True, loss=loss)
    evaluate = make_evaluate(run.cfg, run.rirs)
    stream = batches(run.train, epoch=progress.epoch, batch=progress.batch)
    key = random.fold_in(run.key, TRAIN)
    if progress.ts.step and not run.folder.has_validation(progress.ts.step):
        _validate(run, progress, evaluate, stop)  # what the interrupted run still owed
    while progress.ts.step < trainer.max_steps and not stop.asked:
        values = _step(run, progress, step, next(stream), key)
        done = progress.ts.step
        if _due(done, trainer.log_every, trainer.max_steps):
            _log(run, progress, values)
        if _due(done, trainer.save_every, trainer.max_steps):
            save(run.cfg, run.folder, progress.saved(), run.digest, run.reporter.warn)
        _validate(run, progress, evaluate, stop)
    if stop.asked and progress.ts.step < trainer.max_steps:
        if not save(run.cfg, run.folder, progress.saved(), run.digest, run.reporter.warn):
            raise CheckpointError(
                f"asked to stop, and step {progress.ts.step} could not be saved; make room and resume."
            )
        run.reporter.say(f"asked to stop: saved at step {progress.ts.step}; the same command goes on from there")
        return stop.exit_code
    return 0


def _due(done: int, every: int, last: int) -> bool:
    """Every so many steps (0: never) and at the last one."""
    return done == last or (every > 0 and done % every == 0)


def _step(run: Run, progress: _Progress, step: Any, raw: RawBatch, key: Key) -> dict[str, Tensor]:
    parts = micro_batches(to_device(raw, run.device), run.cfg.trainer.accumulate)
    try:
        progress.ts, values = step(progress.ts, parts, random.fold_in(key, progress.ts.step))
    except NonFiniteError as error:
        ids = [name for name in raw["ids"] if name]
        raise NonFiniteError(f"{error}\n  utterances: {', '.join(ids[:20])}{' ...' if len(ids) > 20 else ''}") from None
    progress.epoch, progress.batch = raw["epoch"], raw["batch"] + 1
    audio = {"audio_samples": raw["audio_len"].sum(), "padded_samples": torch.tensor(raw["audio"].numel())}
    progress.window = measures.add(progress.window, values | audio)
    for problem in raw["bad"]:
        run.reporter.warn(problem)
    return values


def _log(run: Run, progress: _Progress, values: Mapping[str, Tensor]) -> None:
    """One line of metrics over the window, whose numbers do not depend on when the run was interrupted."""
    now = time.monotonic()
    window = progress.window
    line: dict[str, Any] = {"step": progress.ts.step, "epoch": progress.epoch} | measures.report(window)
    line |= {
        "lr": float(values["lr"]),
        "grad_norm": float(values["grad_norm"]),
        "param_norm": float(global_norm(flatten(progress.ts.params))),
        "padding_efficiency": float(window["audio_samples"] / window["padded_samples"]),
    }
    audio_seconds = float(window["audio_samples"]) / run.cfg.sample_rate
    elapsed = max(now - progress.started, 1e-9)
    line["time"] = {"seconds": round(elapsed, 3), "audio_seconds_per_second": round(audio_seconds / elapsed, 2)}
    run.record(line)
    _warn(run, progress, line)
    progress.window, progress.started = {}, now


def _warn(run: Run, progress: _Progress, line: Mapping[str, Any]) -> None:
    """Each kind of warning once, until what it warns of has gone."""
    sched = run.cfg.optim.sched
    found = measures.warnings(line, run.cfg.num_classes, progress.ts.step, sched.warmup if sched is not None else 0)
    for kind in found.keys() - progress.sick:
        run.reporter.warn(f"step {progress.ts.step}: {found[kind]}")
    progress.sick = frozenset(found)


def _validate(run: Run, progress: _Progress, evaluate: Any, stop: StopRequest) -> None:
    """A pass over the validation data where one is due; given up, without a trace, when asked to stop."""
    trainer, done = run.cfg.trainer, progress.ts.step
    if run.valid is None or stop.asked or not _due(done, trainer.valid_every, trainer.max_steps):
        return
    valid = run.valid
    started = time.monotonic()
    ts = progress.ts

    def until_stopped() -> Iterator[dict[str, Tensor]]:
        for raw in batches(valid, epochs=1):
            if stop.asked:
                return
            yield to_device(raw, run.device)

    params = ts.ema or ts.params
    found = validate(evaluate, params, ts.state, until_stopped(), random.fold_in(run.key, VALID))
    if stop.asked:
        return
    took = round(time.monotonic() - started, 3)
    line = {"step": ts.step, "valid": found, "time": {"seconds": took}}
    run.record(line)
    progress.started += time.monotonic() - started  # validation is not the steps' time

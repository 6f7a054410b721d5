"""The thin trainer: fetch, step, measure, validate, save. All that it knows between two steps is in ``Progress``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import torch

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Key, Tensor
from nest_fn.train.augment.speaker_exchange import gather_speaker_pool
from nest_fn.train.data.dataset import Dataset, RawBatch, batches
from nest_fn.train.distributed.launch import SINGLE, Job, code_digest
from nest_fn.train.step import metrics as measures
from nest_fn.train.step.evaluate import make_evaluate, validate
from nest_fn.train.step.micro_batches import micro_batches, send, to_device
from nest_fn.train.step.step import RefusedUpdate, make_step, training_loss

from .context import TRAIN, VALID, Reporter, Run, announce, data_record, open_run, step_parts
from .endings import collapsed, fetched, saved_at_the_end, stopped, unsaved
from .failure_dump import explain_oom, failure, shorten, utterances
from .progress import Progress, due, save_due, save_progress
from .record.checkpoints import check_keeping, recorded, restore
from .record.log_file import logged
from .record.run_folder import RunFolder
from .signals import Stopped, StopRequest, stop_requests
from .state_sharding import broadcast_state, unshard_params, unshard_state


def pretrain(
    cfg: Config, folder: RunFolder, reporter: Reporter, *, resume: str = "auto", command: list[str] | None = None,
    allow_changes: bool = False, job: Job = SINGLE,
) -> int:  # fmt: skip
    """Train until ``trainer.max_steps`` or a request to stop; the exit code.

    ``resume``: ``auto`` goes on from the newest good checkpoint if there is one, ``must`` wants one, ``never`` wants
    none. Every rank of ``job`` calls this; rank 0 alone writes and speaks. Raises the errors of ``train.errors``.
    """
    check_keeping(cfg)
    first, began = job.ranks.is_main, False
    if first:
        folder.open()
    try:
        with logged(reporter, folder.log(job.ranks.rank), job.diagnose) as told, stop_requests() as stop:
            if first:
                told.log.write(f"command: {' '.join(command or [])}")
            run = _open(cfg, folder, told, job, stop)
            if run is None:
                return stop.exit_code
            progress = _begin(run, resume, allow_changes)
            if first:
                folder.describe(cfg, command or [], data_record(run))
            began = True
            told.log.begin()
            announce(run)
            with closing(run.board), saved_at_the_end(run, progress):
                return _train(run, progress, stop)
    finally:
        if first:
            folder.close(began)


def _open(cfg: Config, folder: RunFolder, reporter: Reporter, job: Job, stop: StopRequest) -> Run | None:
    """The run, the same on all ranks; None if a stop was asked for meanwhile."""
    run = None
    try:
        with stop.at_once():
            run = open_run(cfg, folder, reporter, job)
    except Stopped:
        if job.ranks.is_main:
            reporter.say("asked to stop while data was opened, nothing to save; the same command starts again")
    if job.ranks.any(run is None) or run is None:
        return None
    job.agree({**flatten(recorded(cfg)), "data": run.digest, "code": code_digest(), "torch": torch.__version__})
    return run


def _begin(run: Run, resume: str, allow_changes: bool) -> Progress:
    saved = None
    if run.ranks.is_main:
        saved = restore(run.cfg, run.folder, run.digest, run.reporter.warn, run.device, resume, allow_changes)
        run.folder.cut_metrics(-1 if saved is None else saved.ts.step)  # -1: of a run that ended before its first save
    saved = broadcast_state(saved, run)
    if saved.ts.step == 0:
        return Progress(saved.ts)
    if saved.batch > len(run.train.plan(saved.epoch)):  # only if the data changed
        saved = saved._replace(epoch=saved.epoch + 1, batch=0)
    run.reporter.say(f"resumed at step {saved.ts.step}, epoch {saved.epoch}, batch {saved.batch}")
    if saved.ts.step >= run.cfg.trainer.max_steps:
        run.reporter.say(f"trainer.max_steps is {run.cfg.trainer.max_steps}, so that nothing is left to do")
    return Progress(saved.ts, saved.epoch, saved.batch, saved.window, skipped=saved.skipped)


def _train(run: Run, progress: Progress, stop: StopRequest) -> int:
    trainer = run.cfg.trainer
    loss = training_loss(run.cfg, run.rirs, run.sharding, parts=step_parts(run), tables=run.tables)
    step = make_step(run.cfg, donate=True, loss=loss, sharding=run.sharding)
    evaluate = make_evaluate(run.cfg, run.rirs)
    stream = _batches(run, run.train, stop, epoch=progress.epoch, batch=progress.batch)
    key = random.fold_in(run.key, TRAIN)
    _finish_interrupted_step(run, progress, evaluate, stop)
    while progress.ts.step < trainer.max_steps:
        raw = fetched(run, stream, stop, progress)
        if raw is None:
            return stopped(run, progress, stop)
        values = _step(run, progress, step, raw, key)
        if due(progress.ts.step, trainer.log_every, trainer.max_steps):
            _log(run, progress, values)
        _validate(run, progress, evaluate, stop)
        if save_due(run, progress) and not save_progress(run, progress) and progress.ts.step == trainer.max_steps:
            raise unsaved(progress, "the last one")
        if trainer.stop_on_collapse and "collapse" in progress.active_warnings:
            raise collapsed(run, progress)
    return 0


def _batches(run: Run, dataset: Dataset, stop: StopRequest, **place: int) -> Iterator[RawBatch]:
    """This rank's rows of each batch; the end of them if a stop is asked for while one is awaited."""
    ranks, parts = run.ranks, run.cfg.trainer.accumulate
    return batches(
        dataset, rank=ranks.rank, world=ranks.world, parts=parts, stopped=lambda: stop.asked,
        send=lambda raw: send(raw, run.device), **place,
    )  # fmt: skip


def _finish_interrupted_step(run: Run, progress: Progress, evaluate: Any, stop: StopRequest) -> None:
    """Run the validation or the save that was due when the run stopped."""
    if progress.ts.step == 0:
        return
    found = run.ranks.broadcast_object(run.folder.validation(progress.ts.step) if run.ranks.is_main else None)
    if found is None:
        _validate(run, progress, evaluate, stop)
    else:
        progress.valid_loss = found.get("loss")
    if save_due(run, progress):
        save_progress(run, progress)


def _step(run: Run, progress: Progress, step: Any, raw: RawBatch, key: Key) -> Mapping[str, Tensor]:
    """One update, made or left out; its metrics."""
    audio = {"audio_samples": raw["audio_len"].sum(), "padded_samples": torch.tensor(raw["audio"].numel())}
    audio = run.ranks.all_reduce_sum(audio)
    step_key = random.fold_in(key, progress.ts.step)
    try:
        with explain_oom(raw, run.cfg, run.device):
            batch = to_device(raw, run.device)
            pool = gather_speaker_pool(raw, batch["audio"], run.cfg.data.augment, step_key, run.ranks)
            parts = micro_batches(batch, run.cfg.trainer.accumulate, pool)
            ts, values = step(progress.ts, parts, step_key)
        progress.past(raw, ts, 0)  # before anything else can fail
        progress.window = measures.add(progress.window, values | audio)
    except RefusedUpdate as refused:
        values = refused.metrics
        _skip_update(run, progress, raw, step_key, refused)
        progress.window = measures.skip(progress.window, values | audio)
    for problem in raw["bad"]:
        run.warn_local(problem)
    return values


def _skip_update(run: Run, progress: Progress, raw: RawBatch, key: Key, refused: RefusedUpdate) -> None:
    """Go past an update that was not made, and tell of it; what is not finite ends the run if it comes too often.

    Spikes (``trainer.skip_norm``) have no limit; the first one of a window is told.
    """
    if not refused.finite and progress.skipped >= run.cfg.trainer.skip_nonfinite:
        at = progress.saved()._replace(
            ts=unshard_state(progress.ts, run.sharding), epoch=raw["epoch"], batch=raw["batch"]
        )
        raise failure(run, at, raw, key, refused) from None
    if not refused.finite or not progress.window.get("skipped"):
        run.reporter.warn(f"{refused} Left out.\n  utterances: {shorten(utterances(run, raw))}")
    skipped = progress.skipped + (not refused.finite)
    progress.past(raw, progress.ts._replace(step=progress.ts.step + 1), skipped)


def _log(run: Run, progress: Progress, values: Mapping[str, Tensor]) -> None:
    """One line of metrics over the window, whose numbers do not depend on when the run was interrupted."""
    now = time.monotonic()
    window = progress.window
    line: dict[str, Any] = {"step": progress.ts.step, "epoch": progress.epoch} | measures.summarise(window)
    line |= {
        "skipped": int(window["skipped"]),
        "lr": float(values["lr"]),
        "grad_norm": float(window.get("grad_norm", 0.0)),  # of the last update that was made
        "param_norm": float(run.sharding.global_norm(flatten(progress.ts.params))),
        "padding_efficiency": float(window["audio_samples"] / window["padded_samples"].clamp(min=1)),
    }
    audio_seconds = float(window["audio_samples"]) / run.cfg.sample_rate
    elapsed = max(now - progress.started, 1e-9)
    line["time"] = {"seconds": round(elapsed, 3), "audio_seconds_per_second": round(audio_seconds / elapsed, 2)}
    run.record(line)
    _warn(run, progress, line)
    progress.window, progress.started = {}, now


def _warn(run: Run, progress: Progress, line: Mapping[str, Any]) -> None:
    """Each kind of warning once, until what it warns of has gone."""
    sched = run.cfg.optim.sched
    found = measures.warnings(line, run.cfg.num_classes, progress.ts.step, sched.warmup if sched is not None else 0)
    for kind in found.keys() - progress.active_warnings:
        run.reporter.warn(f"step {progress.ts.step}: {found[kind]}")
    progress.active_warnings = frozenset(found)


def _validate(run: Run, progress: Progress, evaluate: Any, stop: StopRequest) -> None:
    """A pass over the validation data where one is due; given up, without a trace, when asked to stop."""
    trainer, done = run.cfg.trainer, progress.ts.step
    if run.valid is None or not due(done, trainer.valid_every, trainer.max_steps):
        return
    valid, given_up = run.valid, False
    started = time.monotonic()
    ts, key = progress.ts, random.fold_in(run.key, VALID)

    def until_stopped() -> Iterator[dict[str, Any]]:
        nonlocal given_up
        stream = _batches(run, valid, stop, epochs=1)
        for _ in range(len(valid.plan(0))):
            raw = fetched(run, stream, stop, progress)
            if raw is None:
                given_up = True
                return
            batch = to_device(raw, run.device)
            pool = gather_speaker_pool(raw, batch["audio"], run.cfg.data.augment, key, run.ranks)
            yield batch if pool is None else batch | {"pool": pool}

    params = unshard_params(ts.ema or ts.params, run.sharding)
    found = validate(evaluate, params, ts.state, until_stopped(), key, run.ranks)
    if given_up:
        return
    took = round(time.monotonic() - started, 3)
    line = {"step": ts.step, "valid": found, "time": {"seconds": took}}
    run.record(line)
    progress.valid_loss = found.get("loss")
    progress.started += time.monotonic() - started  # validation is not the steps' time

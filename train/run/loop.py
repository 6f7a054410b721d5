"""The thin trainer: fetch, step, measure, validate, save. ``Progress`` goes in and comes out of each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Key, Tensor
from nest_fn.train.data.dataset import Dataset, RawBatch, batches
from nest_fn.train.data.transfer import send
from nest_fn.train.keys import step_key, validation_key
from nest_fn.train.signals import StopRequest
from nest_fn.train.step import metrics
from nest_fn.train.step.evaluate import make_evaluate, validate
from nest_fn.train.step.step import RefusedUpdate, make_step, training_loss

from .batch import prepare_batch
from .context import Run, step_parts
from .endings import collapsed, fetch, save_before_end, stopped, unsaved
from .failure_dump import explain_oom, failure, shorten, utterances
from .record.progress import Progress
from .saving import begin_save, due, record_digests, report_save, save_due, save_progress, unsharded
from .state_sharding import unshard_params

Metrics = Mapping[str, Tensor]
Count = Callable[[Metrics, Metrics], metrics.Sums]


def train(run: Run, progress: Progress, stop: StopRequest) -> int:
    """Train from ``progress`` to ``trainer.max_steps`` or to a request to stop; the exit code.

    Where an error ends the run, the last finished step is saved first, if that is possible (``endings.py``).
    """
    trainer = run.cfg.trainer
    loss = training_loss(run.cfg, run.rirs, run.sharding, parts=step_parts(run), tables=run.tables)
    step = make_step(run.cfg, donate=True, loss=loss, sharding=run.sharding)
    evaluate = make_evaluate(run.cfg, run.rirs)
    stream = _batches(run, run.train, stop, epoch=progress.epoch, batch=progress.batch)
    progress = progress._replace(started=time.monotonic())
    try:
        progress = _finish_interrupted_step(run, progress, evaluate, stop)
        while progress.ts.step < trainer.max_steps:
            raw = fetch(run.ranks, stream, stop)
            if raw is None:
                return stopped(run, progress, stop)
            audio = audio_counts(run, raw)  # of all ranks, so before the update: nothing behind it may fail
            progress, values, count = _update(run, progress, step, raw)
            progress = progress._replace(window=count(progress.window, {**values, **audio}))
            for problem in raw["bad"]:
                run.warn_local(problem)
            if due(progress.ts.step, trainer.log_every, trainer.max_steps):
                progress = _log(run, progress, values)
            record_digests(run, progress, raw, values)
            progress = _validate(run, progress, evaluate, stop)
            report_save(run)
            _save(run, progress)
            if trainer.stop_on_collapse and "collapse" in progress.active_warnings:
                raise collapsed(run, progress)
    except BaseException as error:
        save_before_end(run, progress, error)
        raise
    return 0


def _batches(run: Run, dataset: Dataset, stop: StopRequest, **place: int) -> Iterator[RawBatch]:
    """This rank's rows of each batch; ends early if a stop is requested while a batch is awaited."""
    ranks, parts = run.ranks, run.cfg.trainer.accumulate
    return batches(
        dataset, rank=ranks.rank, world=ranks.world, parts=parts, stopped=lambda: stop.asked,
        send=lambda raw: send(raw, run.device), **place,
    )  # fmt: skip


def _finish_interrupted_step(run: Run, progress: Progress, evaluate: Any, stop: StopRequest) -> Progress:
    """Run the validation or the save that was due when the run stopped; a run from another model is validated first."""
    if progress.ts.step == 0 and not progress.init:
        return progress
    found = run.ranks.broadcast_object(run.folder.validation(progress.ts.step) if run.ranks.is_main else None)
    if found is None:
        progress = _validate(run, progress, evaluate, stop)
    else:
        progress = progress._replace(valid_loss=found.get("loss"))
    if save_due(run, progress):
        save_progress(run, progress)
    return progress


def _save(run: Run, progress: Progress) -> None:
    """The checkpoint that is due after this step, if one is; the last one must be written, which is waited for."""
    if not save_due(run, progress):
        return
    if progress.ts.step < run.cfg.trainer.max_steps:
        begin_save(run, progress)
    elif not save_progress(run, progress):
        raise unsaved(progress, "the last one")


def audio_counts(run: Run, raw: RawBatch) -> Metrics:
    """Samples of the batch, without and with padding, over all ranks."""
    return run.ranks.all_reduce_sum(
        {"audio_samples": raw["audio_len"].sum(), "padded_samples": torch.tensor(raw["audio"].numel())}
    )


def _update(run: Run, progress: Progress, step: Any, raw: RawBatch) -> tuple[Progress, Metrics, Count]:
    """One update, made or skipped; its metrics, and how they count in the window."""
    key = step_key(run.key, progress.ts.step)
    try:
        with explain_oom(raw, run.cfg, run.device):
            parts = prepare_batch(raw, run.cfg, key, run.device, run.ranks, run.cfg.trainer.accumulate)
            ts, values = step(progress.ts, parts, key)
        return progress.past(raw["epoch"], raw["batch"], ts), values, metrics.add
    except RefusedUpdate as refused:
        return _skip_update(run, progress, raw, key, refused), refused.metrics, metrics.skip


def _skip_update(run: Run, progress: Progress, raw: RawBatch, key: Key, refused: RefusedUpdate) -> Progress:
    """Go past an update that was refused, and report it. Raises ``NonFiniteError`` if too many in a row are not finite.

    Spikes (``trainer.skip_norm``) have no limit; the first one of a window is reported.
    """
    if not refused.finite and progress.skipped >= run.cfg.trainer.skip_nonfinite:
        before = unsharded(run, progress)._replace(epoch=raw["epoch"], batch=raw["batch"])
        raise failure(run, before, raw, key, refused) from None
    if not refused.finite or not progress.window.get("skipped"):
        run.reporter.warn(f"{refused} Left out.\n  utterances: {shorten(utterances(run, raw))}")
    ts = progress.ts._replace(step=progress.ts.step + 1)
    return progress.past(raw["epoch"], raw["batch"], ts, progress.skipped + (not refused.finite))


def _log(run: Run, progress: Progress, values: Metrics) -> Progress:
    """Record a line of metrics over the window, whose numbers do not depend on when the run was interrupted."""
    now = time.monotonic()
    line = window_line(run, progress, values)
    audio_seconds = float(progress.window["audio_samples"]) / run.cfg.sample_rate
    elapsed = max(now - progress.started, 1e-9)
    line["time"] = {"seconds": round(elapsed, 3), "audio_seconds_per_second": round(audio_seconds / elapsed, 2)}
    run.record(line)
    return progress._replace(window={}, started=now, active_warnings=_warn(run, progress, line))


def window_line(run: Run, progress: Progress, values: Metrics) -> dict[str, Any]:
    """A line of metrics over the window, without its times; ``values`` are the last update's."""
    window = progress.window
    line: dict[str, Any] = {"step": progress.ts.step, "epoch": progress.epoch} | metrics.summarise(window)
    return line | {
        "skipped": int(window["skipped"]),
        "lr": float(values["lr"]),
        "grad_norm": float(window.get("grad_norm", 0.0)),  # of the last update that was made
        "param_norm": float(run.sharding.global_norm(flatten(progress.ts.params))),
        "padding_efficiency": float(window["audio_samples"] / window["padded_samples"].clamp(min=1)),
    }


def _warn(run: Run, progress: Progress, line: Mapping[str, Any]) -> frozenset[str]:
    """Report each kind of warning once, until its cause is gone; the kinds that hold now."""
    sched = run.cfg.optim.sched
    found = metrics.warnings(line, run.cfg.num_classes, progress.ts.step, sched.warmup if sched is not None else 0)
    for kind in found.keys() - progress.active_warnings:
        run.reporter.warn(f"step {progress.ts.step}: {found[kind]}")
    return frozenset(found)


def _validate(run: Run, progress: Progress, evaluate: Any, stop: StopRequest) -> Progress:
    """A pass over the validation data where one is due; given up without a trace if a stop is requested."""
    ts, trainer = progress.ts, run.cfg.trainer
    if run.valid is None or not (due(ts.step, trainer.valid_every, trainer.max_steps) or ts.step == 0):
        return progress
    started, key, seen = time.monotonic(), validation_key(run.key), 0
    valid = run.valid

    def until_stopped() -> Iterator[dict[str, Any]]:
        nonlocal seen
        stream = _batches(run, valid, stop, epochs=1)
        while seen < len(valid.plan(0)) and (raw := fetch(run.ranks, stream, stop)) is not None:
            yield prepare_batch(raw, run.cfg, key, run.device, run.ranks)[0]
            seen += 1

    params = unshard_params(ts.ema or ts.params, run.sharding)
    found = validate(evaluate, params, ts.state, until_stopped(), key, run.ranks)
    if seen < len(valid.plan(0)):
        return progress
    seconds = time.monotonic() - started
    run.record({"step": ts.step, "valid": found, "time": {"seconds": round(seconds, 3)}})
    # Validation is not the steps' time.
    return progress._replace(valid_loss=found.get("loss"), started=progress.started + time.monotonic() - started)

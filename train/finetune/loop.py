"""The loop of fine-tuning: fetch, step, measure, validate, save; ``Progress`` goes in and comes out of each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from nest_fn.layers.types import Tensor
from nest_fn.train.ctc.model_files import MODEL, save_recogniser
from nest_fn.train.ctc.step import make_finetune_step
from nest_fn.train.data.dataset import Dataset, RawBatch, batches
from nest_fn.train.data.transfer import send
from nest_fn.train.errors import CheckpointError, MemoryExhausted, NonFiniteError, is_out_of_memory
from nest_fn.train.keys import step_key
from nest_fn.train.run.endings import fetch
from nest_fn.train.run.record.checkpoints import recorded
from nest_fn.train.run.saving import due
from nest_fn.train.signals import StopRequest

from .context import FinetuneRun, with_targets
from .progress import Progress, add, save
from .validation import validate


def train(run: FinetuneRun, progress: Progress, stop: StopRequest) -> Progress:
    """Train from ``progress`` to ``trainer.max_steps`` or to a request to stop, which is then saved.

    Where an error ends the run, the last finished step is saved first, if that is possible.
    """
    trainer = run.cfg.trainer
    step = make_finetune_step(run.cfg, run.recipe, ranks=run.ranks, tables=run.tables, parts=run.parts)
    stream = _batches(run, run.train, stop, epoch=progress.epoch, batch=progress.batch)
    progress = progress._replace(started=time.monotonic())
    try:
        progress = _finish_interrupted_step(run, progress, stop)
        while progress.ts.step < trainer.max_steps and not run.ranks.any(stop.asked):
            raw = fetch(run.ranks, stream, stop)
            if raw is None:
                break
            progress, values = _update(run, progress, step, raw)
            for problem in raw["bad"]:
                run.local_reporter.warn(problem)
            if due(progress.ts.step, trainer.log_every, trainer.max_steps):
                progress = _log(run, progress, values)
            progress = _validate(run, progress, stop)
            if due(progress.ts.step, trainer.save_every, trainer.max_steps):
                _save(run, progress)
        if not is_finished(run, progress):
            _save(run, progress)
            run.reporter.say(f"asked to stop: saved at step {progress.ts.step}; the same command goes on from there")
    except BaseException as error:
        _save_before_end(run, progress, error)
        raise
    return progress


def is_finished(run: FinetuneRun, progress: Progress) -> bool:
    """Whether the last step is made and validated; the same on all ranks."""
    return progress.ts.step >= run.cfg.trainer.max_steps and _is_validated(run, progress.ts.step)


def _is_validated(run: FinetuneRun, step: int) -> bool:
    return run.ranks.broadcast_object(run.ranks.is_main and run.folder.validation(step) is not None)


def _finish_interrupted_step(run: FinetuneRun, progress: Progress, stop: StopRequest) -> Progress:
    """Run the validation that was due when the run stopped, and save again what it changed."""
    step, trainer = progress.ts.step, run.cfg.trainer
    if step == 0 or not due(step, trainer.valid_every, trainer.max_steps) or _is_validated(run, step):
        return progress
    progress = _validate(run, progress, stop)
    if due(step, trainer.save_every, trainer.max_steps):
        _save(run, progress)
    return progress


def _batches(run: FinetuneRun, dataset: Dataset, stop: StopRequest, **place: int) -> Iterator[RawBatch]:
    """This rank's rows of each batch; ends early if a stop is requested while a batch is awaited."""
    parts = run.cfg.trainer.accumulate if dataset is run.train else 1
    return batches(
        dataset, rank=run.ranks.rank, world=run.ranks.world, parts=parts, stopped=lambda: stop.asked,
        send=lambda raw: send(raw, run.device), **place,
    )  # fmt: skip


def _update(run: FinetuneRun, progress: Progress, step: Any, raw: RawBatch) -> tuple[Progress, Mapping[str, Tensor]]:
    """One update, and its metrics."""
    key = step_key(run.key, progress.ts.step)
    try:
        parts = with_targets(raw, run.train_texts, run.cfg, run.device, run.cfg.trainer.accumulate)
        ts, values = step(progress.ts, parts, key)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rows, width = raw["audio"].shape
        raise MemoryExhausted(
            f"step {progress.ts.step}: out of memory in a batch of {rows} x {width / run.cfg.sample_rate:.2f} s; lower "
            "data.batch_seconds, or raise trainer.accumulate."
        ) from None
    seconds = run.ranks.all_reduce_sum({"audio_samples": raw["audio_len"].sum()})
    window = add(progress.window, {**values, **seconds})
    return progress._replace(ts=ts, epoch=raw["epoch"], batch=raw["batch"] + 1, window=window), values


def _log(run: FinetuneRun, progress: Progress, values: Mapping[str, Tensor]) -> Progress:
    """Record a line of metrics over the window, whose numbers do not depend on when the run was interrupted."""
    now, window = time.monotonic(), progress.window
    line: dict[str, Any] = {
        "step": progress.ts.step,
        "epoch": progress.epoch,
        "utterances": int(window["utterances"]),
        "impossible": int(window["impossible"]),
        "lr": float(values["lr"]),
        "grad_norm": float(values["grad_norm"]),
    }
    if line["utterances"]:
        line["loss"] = float(window["loss_sum"]) / line["utterances"]
    elapsed = max(now - progress.started, 1e-9)
    seconds = float(window["audio_samples"]) / run.cfg.sample_rate
    line["time"] = {"seconds": round(elapsed, 3), "audio_seconds_per_second": round(seconds / elapsed, 2)}
    run.record(line)
    return progress._replace(window={}, started=now)


def _validate(run: FinetuneRun, progress: Progress, stop: StopRequest) -> Progress:
    """Validate where it is due, and keep the model if it is the best; given up if a stop is requested."""
    ts, trainer = progress.ts, run.cfg.trainer
    if not due(ts.step, trainer.valid_every, trainer.max_steps):
        return progress
    started, seen = time.monotonic(), 0

    def until_stopped() -> Iterator[RawBatch]:
        nonlocal seen
        stream = _batches(run, run.valid, stop, epochs=1)
        while seen < len(run.valid.plan(0)) and (raw := fetch(run.ranks, stream, stop)) is not None:
            yield raw
            seen += 1

    found = validate(run, ts, until_stopped())
    if seen < len(run.valid.plan(0)):
        return progress
    best = {"step": ts.step, **found}
    if progress.best is None or _rank(found) < _rank(progress.best):
        if run.ranks.is_main:
            meta = {"step": ts.step, "valid": found}
            save_recogniser(run.folder.path / MODEL, run.recogniser(ts), recorded(run.cfg), meta)
        progress = progress._replace(best=best)
    seconds = time.monotonic() - started
    run.record({"step": ts.step, "valid": found, "time": {"seconds": round(seconds, 3)}})
    return progress._replace(started=progress.started + time.monotonic() - started)  # not the steps' time


def _rank(found: Mapping[str, Any]) -> tuple[float, float]:
    """By what the best validation is chosen: the lowest character error rate, then the lowest loss."""
    return found["cer"], found.get("loss", math.inf)


def _save(run: FinetuneRun, progress: Progress) -> None:
    """Write a checkpoint, on rank 0; one that is not due is passing: the next one replaces it.

    Raises ``CheckpointError`` on all ranks if the last one, or one that is asked for by a stop, cannot be written.
    """
    step, trainer, written = progress.ts.step, run.cfg.trainer, True
    passing = not due(step, trainer.save_every, trainer.max_steps)
    if run.ranks.is_main:
        folder, made = run.folder.checkpoints, run.recogniser(progress.ts)
        written = save(run.cfg, folder, progress, made, passing, run.reporter.warn)
    if run.ranks.any(not written) and (passing or step == trainer.max_steps):
        raise CheckpointError(f"step {step} could not be saved, as told above; when it can be, give the "
                              "same command again: it goes on from the newest checkpoint.")  # fmt: skip


def _save_before_end(run: FinetuneRun, progress: Progress, error: BaseException) -> None:
    """Save the last finished step because ``error`` ends the run, or report why it is not saved."""
    if progress.ts.step == 0 or not run.ranks.is_main or isinstance(error, (CheckpointError, NonFiniteError)):
        return
    if isinstance(error, KeyboardInterrupt):
        return run.reporter.warn(f"step {progress.ts.step} is not saved: the end was wanted at once")
    try:
        run.job.hold()
        made = run.recogniser(progress.ts)
        if save(run.cfg, run.folder.checkpoints, progress, made, True, run.reporter.warn):
            run.reporter.say(f"saved at step {progress.ts.step}; the same command goes on from there")
    except Exception as failure:  # a broken device gives no tensor back
        run.reporter.warn(f"step {progress.ts.step} is not saved: {(str(failure) or type(failure).__name__)[:200]}")

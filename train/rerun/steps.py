"""The steps of a run made again, one after another, as the loop of ``pretrain`` makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple

from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Tensor
from nest_fn.train.data.dataset import RawBatch, batches
from nest_fn.train.data.transfer import tensors_read
from nest_fn.train.keys import step_key
from nest_fn.train.run.batch import prepare_batch
from nest_fn.train.run.context import Run, step_parts
from nest_fn.train.run.failure_dump import explain_oom
from nest_fn.train.run.loop import Metrics, audio_counts, window_line
from nest_fn.train.run.record.checkpoints import trees_of
from nest_fn.train.run.record.digests import tensors_of
from nest_fn.train.run.record.progress import Progress
from nest_fn.train.step import metrics
from nest_fn.train.step.step import RefusedUpdate, make_step, training_loss


class Step(NamedTuple):
    """One update made again."""

    raw: RawBatch
    values: Metrics  # sums over the batch
    progress: Progress  # after it
    line: dict[str, Any] | None  # the line of metrics that ends here, without its times
    refused: RefusedUpdate | None  # why nothing was updated


def steps_from(run: Run, progress: Progress, logged: Callable[[int], bool]) -> Iterator[Step]:
    """Updates from ``progress`` on, without end. A window of metrics ends where ``logged(updates done)`` is true.

    An update that is refused counts as skipped, however many there were before it.
    """
    loss = training_loss(run.cfg, run.rirs, parts=step_parts(run), tables=run.tables)
    make = make_step(run.cfg, loss=loss)
    stream = batches(run.train, epoch=progress.epoch, batch=progress.batch, parts=run.cfg.trainer.accumulate)
    with closing(stream):  # type: ignore[type-var]
        for raw in stream:
            audio = audio_counts(run, raw)
            progress, values, refused = _update(run, progress, make, raw)
            count = metrics.add if refused is None else metrics.skip
            progress = progress._replace(window=count(progress.window, {**values, **audio}))
            line = None
            if logged(progress.ts.step):
                line = window_line(run, progress, values)
                progress = progress._replace(window={})
            yield Step(raw, values, progress, line, refused)


def _update(run: Run, progress: Progress, make: Any, raw: RawBatch) -> tuple[Progress, Metrics, RefusedUpdate | None]:
    ts, key = progress.ts, step_key(run.key, progress.ts.step)
    try:
        with explain_oom(raw, run.cfg, run.device):
            parts = prepare_batch(raw, run.cfg, key, run.device, parts=run.cfg.trainer.accumulate)
            made, values = make(ts, parts, key)
        return progress.past(raw["epoch"], raw["batch"], made), values, None
    except RefusedUpdate as refused:
        skipped = progress.skipped + (not refused.finite)
        after = progress.past(raw["epoch"], raw["batch"], ts._replace(step=ts.step + 1), skipped)
        return after, refused.metrics, refused


def tensors_of_step(run: Run, step: Step) -> dict[str, Tensor]:
    """Every tensor of an update, as ``trainer.digest_every`` records them."""
    key = step_key(run.key, step.progress.ts.step - 1)
    return tensors_of(step.progress, tensors_read(step.raw), key, step.values)


def leaves_of(progress: Progress) -> dict[str, Any]:
    """Every tensor of a progress by its path in a checkpoint: ``params.encoder.layers.0...``."""
    return flatten(trees_of(progress))

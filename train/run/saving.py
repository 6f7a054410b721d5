"""When a checkpoint is due, and how all ranks write one: beside the steps that follow it, or at once if none do."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from nest_fn.layers.tree import tree_map
from nest_fn.layers.types import Tensor
from nest_fn.train.data.dataset import RawBatch
from nest_fn.train.data.transfer import tensors_read
from nest_fn.train.errors import is_out_of_memory
from nest_fn.train.keys import step_key
from nest_fn.train.step.step import TrainState

from .context import Run
from .record.checkpoints import save
from .record.digests import append_digests, digests_of, tensors_of
from .record.progress import Progress
from .state_sharding import unshard_state


def due(done: int, every: int, last: int) -> bool:
    """Whether ``done`` steps are a multiple of ``every`` (0: never), or the last ones."""
    return done == last or (every > 0 and done > 0 and done % every == 0)


def save_due(run: Run, progress: Progress) -> bool:
    """Whether ``trainer.save_every`` names this step."""
    return due(progress.ts.step, run.cfg.trainer.save_every, run.cfg.trainer.max_steps)


def unsharded(run: Run, progress: Progress) -> Progress:
    """The progress with the full train state, for which all ranks are needed if it is sharded."""
    return progress._replace(ts=unshard_state(progress.ts, run.sharding))


def begin_save(run: Run, progress: Progress) -> None:
    """Copy the progress and let a thread of rank 0 write it as a checkpoint; waits for the one before, if need be.

    The copy is needed because the next step overwrites the train state. A failure is reported by ``report_save``.
    """
    full = unsharded(run, progress)
    if not run.ranks.is_main:
        return
    run.background.finish(run.reporter.warn)
    try:
        copied = _copied(full)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        save_on_main(run, full)
        return
    run.background.begin(partial(save, run.cfg, run.folder, copied, run.digest))


def report_save(run: Run) -> None:
    """Report what a save in the background that has ended had to say. Raises the error that ended it, if one did."""
    run.background.report(run.reporter.warn)


def save_progress(run: Run, progress: Progress) -> bool:
    """Write a checkpoint now, on all ranks together; whether it was written. A failure is reported, not raised."""
    written = save_on_main(run, unsharded(run, progress))
    return not run.ranks.any(not written)


def save_on_main(run: Run, progress: Progress) -> bool:
    """Rank 0's part of ``save_progress``. A checkpoint that is not due is temporary: the next one replaces it."""
    if not run.ranks.is_main:
        return True
    run.background.finish(run.reporter.warn)
    temporary = not save_due(run, progress)
    return save(run.cfg, run.folder, progress, run.digest, run.reporter.warn, passing=temporary)


def record_digests(run: Run, progress: Progress, raw: RawBatch, values: Mapping[str, Tensor]) -> None:
    """Record the digest of every tensor after the update of ``raw``, where ``trainer.digest_every`` names this step.

    ``values`` are the update's metrics. A full disk does not end the run.
    """
    every, step = run.cfg.trainer.digest_every, progress.ts.step
    if not every or not due(step, every, run.cfg.trainer.max_steps):
        return
    full = unsharded(run, progress)
    if not run.ranks.is_main:
        return
    batch = tensors_read(raw) if run.ranks.is_single else {}  # of several ranks none has read the whole
    tensors = tensors_of(full, batch, step_key(run.key, step - 1), values)
    try:
        append_digests(run.folder.digests, step, digests_of(tensors))
    except OSError as error:
        run.reporter.warn(f"step {step}: {run.folder.digests}: its digests are lost: {error.strerror}.")


def _copied(progress: Progress) -> Progress:
    """The progress in other memory, on the CPU."""

    def copy(tree: Any) -> Any:
        return tree_map(lambda leaf: leaf.detach().to("cpu", copy=True), tree)

    ts = progress.ts
    moments = {name: copy(part) for name, part in ts.opt_state._asdict().items()}
    opt_state = ts.opt_state._replace(**moments)
    ema = copy(ts.ema) if ts.ema else ts.ema
    return progress._replace(
        ts=TrainState(ts.step, copy(ts.params), copy(ts.state), opt_state, ema), window=copy(dict(progress.window))
    )

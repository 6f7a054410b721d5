"""When a checkpoint is due, and how all ranks write one."""

from __future__ import annotations

from .context import Run
from .record.checkpoints import save
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


def save_progress(run: Run, progress: Progress) -> bool:
    """Write a checkpoint, on all ranks together; whether it was written. A failure is reported, not raised."""
    written = save_on_main(run, unsharded(run, progress))
    return not run.ranks.any(not written)


def save_on_main(run: Run, progress: Progress) -> bool:
    """Rank 0's part of ``save_progress``. A checkpoint that is not due is temporary: the next one replaces it."""
    if not run.ranks.is_main:
        return True
    temporary = not save_due(run, progress)
    return save(run.cfg, run.folder, progress, run.digest, run.reporter.warn, passing=temporary)

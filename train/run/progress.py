"""All that changes during a run, when it is due to be saved, and how."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from nest_fn.train.data.dataset import RawBatch
from nest_fn.train.step import metrics as measures
from nest_fn.train.step.step import TrainState

from .context import Run
from .record.checkpoints import Saved, save
from .state_sharding import unshard_state


@dataclass
class Progress:
    """What changes during a run."""

    ts: TrainState
    epoch: int = 0
    batch: int = 0  # the next one of the epoch
    window: measures.Sums = field(default_factory=dict)  # sums since the last line of metrics
    started: float = field(default_factory=time.monotonic)  # of the window
    skipped: int = 0  # updates in a row that were left out because they were not finite
    valid_loss: float | None = None  # of the validation at this very step
    active_warnings: frozenset[str] = frozenset()  # what was warned of and has not gone since
    together: bool = False  # an error ends the run, and all ranks came to know of it between two steps

    def past(self, raw: RawBatch, ts: TrainState, skipped: int) -> None:
        """Go to the next batch, with the state after this one; all at once, so that an error finds no half of it."""
        self.ts, self.epoch, self.batch, self.skipped = ts, raw["epoch"], raw["batch"] + 1, skipped
        self.valid_loss = None

    def saved(self) -> Saved:
        """As a checkpoint holds it, but for parts that are cut over ranks."""
        return Saved(self.ts, self.epoch, self.batch, self.window, self.skipped, self.valid_loss)


def due(done: int, every: int, last: int) -> bool:
    """Every so many steps (0: never) and at the last one."""
    return done == last or (every > 0 and done > 0 and done % every == 0)


def save_due(run: Run, progress: Progress) -> bool:
    """Whether ``save_every`` names this step."""
    return due(progress.ts.step, run.cfg.trainer.save_every, run.cfg.trainer.max_steps)


def save_progress(run: Run, progress: Progress) -> bool:
    """A checkpoint, by all ranks; whether it is there. A failure has been told."""
    done = write_down(
        run, progress.saved()._replace(ts=unshard_state(progress.ts, run.sharding)), save_due(run, progress)
    )
    return not run.ranks.any(not done)


def write_down(run: Run, saved: Saved, regular: bool) -> bool:
    """Rank 0's part of it; a checkpoint between the times that ``save_every`` names gives way to the next."""
    return not run.ranks.is_main or save(run.cfg, run.folder, saved, run.digest, run.reporter.warn, passing=not regular)

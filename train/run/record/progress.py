"""All that changes during a run, as one value that goes from step to step; a checkpoint is this value, written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from nest_fn.layers.types import Tensor
from nest_fn.train.step.step import TrainState


class Progress(NamedTuple):
    """Where a run is: after ``ts.step`` updates, before batch ``batch`` of epoch ``epoch``."""

    ts: TrainState
    epoch: int
    batch: int
    window: Mapping[str, Tensor]  # sums since the last line of metrics (train/step/metrics.py)
    skipped: int = 0  # updates in a row that were skipped because they were not finite
    valid_loss: float | None = None  # nats, of the validation after this very step; written, but not restored
    init: str = ""  # digest of the model that the run began from; empty: from its seed

    # Not written: what a person was warned of and still holds, and the start of the window on the monotonic clock (s).
    active_warnings: frozenset[str] = frozenset()
    started: float = 0.0

    def past(self, epoch: int, batch: int, ts: TrainState, skipped: int = 0) -> Progress:
        """After a batch, whose update gave ``ts``."""
        return self._replace(ts=ts, epoch=epoch, batch=batch + 1, skipped=skipped, valid_loss=None)

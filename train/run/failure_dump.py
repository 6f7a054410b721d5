"""A step that failed: what is saved for ``nest-fn replay``, and its error message.

RUN/failures/step_00000123/ is a checkpoint of the state before the update, 123 updates done, whose meta also holds the
step's key, utterances, loss, gradient norm, and the parameters whose gradient is not finite. Nothing in
RUN/checkpoints/ is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nest_fn.checkpoint import retention
from nest_fn.config import Config
from nest_fn.layers.types import Key
from nest_fn.train.data.dataset import RawBatch
from nest_fn.train.errors import CheckpointError, MemoryExhausted, NonFiniteError, is_out_of_memory
from nest_fn.train.step.step import RefusedUpdate

from .context import Run
from .record.checkpoints import write
from .record.progress import Progress

SHOWN = 20  # utterances and parameters that a message names


def failures_folder(run: str | Path) -> Path:
    """``RUN/failures``."""
    return Path(run) / "failures"


def shorten(names: list[str]) -> str:
    """The first names that are not empty, and how many there are more."""
    names = [name for name in names if name]
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def utterances(run: Run, raw: RawBatch) -> list[str]:
    """The utterances of a batch, on all ranks."""
    index = run.train.plan(raw["epoch"]).batch(raw["batch"]).index
    return [run.train.manifest.identity(i) for i in index.tolist() if i >= 0]


def failure(run: Run, progress: Progress, raw: RawBatch, key: Key, refused: RefusedUpdate) -> NonFiniteError:
    """The error that ends a run at an update that cannot be made, with the state before it written down.

    ``progress`` is unsharded and points at the batch of the update; ``key`` is the step's. If the dump cannot be
    written, the error says so.
    """
    path = retention.step_path(failures_folder(run.folder.path), progress.ts.step)
    names = utterances(run, raw)
    extra = {
        "key": key.tolist(), "utterances": names, "loss": str(refused.loss),
        "grad_norm": str(refused.norm), "gradients_not_finite": refused.wrong,
    }  # fmt: skip
    advice = f"The state before it is in {path}; nest-fn replay {run.folder.path} {progress.ts.step} looks into it."
    try:
        if run.ranks.is_main:
            write(run.cfg, path, progress, run.digest, extra)
    except (CheckpointError, OSError) as error:
        advice = f"The state before it could not be written down: {error}"
    parameters = f"\n  gradients not finite: {shorten(refused.wrong)}" if refused.wrong else ""
    return NonFiniteError(
        f"{refused} Lower optim.lr, set trainer.clip_norm, allow trainer.skip_nonfinite, or look at the batch.\n"
        f"  utterances: {shorten(names)}{parameters}\n  {advice}"
    )


@contextmanager
def explain_oom(raw: RawBatch, cfg: Config, device: torch.device) -> Iterator[None]:
    """Turn an allocator's error inside of the block into ``MemoryExhausted`` with the batch's shape."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        rows, samples = raw["audio"].shape
        peak = f", peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB" if device.type == "cuda" else ""
        raise MemoryExhausted(
            f"out of memory on {device} in a batch of {rows} x {samples / cfg.sample_rate:.2f} s{peak}: lower "
            f"data.batch_seconds ({cfg.data.batch_seconds:g}) or data.max_duration, raise trainer.accumulate "
            f"({cfg.trainer.accumulate}), or set trainer.recompute=true, and resume with --allow-changes. nest-fn "
            f"pretrain --dry-run tries the largest batch.\n  utterances: {shorten(raw['ids'])}"
        ) from None

"""``nest-fn replay RUN STEP``: one step of a run again, bit for bit, and what is in it. Nothing is written.

STEP is the number of updates that were done before the one to look at, the number that messages and
RUN/failures/step_STEP name; its line in metrics.jsonl has ``step`` STEP + 1. The state comes from that folder, or else
from the newest good checkpoint at or before STEP, or else from the run's seed; from there the steps up to STEP are
made again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nest_fn.config import Config
from nest_fn.frontend import log_mel
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.types import Tensor
from nest_fn.losses import score_tokens
from nest_fn.model import forward
from nest_fn.train.augment.mixing import prepare_inputs
from nest_fn.train.data.dataset import RawBatch, batches
from nest_fn.train.errors import UsageError
from nest_fn.train.keys import step_key
from nest_fn.train.reporter import Reporter
from nest_fn.train.rerun.opening import open_again, progress_before, settings_of
from nest_fn.train.run.batch import prepare_batch
from nest_fn.train.run.context import Run, step_parts
from nest_fn.train.run.failure_dump import explain_oom, shorten
from nest_fn.train.run.record.progress import Progress
from nest_fn.train.step import metrics
from nest_fn.train.step.step import RefusedUpdate, TrainState, cast, make_step, training_loss


class Row(NamedTuple):
    """One utterance of the step."""

    name: str  # identity of the utterance
    seconds: float
    loss: float  # nats, mean over the row's masked tokens; 0 if there are none
    masked: int  # tokens
    remarks: tuple[str, ...]  # what is odd about it


class Replayed(NamedTuple):
    """One step and what was found in it."""

    step: int  # updates done before it
    origin: Path | None  # the checkpoint from which it was reached; None: the run's seed
    epoch: int
    batch: int
    loss: float  # nats, as the line of metrics has it if trainer.log_every is 1
    grad_norm: float
    rows: tuple[Row, ...]
    wrong: tuple[str, ...]  # parameters whose gradient is not finite

    @property
    def finite(self) -> bool:
        """Whether the step could be made."""
        return isfinite(self.loss) and isfinite(self.grad_norm)


def replay(folder: str | Path, step: int, overrides: Sequence[str], reporter: Reporter) -> Replayed:
    """Make step ``step`` of the run in ``folder`` again, with its config as it is or with ``overrides``.

    The run's lock is not needed. Raises ``UsageError`` for a folder that holds no run and a step that none has,
    ``CheckpointError`` if the run's checkpoints are of another model.
    """
    run = _open(Path(folder), step, overrides, reporter)
    origin, progress = progress_before(run, step)
    make = make_step(run.cfg, loss=training_loss(run.cfg, run.rirs, parts=step_parts(run), tables=run.tables))
    stream = batches(run.train, epoch=progress.epoch, batch=progress.batch)
    with closing(stream):  # type: ignore[type-var]
        ts = _catch_up(run, progress, make, stream, step)
        raw = next(stream)
    values, wrong = _made(run, ts, make, raw)
    line = metrics.summarise(metrics.add({}, values))
    rows = tuple(_rows(run, ts, raw))
    return Replayed(
        step, origin, raw["epoch"], raw["batch"], line["loss"], float(values["grad_norm"]), rows, tuple(wrong)
    )


def report(found: Replayed) -> Iterator[str]:
    """The findings as lines of text."""
    yield (
        f"step {found.step} (line {found.step + 1} of the metrics), from {found.origin or 'the seed'}: "
        f"epoch {found.epoch}, batch {found.batch}"
    )
    yield f"loss {found.loss!r}, gradient norm {found.grad_norm!r}"
    for row in found.rows:
        odd = f"  {', '.join(row.remarks)}" if row.remarks else ""
        yield f"  {row.name}: {row.seconds:.2f} s, loss {row.loss:.4f} over {row.masked} masked tokens{odd}"
    if found.wrong:
        yield f"gradients not finite, {len(found.wrong)} parameters: {shorten(list(found.wrong))}"
    yield "finite" if found.finite else "not finite"


def _open(folder: Path, step: int, overrides: Sequence[str], reporter: Reporter) -> Run:
    """The run as it would resume, with its data opened."""
    cfg = settings_of("replay", folder, overrides)
    if not 0 <= step < cfg.trainer.max_steps:
        raise UsageError(
            f"replay: step {step} of a run of {cfg.trainer.max_steps}; want the number of updates before it, from 0 to "
            f"{cfg.trainer.max_steps - 1}."
        )
    return open_again(cfg, folder, reporter)


def _parts(run: Run, raw: RawBatch, step: int) -> list[dict[str, Any]]:
    key = step_key(run.key, step)
    return prepare_batch(raw, run.cfg, key, run.device, parts=run.cfg.trainer.accumulate)


def _catch_up(run: Run, progress: Progress, make: Any, stream: Iterator[RawBatch], step: int) -> TrainState:
    """The train state after ``step`` updates. Updates that the run skipped are skipped again."""
    ts = progress.ts
    for raw in islice(stream, step - ts.step):
        try:
            with explain_oom(raw, run.cfg, run.device):
                ts, _ = make(ts, _parts(run, raw, ts.step), step_key(run.key, ts.step))
        except RefusedUpdate:
            ts = ts._replace(step=ts.step + 1)
    return ts


def _made(run: Run, ts: TrainState, make: Any, raw: RawBatch) -> tuple[dict[str, Tensor], list[str]]:
    """The step's metrics, and the parameters whose gradient is not finite."""
    try:
        with explain_oom(raw, run.cfg, run.device):
            _, values = make(ts, _parts(run, raw, ts.step), step_key(run.key, ts.step))
    except RefusedUpdate as refused:
        return refused.metrics, refused.wrong
    return values, []


def _rows(run: Run, ts: TrainState, raw: RawBatch) -> Iterator[Row]:
    """Every utterance of the step, in the order of the batch."""
    parts = _parts(run, raw, ts.step)
    looked = [_look(run, ts, part) for part in parts]
    for place, name in enumerate(raw["ids"]):
        if name:
            loss, masked, remarks = looked[place % len(parts)][place // len(parts)]
            yield Row(name, int(raw["audio_len"][place]) / run.cfg.sample_rate, loss, masked, remarks)


@torch.no_grad()
def _look(run: Run, ts: TrainState, part: dict[str, Any]) -> list[tuple[float, int, tuple[str, ...]]]:
    """Loss, masked tokens and remarks of each row of a micro-batch."""
    cfg = run.cfg
    batch, key = prepare_inputs(part, cfg, step_key(run.key, ts.step), run.rirs)
    output, _ = forward(cast(ts.params, cfg), ts.state, batch, cfg, key=key, train=True)
    found = score_tokens(*output, cfg.loss, batch["weight"])
    count = found.masked.sum(dim=1) * found.tokens.shape[2]
    total = torch.where(found.masked[..., None], found.losses.double(), 0.0).sum(dim=(1, 2))
    mean = total / count.clamp(min=1)
    return list(zip(mean.tolist(), count.tolist(), _remarks(batch, cfg), strict=True))


def _remarks(batch: dict[str, Tensor], cfg: Config) -> Iterator[tuple[str, ...]]:
    """Remarks on unusual signals, for each row."""
    odd: list[tuple[str, Tensor]] = [("weight 0", batch["weight"] == 0)]
    for name, what in (("audio", "audio"), ("noisy_audio", "mixture")):
        mel, frames = log_mel(batch[name], batch[f"{name}_len"], cfg.preprocessor)
        inside = valid_mask(frames, mel.shape[2])[:, None]
        odd.append((f"{what} silent", (batch[name] == 0).all(dim=1)))
        odd.append((f"{what} not finite", ~batch[name].isfinite().all(dim=1)))
        odd.append((f"features of the {what} not finite", ~(mel.isfinite() | ~inside).all(dim=2).all(dim=1)))
    told = torch.stack([rows for _, rows in odd], dim=1).tolist()
    return (tuple(text for (text, _), here in zip(odd, row, strict=True) if here) for row in told)

"""How a run ends before its last step: a checkpoint of the last finished step, or the reason why there is none.

Asked to stop, all ranks save together. An error that one rank meets while it waits for data is shared with all between
two steps, so that they save together too. At any other error rank 0 saves alone, for it holds the full train state;
unless parameters are sharded, the update failed half-way, or a second Ctrl-C asks for an immediate end.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator

from nest_fn.checkpoint import retention
from nest_fn.train.data.dataset import RawBatch
from nest_fn.train.distributed.collectives import Ranks
from nest_fn.train.distributed.launch import RankFailed
from nest_fn.train.errors import CheckpointError, CollapseError, MemoryExhausted, NonFiniteError
from nest_fn.train.signals import StopRequest
from nest_fn.train.step.step import OVERWRITTEN

from .context import Run
from .record.progress import Progress
from .saving import save_on_main, save_progress, unsharded

_MOMENT = 2.0  # seconds
_SAVED_ALREADY = (CheckpointError, CollapseError, NonFiniteError)
_SHARED = "all ranks ended after the same step"
"""A note on an error that every rank knows of, so that all can take part in saving."""


def stopped(run: Run, progress: Progress, stop: StopRequest) -> int:
    """Save as requested; the exit code. Raises ``CheckpointError`` if it cannot be saved."""
    if not save_progress(run, progress):
        raise unsaved(progress, "at which a stop was asked for")
    run.reporter.say(f"asked to stop: saved at step {progress.ts.step}; the same command goes on from there")
    return stop.exit_code


def unsaved(progress: Progress, which: str) -> CheckpointError:
    """The error of a run whose last checkpoint cannot be written."""
    return CheckpointError(
        f"step {progress.ts.step}, {which}, could not be saved, as told above; when it can be, give the same command "
        "again: it goes on from the newest checkpoint."
    )


def collapsed(run: Run, progress: Progress) -> CollapseError:
    """The error of a run whose codes collapsed, saved at its last step."""
    saved = "saved" if save_progress(run, progress) else "not saved"
    return CollapseError(
        f"step {progress.ts.step}: ended for codebook collapse, {saved}. Look at the data with nest-fn data stats; "
        "the same command with trainer.stop_on_collapse=false goes on."
    )


def fetch(ranks: Ranks, stream: Iterator[RawBatch], stop: StopRequest) -> RawBatch | None:
    """The next batch; None, on all ranks, if any was asked to stop. An error of one ends all, at the same step.

    Raises what ``stream`` raises, and ``RankFailed`` on the ranks whose own batch is good.
    """
    raw, problem = None, None
    try:
        raw = next(stream, None)  # None: a stop was requested while it was awaited
    except Exception as error:  # whatever it is, the others must not wait for this rank
        problem = error
    if not ranks.any(raw is None or stop.asked):
        return raw
    if ranks.any(problem is not None):
        problem = RankFailed("another rank could not read its data") if problem is None else problem
        problem.add_note(_SHARED)
        raise problem
    return None


def save_before_end(run: Run, progress: Progress, error: BaseException) -> None:
    """Save the last finished step because ``error`` ends the run, or report why it is not saved."""
    _finish_background(run, error)
    if progress.ts.step == 0 or isinstance(error, _SAVED_ALREADY):
        return
    if isinstance(error, MemoryExhausted):
        _free_frames(error)
    shared = _has_note(error, _SHARED)
    step, saved, obstacle = progress.ts.step, False, _obstacle(run, error, shared)
    if not obstacle:
        try:
            full = unsharded(run, progress)
            if run.ranks.is_main and not shared:
                run.job.hold()
            saved = save_on_main(run, full)
        except (Exception, KeyboardInterrupt) as failure:  # a broken device gives no tensor back
            obstacle = str(failure).partition("\n")[0] or type(failure).__name__
    newest = max(map(retention.step_of, retention.list_checkpoints(run.folder.checkpoints)), default=0)
    if saved or newest == step:
        run.reporter.say(f"saved at step {step}; the same command goes on from there")
    else:
        why = f": {obstacle}" if obstacle else ", as told above"
        run.reporter.warn(f"step {step} is not saved{why}; the newest checkpoint is that of step {newest}")


def _finish_background(run: Run, error: BaseException) -> None:
    """Wait for the checkpoint that is being written; where the end is wanted at once, no longer than a moment."""
    if not run.background.running:
        return
    if not _has_note(error, _SHARED):
        run.job.hold()
    try:
        run.background.finish(run.reporter.warn, _MOMENT if isinstance(error, KeyboardInterrupt) else None)
    except Exception as failure:  # told, for ``error`` is what ends the run
        run.reporter.warn(f"the checkpoint before is not saved: {failure}")


def _obstacle(run: Run, error: BaseException, shared: bool) -> str:
    """Why the last finished step cannot be saved; empty if it can be."""
    if isinstance(error, KeyboardInterrupt):
        return "the end was wanted at once"
    if _has_note(error, OVERWRITTEN):
        return OVERWRITTEN
    if run.sharding.sharded and not shared:
        return f"its parameters are cut over {run.ranks.world} ranks, and not all can take part any more"
    return ""


def _has_note(error: BaseException, note: str) -> bool:
    return any(note in getattr(cause, "__notes__", ()) for cause in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came of."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _free_frames(error: BaseException) -> None:
    """Release the tensors that the failed functions still hold, so that saving finds memory."""
    for cause in _causes(error):
        traceback.clear_frames(cause.__traceback__)

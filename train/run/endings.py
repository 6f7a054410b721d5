"""How a run ends before its last step: with a checkpoint of the last finished step, or a word on why there is none.

Asked to stop, all ranks save together. An error that one rank meets while it waits for data is told to all between two
steps, so that they save together too. At any other error rank 0 saves alone, for it holds all there is; unless the
parameters are cut over ranks, the update broke off in the middle, or a second Ctrl-C wants the end at once.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from nest_fn.checkpoint import retention as checkpoint_folder
from nest_fn.train.data.dataset import RawBatch
from nest_fn.train.distributed.launch import RankFailed
from nest_fn.train.errors import CheckpointError, CollapseError, MemoryExhausted, NonFiniteError
from nest_fn.train.step.step import OVERWRITTEN

from .context import Run
from .progress import Progress, save_due, save_progress, write_down
from .signals import StopRequest
from .state_sharding import unshard_state

_SAY_IT_THEMSELVES = (CheckpointError, CollapseError, NonFiniteError)


def stopped(run: Run, progress: Progress, stop: StopRequest) -> int:
    """Save as asked; the exit code. Raises ``CheckpointError`` if it cannot be saved."""
    if not save_progress(run, progress):
        raise unsaved(progress, "at which a stop was asked for")
    run.reporter.say(f"asked to stop: saved at step {progress.ts.step}; the same command goes on from there")
    return stop.exit_code


def unsaved(progress: Progress, which: str) -> CheckpointError:
    """The end of a run whose last checkpoint cannot be written."""
    return CheckpointError(
        f"step {progress.ts.step}, {which}, could not be saved, as told above; when it can be, give the same command "
        "again: it goes on from the newest checkpoint."
    )


def collapsed(run: Run, progress: Progress) -> CollapseError:
    """The end of a run whose codes collapsed, saved as far as it came."""
    saved = "saved" if save_progress(run, progress) else "not saved"
    return CollapseError(
        f"step {progress.ts.step}: ended for codebook collapse, {saved}. Look at the data with nest-fn data stats; "
        "the same command with trainer.stop_on_collapse=false goes on."
    )


def fetched(run: Run, stream: Iterator[RawBatch], stop: StopRequest, progress: Progress) -> RawBatch | None:
    """The next batch; None, on all ranks, if any was asked to stop. An error of one ends all, at the same step.

    Raises what ``stream`` raises, and ``RankFailed`` on the ranks whose own batch is good.
    """
    raw, problem = None, None
    try:
        raw = next(stream, None)  # None: a stop was asked for while it was awaited
    except Exception as error:  # whatever it is, the others must not wait for this rank
        problem = error
    if not run.ranks.any(raw is None or stop.asked):
        return raw
    if run.ranks.any(problem is not None):
        progress.together = True
        raise problem if problem is not None else RankFailed("another rank could not read its data")
    return None


@contextmanager
def saved_at_the_end(run: Run, progress: Progress) -> Iterator[None]:
    """Where an error comes out of the block: save the last finished step, or say why not, before it goes on."""
    try:
        yield
    except BaseException as error:
        if progress.ts.step > 0 and not isinstance(error, _SAY_IT_THEMSELVES):
            if isinstance(error, MemoryExhausted):
                _free(error)
            _save(run, progress, _obstacle(run, progress, error))
        raise


def _obstacle(run: Run, progress: Progress, error: BaseException) -> str:
    """Why the last finished step cannot be saved, empty if it can be."""
    if isinstance(error, KeyboardInterrupt):
        return "the end was wanted at once"
    if any(OVERWRITTEN in getattr(cause, "__notes__", ()) for cause in _causes(error)):
        return OVERWRITTEN
    if run.sharding.sharded and not progress.together:
        return f"its parameters are cut over {run.ranks.world} ranks, and not all can take part any more"
    return ""


def _save(run: Run, progress: Progress, obstacle: str) -> None:
    """By rank 0, where nothing stands against it."""
    step, done = progress.ts.step, False
    if not obstacle:
        try:
            saved = progress.saved()._replace(ts=unshard_state(progress.ts, run.sharding))
            if run.ranks.is_main and not progress.together:
                run.job.hold()
            done = write_down(run, saved, save_due(run, progress))
        except (Exception, KeyboardInterrupt) as error:  # a device that is broken gives nothing away
            obstacle = str(error).partition("\n")[0] or type(error).__name__
    newest = max(map(checkpoint_folder.step_of, checkpoint_folder.list_checkpoints(run.folder.checkpoints)), default=0)
    if done or newest == step:
        run.reporter.say(f"saved at step {step}; the same command goes on from there")
    else:
        why = f": {obstacle}" if obstacle else ", as told above"
        run.reporter.warn(f"step {step} is not saved{why}; the newest checkpoint is that of step {newest}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came of."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _free(error: BaseException) -> None:
    """Let go of what the functions that failed still hold, so that there is room to save in."""
    for cause in _causes(error):
        traceback.clear_frames(cause.__traceback__)

"""A run from its folder to its exit code: open, go on or begin, train, and end."""

from __future__ import annotations

import shlex
from contextlib import closing

import torch

from nest_fn.config import Config
from nest_fn.interop.take_over import differing_settings
from nest_fn.layers.tree import flatten
from nest_fn.train.distributed.launch import SINGLE, Job
from nest_fn.train.errors import CheckpointError
from nest_fn.train.reporter import Reporter
from nest_fn.train.signals import Stopped, StopRequest, stop_requests
from nest_fn.version import code_digest

from .context import Initial, Run, announce, data_record, open_run
from .loop import train
from .record.checkpoints import check_keeping, recorded, restore
from .record.digests import cut_digests
from .record.log_file import logged
from .record.progress import Progress
from .record.run_folder import RunFolder
from .saving import save_progress
from .state_sharding import broadcast_progress, taken_over


def pretrain(
    cfg: Config, folder: RunFolder, reporter: Reporter, *, resume: str = "auto", command: list[str] | None = None,
    allow_changes: bool = False, job: Job = SINGLE, initial: Initial | None = None,
) -> int:  # fmt: skip
    """Train until ``trainer.max_steps`` or a request to stop; the exit code.

    ``resume``: ``auto`` goes on from the newest good checkpoint if there is one, ``must`` wants one, ``never`` wants
    none. A new run begins from ``initial`` if it is given, else from its seed. Every rank of ``job`` calls this; rank 0
    alone writes and reports. Raises the errors of ``train.errors``.
    """
    check_keeping(cfg)
    main, began = job.ranks.is_main, False
    if main:
        folder.open()
    try:
        with logged(reporter, folder.log(job.ranks.rank), job.diagnose) as told, stop_requests() as stop:
            if main:
                told.log.write(f"command: {' '.join(command or [])}")
            run = _open(cfg, folder, told, job, stop, initial)
            if run is None:
                return stop.exit_code
            progress = _begin(run, resume, allow_changes)
            if main:
                folder.describe(cfg, command or [], data_record(run), job.ranks.world)
            began = True
            told.log.begin()
            announce(run)
            with closing(run.loggers):
                code = train(run, progress, stop)
            if code == 0:
                run.reporter.say(f"to look at it: nest-fn report {shlex.quote(str(folder.path))} --out report.html")
            return code
    finally:
        if main:
            folder.close(began)


def _open(
    cfg: Config, folder: RunFolder, reporter: Reporter, job: Job, stop: StopRequest, initial: Initial | None
) -> Run | None:
    """The run, the same on all ranks; None if a stop is requested meanwhile."""
    run = None
    try:
        with stop.at_once():
            run = open_run(cfg, folder, reporter, job, initial)
    except Stopped:
        if job.ranks.is_main:
            reporter.say("asked to stop while data was opened, nothing to save; the same command starts again")
    if job.ranks.any(run is None) or run is None:
        return None
    job.agree({**flatten(recorded(cfg)), "data": run.digest, "code": code_digest(), "torch": torch.__version__,
               "init": "" if initial is None else initial.digest})  # fmt: skip
    return run


def _begin(run: Run, resume: str, allow_changes: bool) -> Progress:
    """Where the run goes on, on every rank: from its newest checkpoint, or from its seed."""
    restored = None
    if run.ranks.is_main:
        restored = restore(run.cfg, run.folder, run.digest, run.reporter.warn, run.device, resume, allow_changes)
        _refuse_another_beginning(run, restored)
        # -1: the lines of a run that ended before its first checkpoint
        step = -1 if restored is None else restored.ts.step
        run.folder.cut_metrics(step)
        cut_digests(run.folder.digests, step)
    progress = broadcast_progress(restored, run)
    if run.initial is not None and not run.ranks.broadcast_object(restored is not None):
        _announce_beginning(run)
        save_progress(run, progress)  # so that the run no longer needs the file
    if progress.ts.step == 0:
        return progress
    if progress.batch > len(run.train.plan(progress.epoch)):  # only if the data changed
        progress = progress._replace(epoch=progress.epoch + 1, batch=0)
    run.reporter.say(f"resumed at step {progress.ts.step}, epoch {progress.epoch}, batch {progress.batch}")
    if progress.ts.step >= run.cfg.trainer.max_steps:
        run.reporter.say(f"trainer.max_steps is {run.cfg.trainer.max_steps}, so that nothing is left to do")
    return progress


def _refuse_another_beginning(run: Run, restored: Progress | None) -> None:
    """Raise ``CheckpointError`` if the run in the folder began from another model than ``--init`` names."""
    if run.initial is not None and restored is not None and restored.init != run.initial.digest:
        began = "another model" if restored.init else "its seed"
        raise CheckpointError(
            f"run folder {run.folder.path}: its run began from {began}, not from {run.initial.source}; leave --init "
            "out to go on, or choose another with --folder."
        )


def _announce_beginning(run: Run) -> None:
    """Tell which parts come from the file, and which settings differ from its own."""
    assert run.initial is not None
    for line in taken_over(run).lines():
        run.reporter.say(f"{run.initial.source}: {line}")
    for difference in differing_settings(run.initial.cfg, run.cfg):
        run.reporter.warn(f"not as in {run.initial.source}: {difference}")

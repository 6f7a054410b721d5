"""A run that is there, opened again: its settings, and its progress at a step from a checkpoint or from the seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.checkpoint import retention
from nest_fn.config import Config
from nest_fn.train.errors import CheckpointError, UsageError
from nest_fn.train.reporter import Reporter
from nest_fn.train.run.context import Run, open_run
from nest_fn.train.run.failure_dump import failures_folder
from nest_fn.train.run.record.checkpoints import load, refuse_changes
from nest_fn.train.run.record.progress import Progress
from nest_fn.train.run.record.run_folder import RunFolder
from nest_fn.train.run.state_sharding import initial_train_state


def settings_of(command: str, folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run of ``pretrain``, with ``overrides``.

    Raises ``UsageError`` for a folder that holds none, or a run of another command, and ``ConfigError``.
    """
    settings = folder / "config.yaml"
    if not settings.is_file():
        raise UsageError(
            f"{command}: {folder} holds no run, for there is no {settings}; give a folder that pretrain made."
        )
    if (data := RunFolder(folder).data()) and "train" not in data:
        raise UsageError(f"{command}: {folder} holds a run of another command, as finetune-ctc; want one of pretrain.")
    return Config.from_yaml(settings, overrides)


def open_again(cfg: Config, folder: Path, reporter: Reporter) -> Run:
    """The run as it would resume, with its training data alone. Its lock is not needed, and nothing is written."""
    alone = replace(cfg, data=replace(cfg.data, valid=()), trainer=replace(cfg.trainer, loggers=()))
    return open_run(alone, RunFolder(folder), reporter)


def newest_before(folder: Path, step: int) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint at or before ``step``, None if there is none; and what is wrong with each newer one.

    The dump of a failure at ``step`` itself comes first.
    """
    dump = retention.step_path(failures_folder(folder), step)
    present = retention.list_checkpoints(folder / "checkpoints")
    found = [path for path in present if retention.step_of(path) <= step]
    problems = []
    for path in [dump, *reversed(found)] if dump.exists() else reversed(found):
        try:
            checkpoint_folder.verify(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return path, problems
    return None, problems


def progress_before(run: Run, step: int) -> tuple[Path | None, Progress]:
    """The progress at the newest good checkpoint at or before ``step``, else at the run's beginning; and its path.

    Differences of the settings to those of the checkpoint are reported. Raises ``CheckpointError`` if the run's
    checkpoints are of another model.
    """
    origin, problems = newest_before(run.folder.path, step)
    if origin is None:
        return None, _from_the_seed(run, step, problems)
    return origin, load(run.cfg, origin, run.digest, run.reporter.warn, run.device, allow_changes=True)


def _from_the_seed(run: Run, step: int, problems: Sequence[str]) -> Progress:
    """The run's beginning, as ``pretrain`` made it. Differences to the oldest good checkpoint after it are reported."""
    for problem in problems:
        run.reporter.warn(problem)
    if step > 0:
        run.reporter.say(f"no good checkpoint at or before step {step}: its {step} updates are made from the seed")
    for path in retention.list_checkpoints(run.folder.checkpoints):
        try:
            _, settings, meta = checkpoint_folder.read_checkpoint(path)
        except CheckpointError:
            continue
        if meta.get("init"):
            raise UsageError(
                f"{run.folder.path}: the run began from a model (--init), and no checkpoint is left at or before step "
                f"{step}; give a later step."
            )
        if "data_digest" in meta:
            refuse_changes(run.cfg, settings, meta, run.digest, True, run.reporter.warn)
            break
    return Progress(initial_train_state(run), 0, 0, {})

"""The runs of a study, one after another. A run that is finished is not made again, and one that was killed goes on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from nest_fn.checkpoint import retention
from nest_fn.train.distributed.launch import SINGLE, Job
from nest_fn.train.errors import NestError, UsageError, error_text
from nest_fn.train.reporter import Reporter
from nest_fn.train.run.pretrain import pretrain
from nest_fn.train.run.record.run_folder import RunFolder

from .plan import Study, Task, command_of


def is_finished(study: Study, task: Task, folder: Path) -> bool:
    """Whether a run made all its updates; its last checkpoint is written after its last validation."""
    newest = retention.latest(task.folder(folder) / "checkpoints")
    return newest is not None and retention.step_of(newest) >= study.cfg(task).trainer.max_steps


def execute(study: Study, folder: Path, tasks: Sequence[Task], reporter: Reporter, job: Job = SINGLE) -> int:
    """Make the runs that are not finished; the exit code of a request to stop, else 0, or 1 if a run failed.

    A run that ends with an error is reported, and the next one begins; the same call tries it again.
    """
    failed = []
    for number, task in enumerate(tasks, 1):
        told = f"run {number} of {len(tasks)}: {task}"
        if is_finished(study, task, folder):
            reporter.say(f"{told}: is finished")
            continue
        reporter.say(told)
        run = RunFolder(task.folder(folder))
        command = [shlex.quote(word) for word in command_of(study, task, folder)]
        try:
            code = pretrain(study.cfg(task), run, reporter, command=command, job=job)
        except UsageError:
            raise
        except NestError as error:
            reporter.warn(f"{task}: {error_text(error)}")
            failed.append(task)
            continue
        if code:
            return code
    if failed:
        reporter.warn(f"{len(failed)} runs failed: {'; '.join(map(str, failed))}. The same command tries them again.")
    return int(bool(failed))


def slurm_array(study: Study, path: Path, folder: Path) -> Iterator[str]:
    """The lines of a Slurm script whose array tasks are the runs of the study at ``path``."""
    tasks = study.tasks
    call = f"study {shlex.quote(str(path.absolute()))} --folder {shlex.quote(str(folder.absolute()))}"
    yield "#!/bin/bash"
    yield f"#SBATCH --array=0-{len(tasks) - 1}"
    yield "#SBATCH --requeue"
    yield "#SBATCH --signal=TERM@120  # a run that gets it saves, and the same task goes on from there"
    yield f"# One run a task; when all are done: nest-fn {call} --collect"
    yield "# Several GPUs a run: torchrun --nproc-per-node N -m nest_fn.train study ... instead of nest-fn study ..."
    for number, task in enumerate(tasks):
        yield f"#   {number}: {task}"
    yield f'exec srun nest-fn {call} --task "$SLURM_ARRAY_TASK_ID"'

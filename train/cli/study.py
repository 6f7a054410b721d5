"""``nest-fn study``: the same training in several arms and over several seeds, compared seed by seed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_fn.train.errors import UsageError

from . import option_types
from .stream import joined_ranks, show, tell

if TYPE_CHECKING:
    from nest_fn.train.studies.plan import Study


def add_commands(commands: Any) -> None:
    """Add the subcommand ``study``."""
    text = "run arms x seeds, one after another or as a Slurm array, and compare them seed by seed"
    parser = commands.add_parser("study", help=text, description=text)
    parser.set_defaults(run_command=_study)
    parser.add_argument("study", type=option_types.path, help="study.yaml: config, overrides, seeds, arms or grid")
    parser.add_argument("--folder", required=True, type=option_types.path, help="folder of the runs, table and report")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--task", type=option_types.whole(0, 10_000), default=None, metavar="N", help="make run N alone, from 0"
    )
    what.add_argument("--collect", action="store_true", help="make no run, only the table and the report")
    what.add_argument(
        "--array", type=option_types.path, default=None, metavar="FILE", help="make no run; write a Slurm array script"
    )


def _study(args: argparse.Namespace) -> int:
    from nest_fn.files.outputs import begin, claim
    from nest_fn.train.studies.execute import execute
    from nest_fn.train.studies.plan import read_study

    from .console import ConsoleReporter

    study, folder = read_study(args.study), Path(args.folder)
    if args.array is not None:
        return _write_array(study, args)
    tasks = study.tasks
    if args.task is not None and args.task >= len(tasks):
        raise UsageError(f"study: run {args.task} of {len(tasks)}; want 0 to {len(tasks) - 1}.")
    place = claim(folder, {"command": "study"}, folder=True, inputs=[args.study], overwrite=None)
    if args.collect:
        if not place.begun:
            raise UsageError(f"study: {folder} holds no study yet; leave --collect out to make its runs.")
        _collect(study, folder)
        return 0
    with joined_ranks(study.cfg(tasks[0])) as job:
        if job.ranks.is_main and not place.begun:
            begin(place)
        job.ranks.any(False)  # the folder is there before another rank looks into it
        chosen = tasks if args.task is None else [tasks[args.task]]
        code = execute(study, folder, chosen, ConsoleReporter(), job)
        if code in (0, 1) and args.task is None and job.ranks.is_main:
            _collect(study, folder)
    return code


def _write_array(study: Study, args: argparse.Namespace) -> int:
    from nest_fn.files.outputs import claim, written
    from nest_fn.train.studies.execute import slurm_array

    text = "".join(f"{line}\n" for line in slurm_array(study, Path(args.study), Path(args.folder)))
    place = claim(args.array, {"command": "study", "script": text}, folder=False, inputs=[args.study], overwrite=None)
    if not place.done:
        with written(place) as temporary:
            temporary.write_text(text, encoding="utf-8")
            temporary.chmod(0o755)
    tell(f"written to {args.array}: sbatch {args.array}")
    return 0


def _collect(study: Study, folder: Path) -> None:
    """Write ``table.md``, ``table.json`` and, with matplotlib, ``report.html``; show the table."""
    from nest_fn.files.atomic import anything, atomic_write
    from nest_fn.train.studies.page import markdown, study_page
    from nest_fn.train.studies.table import collect, to_json

    tables = collect(study, folder)
    texts = {
        "table.md": markdown(study, folder, tables),
        "table.json": json.dumps(to_json(tables), indent=1, allow_nan=False) + "\n",
    }
    try:
        texts["report.html"] = study_page(study, folder, tables)
    except UsageError as error:
        tell(str(error))
    for name, text in texts.items():
        with atomic_write(folder / name, len(text), replaces=anything) as temporary:
            temporary.write_text(text, encoding="utf-8")
    show(texts["table.md"], end="")
    tell(f"written to {folder}: {', '.join(texts)}")

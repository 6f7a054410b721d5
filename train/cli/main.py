"""The command line ``nest-fn`` (also ``python -m nest_fn.train``)."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from nest_fn.config import Config, ConfigError
from nest_fn.files.quoting import shown
from nest_fn.train.errors import EXIT_FAILURE, EXIT_PIPE, NestError, UsageError, error_text, exit_code
from nest_fn.version import __version__

from . import bench, option_types
from . import config as cli_config
from .config import read_config
from .stream import (
    exit_if_distributed,
    finish_standard_streams,
    joined_ranks,
    named_output,
    open_standard_streams,
    show,
    tell_end,
)  # fmt: skip

EPILOG = """exit codes: 0 done, 1 failure, 2 usage or config, 3 data, 4 checkpoint, 5 not finite, 6 distributed,
75 saved after a signal, as SIGTERM, SIGUSR1 or SIGHUP (start again to go on), 130 Ctrl-C, 141 results were not wholly
printed, for their reader went away; a command whose product is a file goes on without a reader"""

SPINS = "10000"
"""Turns of a loop for which a thread waits before it sleeps: some microseconds, where OpenMP's own are milliseconds."""
_MISNAMED = (  # a path on the command line cannot be read or written: a usage error, not a fault of the machine
    errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EROFS,
)  # fmt: skip


def process() -> NoReturn:
    """The entry point of ``nest-fn``: run one command and end the process with its exit code.

    OpenMP's threads soon sleep where they wait, unless the user's environment says otherwise: by default they spin for
    so long that where another process wants their core, a step takes many times as long (docs/performance.md,
    "Threads"). Read by OpenMP when torch is first imported, which no command has done yet.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    leave(main())


def leave(code: int) -> NoReturn:
    """End the process with an exit code.

    If a thread still runs (for example a prefetching worker thread), finalising the interpreter would interrupt it
    inside C++ code and abort the process with code 134. The process then exits without finalising.
    """
    if threading.active_count() > 1:
        finish_standard_streams()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Errors that a user can remedy are printed without a traceback."""
    open_standard_streams()
    try:
        code = _run(argv)
    finally:
        unprinted = finish_standard_streams()
    if isinstance(unprinted, BrokenPipeError):
        return code or EXIT_PIPE
    if unprinted is not None:
        tell_end(error_text(named_output(unprinted)))
        return code or EXIT_FAILURE
    return code


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _read(argv)
        return int(args.run_command(args) or 0)
    except BrokenPipeError:
        return EXIT_PIPE
    except (NestError, ConfigError, OSError) as error:
        tell_end(error_text(error))
        misnamed = isinstance(error, OSError) and error.errno in _MISNAMED
        return exit_if_distributed(UsageError.exit_code if misnamed else exit_code(error))
    except (Exception, KeyboardInterrupt) as error:
        tell_end(error_text(error))
        return exit_if_distributed(exit_code(error))


def _read(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments; overrides may appear anywhere, also after options."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"what is meant by {' '.join(rest)}?")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    from . import analyse as cli_analyse
    from . import apply as cli_apply
    from . import completion as cli_completion
    from . import data as cli_data
    from . import finetune as cli_finetune
    from . import model as cli_model
    from . import study as cli_study

    parser = option_types.Parser(prog="nest-fn", description="Self-supervised pre-training of speech encoders.",
                                     epilog=EPILOG)  # fmt: skip
    parser.add_argument("--version", action="version", version=f"nest-fn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_command(commands, "pretrain", _pretrain, "train from a config", _pretrain_arguments)
    cli_data.add_commands(commands)
    cli_config.add_commands(commands)
    cli_model.add_commands(commands)
    cli_apply.add_commands(commands)
    cli_analyse.add_commands(commands)
    cli_study.add_commands(commands)
    cli_finetune.add_commands(commands)
    add_command(commands, "doctor", _doctor, "is this machine ready", _doctor_arguments)
    add_command(commands, "bench", bench.run, "how fast is this machine", bench.add_arguments)
    add_command(commands, "demo", _demo, "train a small model on synthetic speech", _demo_arguments)
    cli_completion.add_commands(commands, _parser)
    return parser


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], text: str,
    arguments: Callable[[argparse.ArgumentParser], None],
) -> None:  # fmt: skip
    """Add a subcommand: its function, a line of help, and its arguments."""
    parser = commands.add_parser(name, help=text, description=text)
    arguments(parser)
    parser.set_defaults(run_command=run)


def _pretrain_arguments(parser: argparse.ArgumentParser) -> None:
    cli_config.add_config_arguments(parser)
    parser.set_defaults(config=None)
    parser.add_argument("--init", type=option_types.path, default=None, metavar="FROM",
                        help="begin from weights, statistics and codebooks of a run folder or any checkpoint, ours or "
                        "the reference's; without -c the config is that of the file")  # fmt: skip
    # Not --run: torchrun would take it for an abbreviation of one of its own options.
    parser.add_argument("--folder", type=option_types.path, default=None, help="run folder (default: runs/CONFIG)")
    parser.add_argument("--resume", choices=("auto", "must", "never"), default="auto",
                        help="go on from the newest good checkpoint if there is one, or must, or never")  # fmt: skip
    parser.add_argument("--allow-changes", action="store_true", help="resume although config or data changed")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and run the largest batch")


def _pretrain(args: argparse.Namespace) -> int:
    from nest_fn.train.run.pretrain import pretrain
    from nest_fn.train.run.record.log_file import LogFile
    from nest_fn.train.run.record.run_folder import RunFolder

    from .console import ConsoleReporter

    initial, cfg = _beginning(args)
    if args.dry_run:
        from nest_fn.train.commands.dry_run import describe

        for line in describe(cfg):
            show(line)
        return 0
    folder = RunFolder(args.folder or Path("runs") / Path(args.config or cli_config.DEFAULT).stem)
    _check_apart(args.init, folder.path)
    command = [shlex.quote(word) for word in sys.argv]
    with joined_ranks(cfg, LogFile(folder.log(int(os.environ.get("RANK", "0"))))) as job:
        return pretrain(
            cfg, folder, ConsoleReporter(), resume=args.resume, command=command, allow_changes=args.allow_changes,
            job=job, initial=initial,
        )  # fmt: skip


def _beginning(args: argparse.Namespace) -> tuple[Any, Config]:
    """The model that ``--init`` names, None without it, and the config: that of ``-c``, else of the file."""
    if args.init is None:
        return None, read_config(args)
    from nest_fn.train.run.context import read_initial

    if args.config is None and args.folder is None and not args.dry_run:
        raise UsageError("pretrain: --init without -c gives the run no name; name its folder with --folder.")
    initial = read_initial(args.init)
    cfg = initial.cfg.override(*args.overrides) if args.config is None else read_config(args)
    return initial, cfg


def _check_apart(init: str | None, folder: Path) -> None:
    """Raise ``UsageError`` if the run would be written where it begins from."""
    if init is not None and Path(init).resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"pretrain: --init {shown(init)} lies in the run folder itself; choose another with --folder.")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", nargs="?", type=option_types.path, default=".", help="where runs will be written")


def _doctor(args: argparse.Namespace) -> int:
    from nest_fn.train.commands.doctor import examine

    failed = False
    for finding in examine(args.folder):
        failed |= finding.ok is False
        show(f"{ {True: 'ok  ', False: 'FAIL', None: '    '}[finding.ok] } {finding.text}")
    return int(failed)


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--folder", type=option_types.path, default="runs/demo", help="run folder")
    parser.add_argument("--seed", type=option_types.seed, default=0, help="of the synthetic speech and the run")


def _demo(args: argparse.Namespace) -> int:
    from nest_fn.train.commands.demo import run_demo

    from .console import ConsoleReporter

    cfg = Config.preset("demo", args.overrides)
    return run_demo(cfg, Path(args.folder), args.seed, ConsoleReporter(sys.stdout))

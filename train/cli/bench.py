"""``nest-fn bench``: its options."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from nest_fn.files.quoting import shown
from nest_fn.train.errors import UsageError

from . import option_types
from .stream import tell

SECTIONS = ("step", "parts", "start", "loader", "end-to-end", "laws")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench``."""
    parser.add_argument(
        "sections", nargs="*", type=_section, metavar="SECTION", default=["step", "parts", "loader"],
        help=f"what to measure, of {', '.join(SECTIONS)} (default: step parts loader)",
    )  # fmt: skip
    parser.add_argument("--out", type=option_types.path, default="bench.json", help="where the figures go")
    option_types.add_overwrite(parser)
    parser.add_argument(
        "--case",
        action="append",
        type=_case,
        metavar="PRESET:ROWSxSECONDS",
        help="of the step, as nest_small:4x10; may be repeated",
    )
    parser.add_argument(
        "--set",
        action="append",
        type=_setting,
        default=[],
        metavar="KEY=VALUE",
        help="a setting of all cases, as trainer.precision=bf16",
    )
    parser.add_argument("--rounds", type=option_types.whole(1, 10_000), default=5, help="measurements of each figure")
    parser.add_argument("--threads", type=option_types.whole(1, 1024), default=1, help="of a CPU")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one"
    )
    parser.add_argument("--compile", action="store_true", help="also the compiled step (minutes on a CPU)")
    parser.add_argument("--peer", choices=("nemo",), default=None, help="another trainer beside this one, in turns")
    parser.add_argument(
        "--peer-python", type=option_types.path, default=None, metavar="PATH", help="an interpreter that has the peer"
    )


def _section(text: str) -> str:
    if text not in SECTIONS:
        raise argparse.ArgumentTypeError(f"want some of {', '.join(SECTIONS)}, got {shown(text)}")
    return text


def _setting(text: str) -> str:
    if not re.fullmatch(r"[a-z_.0-9]+=[^\0\n]*", text):
        raise argparse.ArgumentTypeError(f"want KEY=VALUE, got {shown(text)}")
    return text


def _case(text: str) -> Any:
    from nest_fn.train.bench.workload import Case, Shape

    found = re.fullmatch(r"([a-z_]+):(\d{1,5})x(\d{1,4}(?:\.\d+)?)", text)
    if found is None or int(found[2]) < 1 or float(found[3]) < 1.0:
        raise argparse.ArgumentTypeError(
            f"want a preset, rows and at least one second, as nest_small:4x10, got {shown(text)}"
        )
    return Case(found[1], Shape(int(found[2]), float(found[3])))


def run(args: argparse.Namespace) -> None:
    """Measure and report. Raises ``UsageError`` for options that do not fit together."""
    import torch

    from nest_fn.train.bench.report import CASES, GPU_CASES, Options, run_benchmark
    from nest_fn.train.bench.sides import Machine
    from nest_fn.train.run.device import check_precision, choose_device

    if (args.peer is None) != (args.peer_python is None):
        raise UsageError("bench: --peer and --peer-python go together; give both, or none.")
    device = str(choose_device(args.device))
    cases = tuple(args.case) if args.case else GPU_CASES if device.startswith("cuda") else CASES
    cases = tuple(case._replace(overrides=(*case.overrides, *args.set)) for case in cases)
    options = Options(args.sections, cases, Machine(device, args.threads), args.rounds, args.compile, args.peer_python)
    for case in cases:  # what cannot be is told before anything is measured
        check_precision(case.config().trainer.precision, torch.device(device))
    for line in run_benchmark(Path(args.out), options, overwrite=args.overwrite):
        tell(line)

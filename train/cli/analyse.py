"""``nest-fn analyse``: looks inside a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import option_types
from .stream import tell

ANALYSES = (  # the names of train/analyse/analyse.py, here without importing torch; a test compares them
    "attention", "codes", "curvature", "gradients", "path", "randomness", "representations", "sensitivity", "stability",
)  # fmt: skip


def add_commands(commands: Any) -> None:
    """Add the subcommand ``analyse``."""
    text = "look inside a model: gradients, curvature, layers, heads, codes; as JSON, NPZ and pictures"
    parser = commands.add_parser("analyse", help=text, description=text)
    parser.set_defaults(run_command=_analyse)
    parser.add_argument("run", type=option_types.path, help="a run folder, or any checkpoint")
    parser.add_argument(
        "what", nargs="+", choices=(*ANALYSES, "all"), metavar="WHAT", help=f"all, or {', '.join(ANALYSES)}"
    )
    parser.add_argument("--out", required=True, type=option_types.path, help="folder to write")
    parser.add_argument(
        "--data", nargs="+", type=option_types.path, default=[], metavar="MANIFEST",
        help="utterances to look at; default: the model's data.valid, or data.train",
    )  # fmt: skip
    parser.add_argument(
        "--noise", nargs="+", type=option_types.path, default=[], metavar="MANIFEST",
        help="noise to add; default: the model's data.noise",
    )  # fmt: skip
    parser.add_argument(
        "--against", type=option_types.path, default=None, metavar="RUN",
        help="a second model of the same shape, for path, randomness and representations",
    )  # fmt: skip
    parser.add_argument("--batches", type=option_types.whole(1, 10_000), default=4, help="batches of utterances")
    parser.add_argument(
        "--batch-seconds", type=option_types.positive("seconds", 1e6), default=60.0, help="padded audio in one batch"
    )
    parser.add_argument("--max-batch-size", type=option_types.whole(1, 2**20), default=16, help="utterances")
    parser.add_argument(
        "--memory", type=option_types.positive("GiB", 1e6), default=2.0, help="what an analysis may take, in GiB"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--seed", type=option_types.seed, default=0, help="of masks, noise and directions")
    option_types.add_overwrite(parser)


def _analyse(args: argparse.Namespace) -> None:
    import torch

    from nest_fn.train.analyse.analyse import analyse
    from nest_fn.train.analyse.subject import open_subject

    subject, dataset = open_subject(
        args.run, args.data, args.noise, against=args.against, batches=args.batches, batch_seconds=args.batch_seconds,
        max_batch_size=args.max_batch_size, seed=args.seed, memory=int(args.memory * 2**30), device=args.device,
    )  # fmt: skip
    settings = {
        name: getattr(args, name) for name in ("batches", "batch_seconds", "max_batch_size", "memory", "seed", "noise")
    }
    inputs = [args.run, *args.data, *args.noise, *([] if args.against is None else [args.against])]
    with torch.no_grad():
        for line in analyse(
            subject, dataset, args.what, Path(args.out), settings, inputs=inputs, overwrite=args.overwrite
        ):
            tell(line)

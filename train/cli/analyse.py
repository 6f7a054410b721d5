"""``nest-fn analyse``: looks inside a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nest_fn.files.quoting import shown
from nest_fn.train.errors import UsageError

from . import option_types
from .stream import tell

ANALYSES = (  # the names of train/analyse/analyse.py, here without importing torch; a test compares them
    "attention", "codes", "curvature", "gradients", "path", "probes", "randomness", "representations", "sensitivity",
    "stability",
)  # fmt: skip


def add_commands(commands: Any) -> None:
    """Add the subcommand ``analyse``."""
    text = "look inside a model: gradients, curvature, layers, probes, heads, codes; as JSON, NPZ and pictures"
    parser = commands.add_parser("analyse", help=text, description=text)
    parser.set_defaults(run_command=_analyse)
    parser.add_argument("run", type=option_types.path, help="a run folder, or any checkpoint")
    parser.add_argument("what", nargs="+", type=_what, metavar="WHAT", help=f"all, or {', '.join(ANALYSES)}")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE",
        help="e.g. trainer.device=cuda data.valid=test.jsonl data.batch_seconds=30 (default: the run's data.valid, "
        "else data.train, in batches of 60 s and 16 utterances)",
    )  # fmt: skip
    parser.add_argument("--out", required=True, type=option_types.path, help="folder to write")
    parser.add_argument(
        "--against", type=option_types.path, default=None, metavar="RUN",
        help="a second model of the same shape, for path, probes, randomness and representations",
    )  # fmt: skip
    parser.add_argument(
        "--labels", nargs="+", type=option_types.key, default=[], metavar="KEY",
        help="keys of the manifest's lines to probe for (default: speaker, label and phones, where they are)",
    )  # fmt: skip
    parser.add_argument("--batches", type=option_types.whole(1, 10_000), default=4, help="batches of utterances")
    parser.add_argument(
        "--memory", type=option_types.positive("GiB", 1e6), default=2.0, help="what an analysis may take, in GiB"
    )
    parser.add_argument("--seed", type=option_types.seed, default=0, help="of masks, noise and directions")
    option_types.add_overwrite(parser)


def _what(text: str) -> str:
    """The name of an analysis, ``all``, or a setting, which follows the names."""
    if text in (*ANALYSES, "all") or "=" in text:
        return text
    raise argparse.ArgumentTypeError(f"want all, {', '.join(ANALYSES)}, got {shown(text)}")


def _analyse(args: argparse.Namespace) -> None:
    import torch

    from nest_fn.train.analyse.analyse import analyse
    from nest_fn.train.analyse.subject import open_subject

    what, labels = ([word for word in words if "=" not in word] for words in (args.what, args.labels))
    overrides = [*(word for word in (*args.what, *args.labels) if "=" in word), *args.overrides]
    if not what:
        raise UsageError(f"analyse: want what to analyse before the settings: all, or {', '.join(ANALYSES)}.")
    subject, dataset = open_subject(
        args.run, overrides, against=args.against, labels=labels, batches=args.batches, seed=args.seed,
        memory=int(args.memory * 2**30),
    )  # fmt: skip
    settings = {"labels": labels, **{name: getattr(args, name) for name in ("batches", "memory", "seed")}}
    inputs = [
        args.run,
        *dataset.manifest.files,
        *subject.model.cfg.data.noise,
        *([] if args.against is None else [args.against]),
    ]
    with torch.no_grad():
        for line in analyse(subject, dataset, what, Path(args.out), settings, inputs=inputs, overwrite=args.overwrite):
            tell(line)

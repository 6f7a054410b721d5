"""``nest-fn data``: make, check, measure and pack manifests."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from nest_fn.config import DataConfig
from nest_fn.train.errors import DataError

from . import option_types
from .stream import show, tell


def add_commands(commands: Any) -> None:
    """Add the subcommands of ``data``."""
    data = commands.add_parser("data", help="make, check, measure and pack manifests").add_subparsers(
        required=True, metavar="ACTION"
    )
    scan = _add(data, "scan", _scan, "write a manifest of all audio below a folder")
    scan.add_argument("folder", type=option_types.path)
    scan.add_argument("manifest", type=option_types.path, help="the JSONL file to write")
    scan.add_argument("--hash", action="store_true", help="add each file's SHA-256")
    option_types.add_overwrite(scan)
    taken = _add(data, "import", _import, "make a manifest of lhotse cuts, Parquet files or a Hugging Face dataset")
    taken.add_argument(
        "source", type=option_types.path, help="lhotse manifest, Parquet file, or folder of Parquet or Arrow files"
    )
    taken.add_argument("--out", required=True, type=option_types.path, help="folder to write: manifest.jsonl, audio/")
    taken.add_argument("--audio-column", type=option_types.key, default=None, help="of a table, if several hold audio")
    option_types.add_overwrite(taken)
    check = _add(data, "validate", _validate, "decode everything and list what a run would refuse")
    check.add_argument("manifest", nargs="+", type=option_types.path)
    check.add_argument("--hash", action="store_true", help="compare each file's SHA-256")
    stats = _add(data, "stats", _stats, "hours, lengths, rates, clipping, silence, padding")
    stats.add_argument("manifest", nargs="+", type=option_types.path)
    shard = _add(data, "shard", _shard, "pack the audio into tar shards")
    shard.add_argument("manifest", nargs="+", type=option_types.path)
    shard.add_argument("--out", required=True, type=option_types.path, help="folder of the shards")
    shard.add_argument("--shards", type=option_types.whole(1, 100_000), required=True, help="how many")
    option_types.add_overwrite(shard)
    synth = _add(data, "synth", _synth, "write the synthetic speech corpus")
    synth.add_argument("out", type=option_types.path, help="folder to write")
    synth.add_argument("--seed", type=option_types.seed, default=0, help="of the corpus")
    synth.add_argument("--minutes", type=option_types.positive("minutes", 1e5), default=None, help="of training speech")
    option_types.add_overwrite(synth)


def _add(data: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = data.add_parser(name, help=text, description=text)
    parser.set_defaults(run_command=run)
    if name != "synth":
        parser.add_argument(
            "--workers", type=option_types.whole(0, 1024), default=DataConfig().num_workers,
            help="threads that read audio; 0: none (more pay where storage answers slowly)",
        )  # fmt: skip
    if name in ("validate", "stats", "shard"):
        parser.add_argument(
            "--channel", type=option_types.channel, default="error", help="error, mix, first, or an index"
        )
    if name in ("validate", "stats", "shard"):
        parser.add_argument(
            "--tar",
            action="append",
            default=[],
            type=option_types.path,
            help="tar archives that hold the audio, a_{0..7}.tar",
        )
    return parser


def _data_config(args: argparse.Namespace) -> DataConfig:
    return DataConfig(channel=args.channel, min_duration=0.0, max_duration=1e9, num_workers=args.workers)


def _scan(args: argparse.Namespace) -> int:
    from nest_fn.train.data.corpus_tools import scan

    report = scan(args.folder, args.manifest, workers=args.workers, hashes=args.hash, overwrite=args.overwrite)
    for problem in report.problems:
        tell(problem)
    tell(f"{report.checked - len(report.problems)} files in {args.manifest}, {len(report.problems)} left out")
    return DataError.exit_code if report.problems else 0


def _import(args: argparse.Namespace) -> int:
    from nest_fn.train.data.imports.write import MANIFEST, import_corpus

    report = import_corpus(args.source, args.out, column=args.audio_column, overwrite=args.overwrite)
    for problem in report.problems:
        tell(problem)
    lines = report.checked - len(report.problems)
    tell(f"{lines} utterances in {args.out}/{MANIFEST}, {len(report.problems)} left out")
    return DataError.exit_code if report.problems else 0


def _validate(args: argparse.Namespace) -> int:
    from nest_fn.train.data.corpus_tools import validate

    report = validate(args.manifest, _data_config(args), hashes=args.hash, shards=args.tar)
    for problem in report.problems:
        show(problem)
    unknown = f", {report.without_hash} lines without sha256" if args.hash and report.without_hash else ""
    show(f"{report.checked} utterances, {len(report.problems)} problems{unknown}")
    return 0 if report.ok else DataError.exit_code


def _stats(args: argparse.Namespace) -> None:
    from nest_fn.train.data.corpus_tools import stats

    show(json.dumps(stats(args.manifest, _data_config(args), shards=args.tar), indent=1))


def _shard(args: argparse.Namespace) -> None:
    from nest_fn.train.data.corpus_tools import shard

    tell(str(shard(args.manifest, _data_config(args), args.out, args.shards, tar=args.tar, overwrite=args.overwrite)))


def _synth(args: argparse.Namespace) -> None:
    from nest_fn.train.data.synth import CorpusSpec, write_corpus

    spec = CorpusSpec(seed=args.seed)
    if args.minutes is not None:
        spec = dataclasses.replace(spec, train_minutes=args.minutes)
    for split, path in write_corpus(args.out, spec, overwrite=args.overwrite).items():
        tell(f"{split}: {path}")

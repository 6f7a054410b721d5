"""Commands about a trained model: ``convert``, ``export``, ``extract``, ``tokenize``, ``probe``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nest_fn.train.errors import UsageError

from . import option_types
from .stream import show, tell


def add_commands(commands: Any) -> None:
    """Add the subcommands."""
    convert = _add(commands, "convert", _convert, "any checkpoint to another kind: ours, .nemo, one file")
    convert.add_argument(
        "source",
        type=option_types.path,
        help="a checkpoint, ours or the reference's (.nemo, .ckpt, .pt), or a run folder",
    )
    convert.add_argument("target", type=option_types.path, help="a folder, .safetensors, .pt or .nemo")
    convert.add_argument("--compat", choices=("current", "legacy"), default=None, help="numerics of the reference")
    option_types.add_overwrite(convert)
    export = _add(commands, "export", _export, "the encoder as a graph that runs without this library")
    export.add_argument("checkpoint", type=option_types.path, help="a checkpoint, or a run folder: its newest")
    export.add_argument(
        "out", type=option_types.path, help="a file .onnx (wants the extra export) or .pt2 (torch.export)"
    )
    export.add_argument("--source", choices=("features", "audio"), default="features", help="what the graph takes")
    export.add_argument("--static", action="store_true", help="one utterance of ten seconds, not any batch and length")
    option_types.add_overwrite(export)
    extract = _add(commands, "extract", _extract, "write a model's features, a file for each utterance")
    _add_model_arguments(extract)
    extract.add_argument("--layers", type=option_types.layers, default="last", help="all, last, or numbers as 0,3,-1")
    extract.add_argument(
        "--weights", type=option_types.weights, default=None, help="sum the layers up with these weights, as 0.2,0.8"
    )
    extract.add_argument(
        "--level", choices=("frame", "utterance"), default="frame", help="features of each frame, or their mean"
    )
    extract.add_argument("--format", choices=("npy", "npz", "safetensors"), default="npy", help="of the files")
    tokenize = _add(commands, "tokenize", _tokenize, "write the quantizer's tokens and the decoder's guesses")
    _add_model_arguments(tokenize)
    tokenize.add_argument("--format", choices=("npy", "npz", "safetensors"), default="npz", help="of the files")
    probe = _add(commands, "probe", _probe, "accuracy of a linear probe on a trained encoder")
    probe.add_argument("checkpoint", type=option_types.path, help="a checkpoint, or a run folder: its newest")
    probe.add_argument(
        "--label", required=True, type=option_types.key, help="key of the manifests' lines, e.g. speaker"
    )
    probe.add_argument("--train", nargs="+", required=True, type=option_types.path, metavar="MANIFEST")
    probe.add_argument("--test", nargs="+", required=True, type=option_types.path, metavar="MANIFEST")


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run_command=run)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=option_types.path, help="a checkpoint, or a run folder: its newest")
    parser.add_argument("source", type=option_types.path, help="a manifest, a folder of audio, or one audio file")
    parser.add_argument("--out", required=True, type=option_types.path, help="folder to write")
    option_types.add_overwrite(parser)
    parser.add_argument(
        "--batch-seconds", type=option_types.positive("seconds", 1e6), default=60.0, help="padded audio in one batch"
    )
    parser.add_argument("--max-batch-size", type=option_types.whole(1, 2**20), default=256, help="utterances")


def _convert(args: argparse.Namespace) -> None:
    from nest_fn.interop.convert import convert

    convert(args.source, args.target, compat=args.compat, overwrite=args.overwrite)
    tell(f"written to {args.target}")


def _export(args: argparse.Namespace) -> None:
    from nest_fn.errors import ExportError
    from nest_fn.files.outputs import claim, written
    from nest_fn.interop.convert import model_digest
    from nest_fn.interop.export import check_target, export_encoder, export_onnx
    from nest_fn.train.downstream.inference import load_model
    from nest_fn.version import versions

    try:
        suffix = check_target(args.out)
    except ExportError as error:
        raise UsageError(str(error)) from error
    model = load_model(args.checkpoint)
    origin = {"command": "export", "model": model_digest(*model), "source": args.source, "static": args.static}
    place = claim(args.out, origin | versions(), folder=False, inputs=[args.checkpoint], overwrite=args.overwrite)
    if not place.done:
        with written(place) as temporary:
            if suffix == ".onnx":
                export_onnx(temporary, *model, dynamic=not args.static, source=args.source)
            else:
                export_encoder(*model, temporary, dynamic=not args.static, source=args.source)
    tell(f"written to {args.out}")


@contextmanager
def _opened(args: argparse.Namespace) -> Iterator[tuple[Any, Any]]:
    """Open model and dataset; the temporary manifest of a folder or file exists until the block ends."""
    from nest_fn.train.downstream.inference import load_model, open_audio

    model = load_model(args.checkpoint)
    with TemporaryDirectory() as scratch:
        yield (
            model,
            open_audio(
                args.source,
                model.cfg,
                Path(scratch),
                batch_seconds=args.batch_seconds,
                max_batch_size=args.max_batch_size,
            ),
        )


def _extract(args: argparse.Namespace) -> None:
    from nest_fn.train.downstream.extract import extract

    with _opened(args) as (model, dataset):
        written = sum(1 for _ in extract(
            model, dataset, Path(args.out), layers=args.layers, weights=args.weights, level=args.level,
            form=args.format, overwrite=args.overwrite,
        ))  # fmt: skip
        _tell(written, dataset, args.out)


def _tokenize(args: argparse.Namespace) -> None:
    from nest_fn.train.downstream.extract import tokenize

    with _opened(args) as (model, dataset):
        made = tokenize(model, dataset, Path(args.out), form=args.format, overwrite=args.overwrite)
        _tell(sum(1 for _ in made), dataset, args.out)


def _tell(written: int, dataset: Any, out: str) -> None:
    total = len(dataset.manifest)
    tell(f"{written} files written to {out}, {total - written} were there already")


def _probe(args: argparse.Namespace) -> None:
    from nest_fn.train.downstream.utterance_probe import probe_labels

    for score in probe_labels(args.checkpoint, args.label, args.train, args.test):
        details = f"(layer {score.layer}, {score.held_back:.3f} on utterances held back)"
        show(f"{score.name:<10} {args.label} accuracy {score.test:.3f}  {details}")

"""Commands that apply a trained model to audio: ``extract``, ``tokenize``, ``probe``, ``transcribe``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nest_fn.train.errors import UsageError

from . import option_types
from .stream import is_distributed, joined_ranks, show, tell

if TYPE_CHECKING:
    from nest_fn.files.outputs import Place
    from nest_fn.train.ctc.model_files import Recogniser
    from nest_fn.train.data.dataset import Dataset


def add_commands(commands: Any) -> None:
    """Add the subcommands."""
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
    _add_overrides(probe)
    probe.add_argument(
        "--label", required=True, type=option_types.key, help="key of the manifests' lines, e.g. speaker"
    )
    probe.add_argument("--train", nargs="+", required=True, type=option_types.path, metavar="MANIFEST")
    probe.add_argument("--test", nargs="+", required=True, type=option_types.path, metavar="MANIFEST")
    _add_transcribe(commands)


def _add_transcribe(commands: Any) -> None:
    text = "write what is said in audio, with the times of the tokens"
    parser = commands.add_parser("transcribe", help=text, description=text)
    parser.set_defaults(run_command=_transcribe)
    parser.add_argument("checkpoint", type=option_types.path, help="run folder of finetune-ctc (its best model)")
    parser.add_argument("source", type=option_types.path, help="a manifest, a folder of audio, or one audio file")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. trainer.device=cuda data.num_workers=8")
    parser.add_argument("--out", type=option_types.path, default=None, help="JSONL to write; default: standard output")
    parser.add_argument(
        "--beam", type=option_types.whole(2, 100_000), default=None, metavar="WIDTH",
        help="beam search with so many hypotheses (extra beam), instead of greedy decoding",
    )  # fmt: skip
    option_types.add_overwrite(parser)


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run_command=run)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=option_types.path, help="a checkpoint, or a run folder: its newest")
    parser.add_argument("source", type=option_types.path, help="a manifest, a folder of audio, or one audio file")
    parser.add_argument("--out", required=True, type=option_types.path, help="folder to write")
    _add_overrides(parser)
    option_types.add_overwrite(parser)
    parser.add_argument(
        "--batch-seconds",
        type=option_types.positive("seconds", 1e6),
        default=None,
        help="padded audio in one batch (60)",
    )
    parser.add_argument("--max-batch-size", type=option_types.whole(1, 2**20), default=None, help="utterances (256)")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. trainer.device=cuda data.num_workers=8")


def _settings(args: argparse.Namespace) -> list[str]:
    """The overrides, with the options of batches as overrides."""
    options = {"data.batch_seconds": args.batch_seconds, "data.max_batch_size": args.max_batch_size}
    return [*(f"{key}={value}" for key, value in options.items() if value is not None), *args.overrides]


def _apply(
    args: argparse.Namespace, command: str, write: Callable[..., Iterator[str]], **options: Any
) -> int:  # fmt: skip
    """Open model and audio, and write a file for each utterance, alone or as one of several ranks; the exit code."""
    from nest_fn.train.downstream.inference import Job, load_model, open_audio, place
    from nest_fn.train.downstream.settings import inference_config, seconds_per_frame
    from nest_fn.train.reporter import NullReporter
    from nest_fn.train.run.device import prepare_device
    from nest_fn.train.signals import stop_requests

    from .console import ConsoleReporter

    model = load_model(args.checkpoint)
    timeouts = ("trainer.rank_timeout_s", "trainer.collective_timeout_s")
    cfg = inference_config(command, model.cfg, _settings(args), timeouts, min_audio=seconds_per_frame(model.cfg))
    with joined_ranks(cfg) as launched, TemporaryDirectory() as scratch, stop_requests() as stop:
        model = place(model, cfg, prepare_device(cfg, launched))
        dataset = open_audio(args.source, cfg, Path(scratch), data=cfg.data)
        reporter = ConsoleReporter() if launched.ranks.is_main else NullReporter()
        job = Job(launched.ranks, lambda: stop.asked, reporter)
        made = write(model, dataset, Path(args.out), form=args.format, overwrite=args.overwrite, job=job, **options)
        written = sum(1 for _ in made)
        if launched.ranks.any(stop.asked):
            reporter.say("asked to stop: what was written stays, and the same command goes on from there")
            return stop.exit_code
        _tell_written(written, dataset, args.out)
    return 0


def _extract(args: argparse.Namespace) -> int:
    from nest_fn.train.downstream.extract import extract

    return _apply(args, "extract", extract, layers=args.layers, weights=args.weights, level=args.level)


def _tokenize(args: argparse.Namespace) -> int:
    from nest_fn.train.downstream.extract import tokenize

    return _apply(args, "tokenize", tokenize)


def _tell_written(written: int, dataset: Any, out: str) -> None:
    if is_distributed():
        return tell(f"{written} files written to {out} by this rank")
    total = len(dataset.manifest)
    return tell(f"{written} files written to {out}, {total - written} were there already")


def _take_settings(args: argparse.Namespace, *lists: str) -> None:
    """Move KEY=VALUE, which options that take several words have swallowed, from these to the overrides."""
    for name in lists:
        words = getattr(args, name)
        settings = [word for word in words if "=" in word and not Path(word).exists()]
        args.overrides = [*args.overrides, *settings]
        setattr(args, name, [word for word in words if word not in settings])
        if not getattr(args, name):
            raise UsageError(f"probe: --{name} wants one or more manifests.")


def _probe(args: argparse.Namespace) -> int:
    from nest_fn.train.downstream.utterance_probe import probe_labels
    from nest_fn.train.signals import Stopped, stop_requests

    from .console import ConsoleReporter

    if is_distributed():
        raise UsageError("probe: runs in one process; start it without torchrun.")
    _take_settings(args, "train", "test")
    reporter = ConsoleReporter()
    with stop_requests() as stop:
        try:
            with stop.at_once():
                for score in probe_labels(args.checkpoint, args.label, args.train, args.test, args.overrides, reporter):
                    details = f"(layer {score.layer}, {score.held_back:.3f} on utterances held back)"
                    show(f"{score.name:<10} {args.label} accuracy {score.test:.3f}  {details}")
        except Stopped:
            reporter.say("asked to stop: nothing is kept")
            return stop.exit_code
    return 0


def _transcribe(args: argparse.Namespace) -> int:
    from nest_fn.layers.tree import tree_map
    from nest_fn.train.ctc.model_files import load_recogniser
    from nest_fn.train.downstream.inference import open_audio
    from nest_fn.train.downstream.settings import inference_config
    from nest_fn.train.run.device import prepare_device

    if is_distributed():
        raise UsageError("transcribe: runs in one process; start it without torchrun, on a part of the audio each.")
    made, _ = load_recogniser(args.checkpoint)
    cfg = inference_config("transcribe", made.cfg, args.overrides)
    device = prepare_device(cfg)
    trees = (tree_map(lambda leaf: leaf.to(device), tree) for tree in (made.params, made.state, made.head))
    made = made._replace(**dict(zip(("params", "state", "head"), trees, strict=True)), cfg=cfg)
    with TemporaryDirectory() as scratch:
        dataset = open_audio(args.source, cfg, Path(scratch), data=cfg.data)
        return _transcribe_all(args, made, dataset)


def _transcribe_all(args: argparse.Namespace, made: Recogniser, dataset: Dataset) -> int:
    from nest_fn.train.ctc.decode import beam_search, greedy
    from nest_fn.train.downstream.inference import Job
    from nest_fn.train.downstream.transcribe import FoundLines, finished_lines, transcribe
    from nest_fn.train.signals import stop_requests

    from .console import ConsoleReporter

    reporter = ConsoleReporter()
    decode = greedy if args.beam is None else beam_search(made.tokenizer, args.beam)
    place = None if args.out is None else _transcript_place(args, made, dataset)
    if place is not None and place.done:
        tell(f"{args.out} holds the same transcription, finished")
        return 0
    kept = None if place is None else FoundLines(place)
    found = {} if kept is None else kept.read()
    with stop_requests() as stop:
        job = Job(stopped=lambda: stop.asked, reporter=reporter)
        for index, line in transcribe(made, dataset, decode, done=found, job=job):
            found[index] = line
            if kept is not None:
                kept.add(index, line)
        if stop.asked:
            rest = "nothing is kept" if kept is None else "the same command goes on from there"
            reporter.say(f"asked to stop after {len(found)} of {len(dataset.manifest)} utterances; {rest}")
            return stop.exit_code
    lines = finished_lines(found)
    if place is None or kept is None:
        for line in lines:
            show(json.dumps(line, ensure_ascii=False))
    else:
        kept.finish(place, lines)
    _tell_rates(lines, args.out, reporter)
    return 0


def _transcript_place(args: argparse.Namespace, made: Recogniser, dataset: Dataset) -> Place:
    from nest_fn.files.outputs import claim
    from nest_fn.interop.convert import model_digest
    from nest_fn.train.downstream.settings import lasting_settings, model_alone
    from nest_fn.version import versions

    params = {"encoder": made.params["encoder"], "head": made.head}
    origin = {
        "command": "transcribe", "model": model_digest(params, made.state, model_alone(made.cfg)), "beam": args.beam,
        "data": dataset.manifest.digest, **lasting_settings(made.cfg), **versions(),
    }  # fmt: skip
    inputs = [args.checkpoint, *dataset.manifest.files]
    return claim(args.out, origin, folder=False, inputs=inputs, overwrite=args.overwrite)


def _tell_rates(lines: list[dict[str, Any]], out: str | None, reporter: Any) -> None:
    """Error rates where texts were given: on standard output, unless the lines are there."""
    from nest_fn.train.downstream.transcribe import rates

    errors, scored = rates(lines)
    say = reporter.say if out is None else tell
    if out is not None:
        tell(f"{len(lines)} utterances written to {out}")
    if scored:
        say(f"CER {errors.cer:.4f}  WER {errors.wer:.4f}  over {scored} utterances, {errors.words:,} words")

"""Commands about what runs left: ``convert`` and ``export`` models, ``replay``, ``verify`` and ``diff`` steps."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nest_fn.train.errors import EXIT_FAILURE, NonFiniteError, UsageError

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
    export = _add(
        commands, "export", _export, "the encoder as a graph, or for transformers, to run without this library"
    )
    export.add_argument("checkpoint", type=option_types.path, help="a checkpoint, or a run folder: its newest")
    export.add_argument(
        "out", type=option_types.path, help="a file .onnx (wants the extra export) or .pt2 (torch.export), or a folder"
    )
    export.add_argument(
        "--format",
        choices=("graph", "hf"),
        default="graph",
        help="graph: .onnx or .pt2 by the name; hf: a folder for transformers' ParakeetEncoder (extra export)",
    )
    export.add_argument("--source", choices=("features", "audio"), default=None, help="what a graph takes (features)")
    export.add_argument("--static", action="store_true", help="one utterance of ten seconds, not any batch and length")
    option_types.add_overwrite(export)
    replay = _add(commands, "replay", _replay, "make one step of a run again and look into it; nothing is written")
    replay.add_argument("run", type=option_types.path, help="run folder")
    replay.add_argument(
        "step",
        type=option_types.whole(0, 10**18 - 1),
        help="updates done before the one to look at, as messages name it",
    )
    _add_overrides(replay)
    _add_verify(commands)
    _add_diff(commands)
    _add_report(commands)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. trainer.compile=off trainer.device=cpu")


def _add_verify(commands: Any) -> None:
    text = "make a part of a run again and compare it with what was recorded, bit by bit; exit code 1 if it differs"
    verify = _add(commands, "verify", _verify, text)
    verify.add_argument("run", type=option_types.path, help="run folder")
    steps = option_types.whole(0, 10**18 - 1)
    verify.add_argument(
        "--from", dest="start", type=steps, default=None, metavar="STEP",
        help="updates done before the part (default: the last checkpoint but one, else 0)",
    )  # fmt: skip
    verify.add_argument(
        "--steps", type=option_types.whole(1, 10**18 - 1), default=None, metavar="N",
        help="updates to make again (default: up to the next checkpoint)",
    )  # fmt: skip
    _add_overrides(verify)


def _add_diff(commands: Any) -> None:
    text = "where two runs part: settings, data, versions, first step and tensor; exit code 1 if they do"
    diff = _add(commands, "diff", _diff, text)
    diff.add_argument("first", type=option_types.path, help="run folder")
    diff.add_argument("second", type=option_types.path, help="another one")
    diff.add_argument(
        "--rerun", action="store_true", help="make both again side by side, up to the first update that differs"
    )
    _add_overrides(diff)


def _add(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run_command=run)
    return parser


def _add_report(commands: Any) -> None:
    text = "runs as one HTML page: verdict, curves, codes, utterances to hear, settings (wants the extra report)"
    report = _add(commands, "report", _report, text)
    report.add_argument(
        "runs", nargs="+", type=option_types.path, metavar="RUN",
        help="run folders, finished or not; then KEY=VALUE, e.g. data.root=/corpus trainer.device=cpu",
    )  # fmt: skip
    report.add_argument("--out", required=True, type=option_types.path, help="the HTML file to write")
    report.add_argument("--utterances", type=option_types.whole(0, 20), default=3, help="to show of each run")
    report.add_argument(
        "--analyses", nargs="+", default=[], type=option_types.path, metavar="PATH",
        help="files or folders of nest-fn analyse to show: JSON, PNG",
    )  # fmt: skip
    option_types.add_overwrite(report)


def _convert(args: argparse.Namespace) -> None:
    from nest_fn.interop.convert import convert

    convert(args.source, args.target, compat=args.compat, overwrite=args.overwrite)
    tell(f"written to {args.target}")


def _export(args: argparse.Namespace) -> None:
    if args.format == "hf":
        return _export_huggingface(args)
    from nest_fn.errors import ExportError
    from nest_fn.files.outputs import written
    from nest_fn.interop.export import check_target, export_encoder, export_onnx
    from nest_fn.train.downstream.inference import load_model

    source: Any = args.source or "features"
    try:
        suffix = check_target(args.out)
    except ExportError as error:
        raise UsageError(str(error)) from error
    model = load_model(args.checkpoint)
    place = _claim_export(args, model, {"source": source, "static": args.static}, folder=False)
    if not place.done:
        with written(place) as temporary:
            if suffix == ".onnx":
                export_onnx(temporary, *model, dynamic=not args.static, source=source)
            else:
                export_encoder(*model, temporary, dynamic=not args.static, source=source)
    tell(f"written to {args.out}")


def _export_huggingface(args: argparse.Namespace) -> None:
    from nest_fn.errors import ExportError
    from nest_fn.files.outputs import written
    from nest_fn.files.tensors import size_of
    from nest_fn.interop.huggingface import check_huggingface, write_huggingface
    from nest_fn.layers.tree import flatten
    from nest_fn.train.downstream.inference import load_model

    given = [name for name, value in (("--source", args.source), ("--static", args.static)) if value]
    if given:
        raise UsageError(f"export: {given[0]} has no effect with --format hf; leave it out.")
    model = load_model(args.checkpoint)
    try:
        check_huggingface(model.cfg)
    except ExportError as error:
        raise UsageError(str(error)) from error
    place = _claim_export(args, model, {"format": "hf"}, folder=True)
    if not place.done:
        with written(place, size_of(flatten(model.params["encoder"]))) as temporary:
            other = write_huggingface(temporary, *model)
        if other is not None:
            tell(f"no feature extractor was written: ParakeetFeatureExtractor has no {other}; use nest_fn.log_mel")
    tell(f"written to {args.out}")


def _claim_export(args: argparse.Namespace, model: Any, settings: dict[str, Any], folder: bool) -> Any:
    from nest_fn.files.outputs import claim
    from nest_fn.interop.convert import model_digest
    from nest_fn.version import versions

    origin = {"command": "export", "model": model_digest(*model), **settings, **versions()}
    return claim(args.out, origin, folder=folder, inputs=[args.checkpoint], overwrite=args.overwrite)


def _replay(args: argparse.Namespace) -> int:
    from nest_fn.train.commands.replay import replay, report

    from .console import ConsoleReporter

    found = replay(args.run, args.step, args.overrides, ConsoleReporter())
    for line in report(found):
        show(line)
    return 0 if found.finite else NonFiniteError.exit_code


def _verify(args: argparse.Namespace) -> int:
    from nest_fn.train.rerun.verdict import surroundings, verdict
    from nest_fn.train.rerun.verify import verify

    from .console import ConsoleReporter

    found = []
    for one in verify(Path(args.run), args.start, args.steps, args.overrides, ConsoleReporter()):
        show(f"step {one.step}: {one.text}")
        found.append(one)
    for line in verdict(found, surroundings(Path(args.run)), args.overrides):
        show(line)
    return 0 if all(one.equal for one in found) else EXIT_FAILURE


def _diff(args: argparse.Namespace) -> int:
    from nest_fn.train.rerun.diff import diff, first_differing_update

    from .console import ConsoleReporter

    folders = Path(args.first), Path(args.second)
    found = list(diff(*folders))
    if args.rerun:
        found.append(first_differing_update(*folders, args.overrides, ConsoleReporter()))
    words = {True: "equal", False: "different", None: "not compared"}
    for one in found:
        show(f"{one.what}: {words[one.equal]}")
        for line in one.lines:
            show(f"  {line}")
    return EXIT_FAILURE if any(one.equal is False for one in found) else 0


def _report(args: argparse.Namespace) -> None:
    from nest_fn.files.outputs import claim, written
    from nest_fn.train.report.record import read_records
    from nest_fn.train.report.write import make_report, origin_of

    from .console import ConsoleReporter

    folders = [Path(word) for word in args.runs if "=" not in word or Path(word).is_dir()]
    overrides = [word for word in args.runs if "=" in word and not Path(word).is_dir()]
    if not folders:
        raise UsageError("report: want a run folder or several, got only settings; give the folders first.")
    records, analyses = read_records(folders), [Path(path) for path in args.analyses]
    origin = origin_of(records, overrides, args.utterances) | {"analyses": args.analyses}
    place = claim(args.out, origin, folder=False, inputs=[*folders, *analyses], overwrite=args.overwrite)
    if not place.done:
        made = make_report(records, overrides, args.utterances, analyses, ConsoleReporter())
        with written(place, len(made)) as temporary:
            temporary.write_text(made, encoding="utf-8")
    tell(f"written to {args.out}")

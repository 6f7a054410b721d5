"""``nest-fn finetune-ctc``: trains a speech recogniser from a pre-trained encoder."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from nest_fn.train.errors import UsageError

from . import option_types

_TOKENS = (
    "characters, or a file: a SentencePiece .model, a tokenizers .json, or one token a line; default: SentencePiece "
    "pieces of the transcripts (extra text)"
)


def add_commands(commands: Any) -> None:
    """Add the subcommand ``finetune-ctc``."""
    text = "fine-tune an encoder by CTC on a manifest with text"
    parser = commands.add_parser("finetune-ctc", help=text, description=text)
    parser.set_defaults(run_command=_finetune)
    parser.add_argument(
        "checkpoint", type=option_types.path, help="any checkpoint, ours or the reference's, or a run folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="data.train=a.jsonl data.valid=b.jsonl ...")
    parser.add_argument(
        "--out", required=True, type=option_types.path, help="run folder: curves, checkpoints, the best model"
    )
    option_types.add_overwrite(parser)
    _add_token_options(parser)
    parser.add_argument("--from-scratch", action="store_true", help="random weights instead of the checkpoint's")
    parser.add_argument(
        "--frozen-steps",
        type=option_types.whole_or_all(0),
        default=0,
        help="first steps in which only the head learns, or all",
    )
    parser.add_argument(
        "--encoder-lr",
        type=option_types.positive("times optim.lr", 1e6),
        default=1.0,
        help="learning rate of the encoder, as a multiple of that of the head",
    )
    parser.add_argument(
        "--layer",
        type=option_types.layer,
        default=-1,
        help="layer whose frames the head reads, -1 the last, or weighted: a learned sum of all",
    )
    _add_mask_options(parser)


def _add_token_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=option_types.path, default=None, help=_TOKENS)
    parser.add_argument(
        "--pieces",
        type=option_types.whole(2, 2**20),
        default=None,
        help="number of pieces; default: the fewest with which 99 %% of the lines fit their frames",
    )
    parser.add_argument(
        "--most-left-out",
        type=option_types.fraction,
        default=0.25,
        metavar="FRACTION",
        help="fraction of the lines that may be left out, as their text does not fit their frames",
    )


def _add_mask_options(parser: argparse.ArgumentParser) -> None:
    """SpecAugment; the names say what each mask covers."""
    masks = (("time", 25, "frames of 10 ms"), ("freq", 15, "mel bins"))
    for name, width, unit in masks:
        parser.add_argument(
            f"--{name}-masks",
            type=option_types.whole(0, 1000),
            default=0,
            metavar="N",
            help=f"SpecAugment: masks over {unit} in each utterance",
        )
        parser.add_argument(
            f"--{name}-width",
            type=option_types.whole(1, 10**6),
            default=width,
            metavar="N",
            help=f"SpecAugment: widest mask, {unit}",
        )
    parser.add_argument(
        "--time-share",
        type=option_types.fraction,
        default=0.05,
        metavar="FRACTION",
        help="SpecAugment: widest mask over time, as a fraction of the utterance",
    )


def _finetune(args: argparse.Namespace) -> int:
    from nest_fn.train.ctc.recogniser import Design
    from nest_fn.train.ctc.spec_augment import SpecAugment
    from nest_fn.train.ctc.step import Recipe
    from nest_fn.train.downstream.inference import load_model
    from nest_fn.train.finetune.prepare import Request
    from nest_fn.train.finetune.run import finetune
    from nest_fn.train.finetune.settings import finetune_config
    from nest_fn.train.run.record.log_file import LogFile
    from nest_fn.train.run.record.run_folder import RunFolder

    from .console import ConsoleReporter
    from .stream import joined_ranks

    model = load_model(args.checkpoint)
    cfg = finetune_config(model.cfg, args.overrides, args.from_scratch)
    if args.pieces is not None and args.tokens is not None:
        raise UsageError("finetune-ctc: --pieces is for pieces of the transcripts; with --tokens leave it out.")
    masks = SpecAugment(args.time_masks, args.time_width, args.time_share, args.freq_masks, args.freq_width)
    frozen = None if args.frozen_steps == "all" else args.frozen_steps
    recipe = Recipe(Design(_layer(args.layer, cfg)), frozen, args.encoder_lr, masks)
    request = Request(args.tokens, args.pieces, args.most_left_out, args.from_scratch)
    log = LogFile(RunFolder(args.out).log(int(os.environ.get("RANK", "0"))))
    with joined_ranks(cfg, log) as job:
        return finetune(
            (model.params, model.state),
            cfg,
            request,
            recipe,
            Path(args.out),
            ConsoleReporter(),
            inputs=[args.checkpoint],
            overwrite=args.overwrite,
            command=[shlex.quote(word) for word in sys.argv],
            job=job,
        )


def _layer(asked: int | str, cfg: Any) -> int | None:
    """The layer's number from 0; None for a weighted sum. Raises ``UsageError``."""
    from nest_fn.hidden_states import layer_numbers

    last = cfg.encoder.n_layers - 1
    try:
        number = None if asked == "weighted" else layer_numbers(cfg.encoder.n_layers, [int(asked)])[0]
    except ValueError as error:
        raise UsageError(f"finetune-ctc: --layer {asked}: {error}") from error
    if cfg.encoder.reduction and number != last:
        raise UsageError("finetune-ctc: --layer: below encoder.reduction layers differ in length; use the last.")
    return number

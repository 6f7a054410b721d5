"""``nest-fn finetune-ctc``: trains a speech recogniser from a pre-trained encoder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nest_fn.files.quoting import shown
from nest_fn.train.errors import UsageError

from . import option_types
from .stream import tell

if TYPE_CHECKING:
    from nest_fn.config import Config

# Settings in which fine-tuning differs from pre-training; overrides on the command line take precedence.
_RECIPE = (
    "optim.name=adamw", "optim.lr=1e-3", "optim.sched.name=cosine", "optim.sched.warmup_ratio=0.1",
    "optim.sched.warmup_steps=null", "optim.sched.max_steps=null", "optim.sched.min_lr=1e-6", "trainer.max_steps=1000",
    "trainer.valid_every=200", "trainer.clip_norm=1.0", "data.noise=[]", "data.rir=[]", "data.weights=null",
)  # fmt: skip


# Trainer settings that fine-tuning uses, settings that it ignores, and those that may differ from the checkpoint's.
_USED = ("trainer.max_steps", "trainer.valid_every", "trainer.clip_norm")
_WITHOUT_EFFECT = ("trainer.", "data.noise", "data.rir", "data.augment.")
_FREE = (
    "data.", "optim.", "trainer.", "encoder.dropout", "encoder.stochastic_depth", "encoder.use_pytorch_sdpa",
    "preprocessor.dither", "preprocessor.nb_",
)  # fmt: skip


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
        "--out", required=True, type=option_types.path, help="folder to write: the model, its head, metrics"
    )
    parser.add_argument(
        "--frozen-steps", type=option_types.whole(0), default=0, help="steps in which only the head learns"
    )
    parser.add_argument(
        "--tokens",
        type=option_types.path,
        default=None,
        help="a file with one token a line; default: the text's characters",
    )
    parser.add_argument("--scratch", action="store_true", help="random weights instead of the checkpoint's, to compare")
    option_types.add_overwrite(parser)
    parser.add_argument(
        "--seed", type=option_types.seed, default=0, help="of the head, and of the encoder from scratch"
    )


def _finetune(args: argparse.Namespace) -> None:
    from nest_fn.checkpoint.folder import META, own_checkpoint, read_meta, write_checkpoint
    from nest_fn.config.writer import to_text
    from nest_fn.files.atomic import anything, atomic_write
    from nest_fn.files.outputs import begin, claim, finish
    from nest_fn.interop.convert import model_digest
    from nest_fn.layers import random
    from nest_fn.model import init
    from nest_fn.train.downstream.ctc import finetune, read_tokens
    from nest_fn.train.downstream.inference import load_model
    from nest_fn.train.run.device import keep_freed_memory
    from nest_fn.version import versions

    keep_freed_memory()
    model = load_model(args.checkpoint)
    cfg = model.cfg.override(*_RECIPE, *args.overrides)
    _check_overrides(model.cfg.override(*_RECIPE), cfg, args.scratch)
    params, state = (model.params, model.state) if not args.scratch else init(random.key(args.seed), cfg)
    tokens = None if args.tokens is None else read_tokens(args.tokens)
    steps = finetune(params, state, cfg, frozen_steps=args.frozen_steps, tokens=tokens, seed=args.seed)
    out = Path(args.out)
    facts = {"config": to_text(cfg.to_dict()), "tokens": tokens, "seed": args.seed, "frozen_steps": args.frozen_steps}
    origin = {"command": "finetune-ctc", "model": model_digest(params, state, cfg), **facts, **versions()}
    inputs = [args.checkpoint, *cfg.data.train, *cfg.data.valid]
    place = claim(out, origin, folder=True, inputs=inputs, overwrite=args.overwrite)
    if place.done:
        return tell(f"{out} holds the same fine-tuning, finished")
    begin(place)
    lines = []
    for step, rates, made in steps:
        lines.append({"step": step, **rates._asdict()})
        with atomic_write(out / "metrics.jsonl", 0, replaces=anything) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        trees = {"params": made.params, "state": made.state, "head": made.head}
        meta = {"step": step, "tokens": list(made.alphabet.tokens)}
        write_checkpoint(out / "model", trees, cfg.to_dict(), meta, replaces=own_checkpoint)
        tell(f"step {step}/{cfg.trainer.max_steps}  loss {rates.loss:.4f}  CER {rates.cer:.3f}  WER {rates.wer:.3f}")
    finish(place, ["metrics.jsonl", f"model/{META}", *(f"model/{name}" for name in read_meta(out / "model")["files"])])


def _check_overrides(before: Config, after: Config, scratch: bool) -> None:
    """Raise ``UsageError`` for an override that has no effect or changes the architecture of the checkpoint's model."""
    from nest_fn.layers.tree import flatten

    old, new = flatten(before.to_dict()), flatten(after.to_dict())
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) == new.get(key):
            continue
        if key.startswith(_WITHOUT_EFFECT) and key not in _USED:
            raise UsageError(f"finetune-ctc: {key} has no effect on fine-tuning; leave it out.")
        if not scratch and not key.startswith(_FREE):
            raise UsageError(
                f"finetune-ctc: {key} is {shown(new.get(key))}, the checkpoint's model has {shown(old.get(key))}; "
                "leave it out, or start from random weights with --scratch."
            )

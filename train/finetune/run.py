"""A fine-tuning run from its data to its best model: judge, claim the folder, go on or begin, train, finish."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from nest_fn.checkpoint import retention
from nest_fn.checkpoint.folder import META, read_meta
from nest_fn.checkpoint.model_files import check_trees
from nest_fn.config import Config
from nest_fn.files.atomic import anything, atomic_write
from nest_fn.files.outputs import Place, begin, claim, finish
from nest_fn.layers import random
from nest_fn.layers.tree import tree_map
from nest_fn.layers.types import Params, State
from nest_fn.mel import make_tables
from nest_fn.model import init
from nest_fn.parts import EAGER
from nest_fn.train.ctc.model_files import MODEL
from nest_fn.train.ctc.recogniser import init_head
from nest_fn.train.ctc.step import Recipe, start
from nest_fn.train.ctc.tokens import Tokenizer
from nest_fn.train.ctc.transcripts import training_transcripts, validation_transcripts
from nest_fn.train.distributed.launch import Job
from nest_fn.train.keys import init_key, root_key
from nest_fn.train.reporter import NullReporter, Reporter
from nest_fn.train.run.device import is_compiled, prepare_device
from nest_fn.train.run.inductor import inductor
from nest_fn.train.run.record.log_file import LogFile, logged
from nest_fn.train.run.record.run_folder import RunFolder
from nest_fn.train.run.record.tensorboard import Board
from nest_fn.train.signals import StopRequest, stop_requests
from nest_fn.train.step.compiled import compile_parts

from .context import FinetuneRun
from .loop import is_finished, train
from .prepare import Request, choose_tokenizer, open_split, origin_of, tokenizer_path
from .progress import Progress, broadcast, restore
from .settings import COMMAND

_FILES = (
    "config.yaml", "command.txt", "environment.json", "data.json", "metrics.jsonl", "log.txt", "log_rank*.txt",
    "tokenizer.txt", "tokenizer.model", "tokenizer.json", "tensorboard/events.out.tfevents.*",
)  # fmt: skip


def finetune(
    model: tuple[Params, State], cfg: Config, request: Request, recipe: Recipe, out: Path, reporter: Reporter, *,
    inputs: Sequence[str] = (), overwrite: bool = False, command: Sequence[str] = (), job: Job,
) -> int:  # fmt: skip
    """Fine-tune ``model`` into the folder ``out``; the exit code. The same call again goes on where it ended.

    Raises the errors of ``train.errors``, ``OutputError`` and ``CheckpointError``; those of the data and of the
    settings before the first step and before anything is written.
    """
    device = prepare_device(cfg, job)
    if cfg.trainer.deterministic:
        torch.use_deterministic_algorithms(True)
    train_split, valid_split = open_split(cfg, "train"), open_split(cfg, "valid")
    params, state = model if not request.from_scratch else init(init_key(root_key(cfg.trainer.seed)), cfg)
    check_trees(COMMAND, params, state, cfg)
    origin = origin_of(params, state, cfg, request, recipe, train_split, valid_split)
    files = [*inputs, *train_split.dataset.manifest.files, *valid_split.dataset.manifest.files]
    place = claim(out, origin, folder=True, inputs=files, overwrite=overwrite)
    job.agree({**origin, "torch": torch.__version__})
    if job.ranks.broadcast_object(place.done):
        if job.ranks.is_main:
            reporter.say(f"{out} holds the same fine-tuning, finished")
        return 0
    folder = RunFolder(out)
    with logged(reporter, folder.log(job.ranks.rank), job.diagnose) as told, stop_requests() as stop:
        speaker: Reporter = told if job.ranks.is_main else NullReporter()
        tokenizer = choose_tokenizer(request, place, train_split, cfg, job)
        if request.tokens is None and tokenizer.size < (request.pieces or 0):
            speaker.warn(f"--pieces {request.pieces}: the transcripts have no more than {tokenizer.size} pieces")
        train_set, texts = training_transcripts(*train_split, tokenizer, cfg, request.most_left_out, speaker.warn)
        valid_set, valid_texts = validation_transcripts(*valid_split, tokenizer, cfg, speaker.warn)
        compiled = is_compiled(cfg, device)
        run = FinetuneRun(
            cfg=cfg, recipe=recipe, tokenizer=tokenizer, folder=folder, board=Board(folder.path / "tensorboard"),
            train=train_set, valid=valid_set, train_texts=texts, valid_texts=valid_texts, device=device,
            key=root_key(cfg.trainer.seed, device=device), tables=make_tables(cfg.preprocessor, device),
            parts=compile_parts(inductor(told.say)).model if compiled else EAGER, reporter=speaker,
            local_reporter=told, job=job,
        )  # fmt: skip
        return _in_folder(run, place, told.log, (params, state), command, stop)


def _in_folder(
    run: FinetuneRun, place: Place, log: LogFile, model: tuple[Params, State], command: Sequence[str],
    stop: StopRequest,
) -> int:  # fmt: skip
    """Train with the folder held; the exit code."""
    if run.ranks.is_main:
        log.write(f"command: {' '.join(command)}")
        _begin_folder(place, run.folder, run.tokenizer)
    try:
        if run.ranks.is_main:
            run.folder.describe(run.cfg, list(command), {"origin": place.origin})
        log.begin()
        with closing(run.board):
            progress = _begin(run, *model)
            _announce(run)
            progress = train(run, progress, stop)
    finally:
        if run.ranks.is_main:
            run.folder.close()
    return _end(run, progress, place, stop)


def _begin_folder(place: Place, folder: RunFolder, tokenizer: Tokenizer) -> None:
    """Mark and lock the folder, and store the tokens in it; what is overwritten is removed under the lock."""
    if place.replaced is None:
        begin(place)
        folder.checkpoints.mkdir(exist_ok=True)
        folder.open()
    else:
        folder.open()
        begin(place)
        folder.checkpoints.mkdir(exist_ok=True)
    with atomic_write(tokenizer_path(place, tokenizer.kind), 0, replaces=anything) as temporary:
        temporary.write_bytes(tokenizer.content)


def _begin(run: FinetuneRun, params: Params, state: State) -> Progress:
    """Where the run goes on, on every rank: from its newest checkpoint, or from the pre-trained model."""
    params, state = (tree_map(lambda leaf: leaf.to(run.device), tree) for tree in (params, state))
    head = init_head(random.fold_in(init_key(run.key), 1), run.cfg, run.recipe.design, run.tokenizer.size)
    progress = Progress(start(params, state, head, run.cfg, run.recipe.design))
    if run.ranks.is_main:
        found = restore(run.folder.checkpoints, progress, run.tokenizer, run.reporter.warn)
        progress = progress if found is None else found
        run.folder.cut_metrics(-1 if found is None else progress.ts.step)
    progress = broadcast(progress, run.ranks)
    if progress.ts.step:
        run.reporter.say(f"resumed at step {progress.ts.step}, epoch {progress.epoch}, batch {progress.batch}")
    return progress


def _announce(run: FinetuneRun) -> None:
    """Report model, tokens, data and device before the first step."""
    say, cfg, plan = run.reporter.say, run.cfg, run.train.plan(0)
    hours = float(run.train.manifest.duration.sum()) / 3600
    layer = run.recipe.design.layer
    read = "a weighted sum of all layers" if layer is None else f"layer {layer} of {cfg.encoder.n_layers}"
    say(
        f"{run.tokenizer.size} tokens ({run.tokenizer.kind}); "
        f"{len(run.train.manifest):,} utterances, "
        f"{hours:.2f} hours, {len(plan)} batches an epoch of up to {cfg.data.batch_seconds:g} s; "
        f"{len(run.valid.manifest):,} to validate"
    )
    say(
        f"the head reads {read}; encoder frozen for "
        f"{'all' if run.recipe.frozen_steps is None else run.recipe.frozen_steps} steps; "
        f"{run.device.type}, {cfg.trainer.precision}; folder {run.folder.path}"
    )
    for rule, dropped in run.train.manifest.dropped:
        say(f"left out: {dropped:,} utterances {rule}")


def _end(run: FinetuneRun, progress: Progress, place: Place, stop: StopRequest) -> int:
    """Tell the best model, and mark the folder as finished; the exit code."""
    if not is_finished(run, progress):
        return stop.exit_code
    if run.ranks.is_main:
        best = progress.best or {}
        run.reporter.say(
            f"best: step {best['step']}, CER {best['cer']:.4f}, WER {best['wer']:.4f}; it is in "
            f"{place.path / MODEL}, for nest-fn transcribe {run.folder.path} AUDIO"
        )
        finish(place, _own_files(place.path))
    return 0


def _own_files(out: Path) -> list[str]:
    """Files that the run wrote into its folder, relative to it; nothing that a user put there."""
    checkpoints = [out / MODEL, *retention.list_checkpoints(out / "checkpoints")]
    found = [path / name for path in checkpoints for name in (META, *read_meta(path)["files"])]
    for pattern in _FILES:
        found += sorted(out.glob(pattern))
    return [path.relative_to(out).as_posix() for path in found]

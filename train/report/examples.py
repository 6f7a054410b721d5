"""What the newest model does with three utterances, and how often each code is a target; from checkpoint and data.

Masks and noise are those of validation, whether the utterances are of the validation or of the training data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.checkpoint import retention
from nest_fn.config import Config
from nest_fn.frontend import log_mel
from nest_fn.layers.tree import tree_map
from nest_fn.layers.types import Params, State, Tensor
from nest_fn.losses import score_tokens
from nest_fn.model import forward
from nest_fn.train.augment.mixing import prepare_inputs
from nest_fn.train.data.batch_plan import PlannedBatch
from nest_fn.train.data.clips import load_rirs
from nest_fn.train.data.dataset import Dataset, RawBatch, load_batch, open_dataset
from nest_fn.train.errors import CheckpointError
from nest_fn.train.keys import root_key, validation_key
from nest_fn.train.run.batch import prepare_batch
from nest_fn.train.run.device import choose_device
from nest_fn.train.step.evaluate import make_evaluate

from .record import Record

LONGEST_S = 12.0  # of an utterance that is shown
COUNTED_S = 300.0  # of audio whose targets are counted


class Utterance(NamedTuple):
    """One utterance as the model meets it in validation."""

    name: str
    seconds: float
    audio: NDArray[np.float32]  # [N] in -1..1, clean
    noisy: NDArray[np.float32]  # [N] as the model hears it
    clean_mel: NDArray[np.float32]  # [M, F] log-mel
    noisy_mel: NDArray[np.float32]  # [M, F]
    mask: NDArray[np.bool_]  # [F] frames that are hidden
    targets: NDArray[np.int64]  # [T] of the first codebook
    guesses: NDArray[np.int64]  # [T] the most probable class
    masked: NDArray[np.bool_]  # [T] tokens that enter the loss
    chance: NDArray[np.float32]  # [T] probability of the target


class Examples(NamedTuple):
    """What a model does with some data."""

    step: int  # updates that the model has had
    split: str  # whose data
    utterances: Sequence[Utterance]
    counts: NDArray[np.int64]  # [K, C] how often each code is a target
    counted_s: float  # seconds of audio that were counted


def make_examples(record: Record, overrides: Sequence[str], number: int) -> Examples:
    """Apply the newest good checkpoint to ``number`` utterances of the run's data.

    ``overrides`` may say where the data is now (``data.root``) and the device. Raises ``CheckpointError`` if there is
    no checkpoint, ``DataError``, ``UsageError`` and ``OSError`` if the data is not there.
    """
    path, problems = retention.newest_valid(record.folder / "checkpoints")
    if path is None:
        raise CheckpointError(problems[0] if problems else f"{record.folder}: there is no checkpoint yet.")
    cfg = record.cfg.override(*overrides) if overrides else record.cfg
    split = "valid" if cfg.data.valid else "train"
    dataset = open_dataset(cfg.data, cfg.trainer.seed, split=split, sample_rate=cfg.sample_rate)
    device = choose_device(cfg.trainer.device)
    trees, _, _ = checkpoint_folder.read_checkpoint(path)
    trained = trees["ema"] or trees["params"]
    params, state = (tree_map(lambda leaf: leaf.to(device), tree) for tree in (trained, trees["state"]))
    rirs = load_rirs(cfg.data, cfg.sample_rate)
    rirs = None if rirs is None else rirs.to(device)
    chosen = _choose(dataset, number)
    shown = _look(params, state, dataset, chosen, cfg, device, rirs) if len(chosen) else []
    counts, seconds = _count(params, state, dataset, cfg, device, rirs)
    return Examples(retention.step_of(path), split, shown, counts, seconds)


def _choose(dataset: Dataset, number: int) -> NDArray[np.int64]:
    """Utterances spread over the lengths, none longer than ``LONGEST_S`` if there are enough."""
    order = np.argsort(dataset.length, kind="stable")
    short = order[dataset.length[order] <= LONGEST_S * dataset.sample_rate]
    order = short if len(short) >= number else order[:number]
    places = (np.arange(number) + 1) / (number + 1) * len(order)
    return order[np.unique(places.astype(np.int64).clip(0, max(len(order) - 1, 0)))] if len(order) else order


def _batch(dataset: Dataset, index: NDArray[np.int64]) -> RawBatch:
    rows = np.arange(len(index))
    return load_batch(dataset, PlannedBatch(int(dataset.length[index].max()), rows, index, np.zeros_like(rows)), 0)


@torch.no_grad()
def _look(
    params: Params, state: State, dataset: Dataset, index: NDArray[np.int64], cfg: Config, device: torch.device,
    rirs: Tensor | None,
) -> list[Utterance]:  # fmt: skip
    """The utterances as the model meets them, and what it makes of them."""
    raw, key = _batch(dataset, index), validation_key(root_key(cfg.trainer.seed, device=device))
    (part,) = prepare_batch(raw, cfg, key, device)
    batch, model = prepare_inputs(part, cfg, key, rirs)
    output, _ = forward(params, state, batch, cfg, key=model, train=False)
    found = score_tokens(*output, cfg.loss, batch["weight"])
    scores = output.log_probs if output.log_probs.ndim == 4 else output.log_probs[..., None]
    mels = [log_mel(batch[name], batch[f"{name}_len"], cfg.preprocessor) for name in ("audio", "noisy_audio")]
    frames = mels[0][1]
    mask = output.masks[:, 0] > 0.5
    if mask.shape[1] != mels[0][0].shape[2]:  # post_conv: a mask of tokens
        mask = mask.repeat_interleave(cfg.encoder.subsampling_factor, dim=1)
    guesses = scores.argmax(dim=2)
    made = []
    for row, name in enumerate(raw["ids"]):
        samples, width, tokens = int(raw["audio_len"][row]), int(frames[row]), int(output.encoded_len[row])
        one = Utterance(
            name=name,
            seconds=samples / cfg.sample_rate,
            audio=_numbers(batch["audio"][row, :samples]),
            noisy=_numbers(batch["noisy_audio"][row, :samples]),
            clean_mel=_numbers(mels[0][0][row, :, :width]),
            noisy_mel=_numbers(mels[1][0][row, :, :width]),
            mask=_numbers(mask[row, :width]),
            targets=_numbers(found.tokens[row, :tokens, 0]),
            guesses=_numbers(guesses[row, :tokens, 0]),
            masked=_numbers(found.masked[row, :tokens]),
            chance=_numbers((-found.losses[row, :tokens, 0]).exp()),
        )
        made.append(one)
    return made


def _numbers(leaf: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = (leaf.float() if leaf.is_floating_point() else leaf).cpu().numpy()
    return found


def _count(
    params: Params, state: State, dataset: Dataset, cfg: Config, device: torch.device, rirs: Tensor | None
) -> tuple[NDArray[np.int64], float]:
    """How often each code is a target ``[K, C]``, over at most ``COUNTED_S`` of audio; and the seconds."""
    evaluate, key = make_evaluate(cfg, rirs), validation_key(root_key(cfg.trainer.seed, device=device))
    counts, seconds = np.zeros((cfg.num_books, cfg.num_classes), np.int64), 0.0
    for planned in dataset.plan(0):
        raw = load_batch(dataset, planned, 0)
        (part,) = prepare_batch(raw, cfg, key, device)
        counts += evaluate(params, state, part, key)["token_counts"].cpu().numpy()
        seconds += int(raw["audio_len"].sum()) / cfg.sample_rate
        if seconds >= COUNTED_S:
            break
    return counts, seconds

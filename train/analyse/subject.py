"""What is looked at: a model, its earlier checkpoints, and batches of utterances mixed as in validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nest_fn.analysis.by_row.rows import chunks, row_losses, rows_within, saved_bytes
from nest_fn.checkpoint import retention
from nest_fn.config import Config, TrainerConfig
from nest_fn.layers import random
from nest_fn.layers.tree import check_same, flatten, tree_map
from nest_fn.layers.types import Key, Tensor
from nest_fn.train.augment.mixing import prepare_inputs
from nest_fn.train.data.clips import load_rirs
from nest_fn.train.data.dataset import Dataset, load_batch, open_dataset
from nest_fn.train.data.transfer import to_device
from nest_fn.train.downstream.inference import Model, load_model
from nest_fn.train.downstream.linear_probe import frame_labels
from nest_fn.train.downstream.settings import READING, with_settings
from nest_fn.train.errors import DataError, UsageError
from nest_fn.train.keys import root_key, validation_key
from nest_fn.train.run.device import prepare_device

SETTINGS = (
    "trainer.device", "trainer.threads", "data.valid", "data.noise", "data.rir", "data.min_duration",
    "data.max_duration", "data.augment", *READING,
)  # fmt: skip
"""Settings that an analysis uses: where it computes, and what is looked at, mixed with what."""
_EARLIER = 4  # earlier checkpoints of the run that are looked at


class Utterances(NamedTuple):
    """A batch, and what is known of its rows."""

    batch: dict[str, Tensor]  # as ``loss`` takes it
    remixed: dict[str, Tensor]  # the same utterances with other noise
    noise: Tensor  # float [B, N], without speech: a clip of data.noise, or white noise
    names: list[str]  # [B]
    labels: list[list[tuple[str, float, float]]] | None  # [B], phones, start and end in s, if the manifest has them
    fields: list[dict[str, Any]]  # [B], the lines of the manifest


class Subject(NamedTuple):
    """What an analysis looks at."""

    model: Model
    against: Model | None  # another model of the same shape
    earlier: tuple[tuple[int, Path], ...]  # step and path of some earlier checkpoints of the run, oldest first
    batches: tuple[Utterances, ...]
    key: Key
    labels: tuple[str, ...]  # keys of the manifest's lines to probe for; empty: those that are there
    memory: int  # bytes that an analysis may take beside the model
    row_bytes: int  # what a row costs in a backward pass

    def chunk(self, fixed: int = 0, more_per_row: int = 0) -> int:
        """Rows at once that fit the memory, with ``fixed`` bytes held besides and ``more_per_row`` for each."""
        # Twice: what autograd keeps, and gradients of the activations.
        return rows_within(self.memory, 2 * self.row_bytes + more_per_row, fixed)

    def load(self, path: Path) -> Model:
        """An earlier checkpoint, on the device."""
        return on_device(load_model(path), self.key.device)


def on_device(model: Model, device: torch.device) -> Model:
    """The model on a device."""
    params, state = (tree_map(lambda leaf: leaf.to(device), tree) for tree in (model.params, model.state))
    return Model(params, state, model.cfg)


def open_subject(
    run: str, overrides: Sequence[str], *, against: str | None, labels: Sequence[str], batches: int, seed: int,
    memory: int,
) -> tuple[Subject, Dataset]:  # fmt: skip
    """Load the model and the utterances: those of the run's manifests, unless the settings ``overrides`` name others.

    Raises ``ConfigError``, ``UsageError``, ``DataError``, ``CheckpointError``.
    """
    loaded = load_model(run)
    cfg = _config(loaded.cfg, overrides)
    place = prepare_device(cfg)
    model = on_device(loaded._replace(cfg=cfg), place)
    dataset = open_utterances(cfg, seed)
    key = root_key(seed, device=place)
    rirs = load_rirs(cfg.data, cfg.sample_rate) if cfg.data.augment.rir_prob > 0 else None
    read = tuple(
        _read(dataset, number, cfg, key, None if rirs is None else rirs.to(place))
        for number in _spread(len(dataset.plan(0)), batches)
    )
    other = None if against is None else on_device(load_model(against), place)
    if other is not None:
        _check_shape(model, other, against)
    size = _row_bytes(model, max((one.batch for one in read), key=lambda batch: batch["audio"].shape[1]), key)
    earlier = _earlier(Path(run))
    return Subject(model, other, earlier, read, random.fold_in(key, 7), tuple(labels), memory, size), dataset


def _config(cfg: Config, overrides: Sequence[str]) -> Config:
    """The model's config, with settings of the analysis: smaller batches than in training, unless they are given."""
    shards = () if any(word.startswith("data.valid=") for word in overrides) else cfg.data.valid_shards
    data = replace(cfg.data, batch_seconds=60.0, max_batch_size=16, num_workers=0, valid_shards=shards)
    return with_settings("analyse", replace(cfg, data=data, trainer=TrainerConfig()), overrides, SETTINGS)


def open_utterances(cfg: Config, seed: int) -> Dataset:
    """The utterances of the config's validation manifests, or of its training manifests. Raises ``DataError``."""
    files = cfg.data.valid or cfg.data.train
    if not files:
        raise UsageError("analyse: the model's config names no manifest; name one with data.valid=FILE.")
    shards = cfg.data.valid_shards if cfg.data.valid else cfg.data.train_shards
    settings = replace(cfg.data, valid=files, valid_shards=shards)
    return open_dataset(settings, seed, split="valid", sample_rate=cfg.sample_rate)


def _spread(count: int, wanted: int) -> list[int]:
    """``wanted`` numbers below ``count``, evenly spread: batches are ordered by length."""
    if count <= wanted:
        return list(range(count))
    return sorted({round((index + 0.5) * count / wanted - 0.5) for index in range(wanted)})


def _read(dataset: Dataset, number: int, cfg: Config, key: Key, rirs: Tensor | None) -> Utterances:
    planned = dataset.plan(0).batch(number)
    raw = load_batch(dataset, planned, 0, number)
    held = [row for row, name in enumerate(raw["ids"]) if name]
    if not held:
        raise DataError(f"analyse: batch {number} holds no utterance; give other manifests with data.valid=FILE.")
    tensors = {name: leaf[held] for name, leaf in to_device(raw, key.device).items()}
    mixing = validation_key(key)
    (batch, _), (remixed, _) = (prepare_inputs(tensors, cfg, one, rirs) for one in (mixing, random.fold_in(mixing, 1)))
    fields = [dataset.manifest.fields(int(planned.index[row])) for row in held]
    labels = [[(str(p), float(a), float(b)) for p, a, b in one["phones"]] for one in fields if "phones" in one]
    noise = _noise(tensors, key, None if dataset.noise is None else tensors["noise"])
    names, known = [raw["ids"][row] for row in held], labels if len(labels) == len(held) else None
    return Utterances(batch, remixed, noise, names, known, [dict(one) for one in fields])


def _noise(tensors: dict[str, Tensor], key: Key, clip: Tensor | None) -> Tensor:
    """Noise of every row: its clip, repeated to the end, or white noise where there is none."""
    rows, width = tensors["audio"].shape
    white = random.normal(random.fold_in(random.fold_in(key, 11), tensors["utterance"]), (rows, width))
    if clip is None:
        return white
    place = torch.arange(width, device=clip.device) % tensors["noise_len"].clamp(min=1)[:, None]
    repeated = clip.float().gather(1, place) * 2.0**-15
    return torch.where(repeated.abs().amax(dim=1, keepdim=True) > 0, repeated, white)


def _check_shape(model: Model, other: Model, name: Any) -> None:
    try:
        check_same(f"--against {name}", other.params, model.params)
        check_same(f"--against {name}", other.state, model.state)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _earlier(run: Path) -> tuple[tuple[int, Path], ...]:
    """Some earlier checkpoints of a run's folder, oldest first, evenly spread; none for a single checkpoint."""
    paths = retention.list_checkpoints(run / "checkpoints")[:-1]
    return tuple((retention.step_of(paths[number]), paths[number]) for number in _spread(len(paths), _EARLIER))


def _row_bytes(model: Model, batch: dict[str, Tensor], key: Key) -> int:
    """Bytes that a backward pass keeps for one row of the widest batch."""
    row = next(chunks(batch, 1))
    params = tree_map(lambda leaf: leaf.detach().requires_grad_(), model.params)
    there = [*flatten(params).values(), *flatten(model.state).values()]
    return saved_bytes(lambda: row_losses(params, model.state, row, model.cfg, key=key)[0].sum(), there)


def label_frames(subject: Subject, names: Sequence[str], frames: Sequence[int], one: Utterances) -> Tensor:
    """The phone of each frame of a batch, as its index in ``names``: int64 ``[n]``, rows one after another."""
    seconds = subject.model.cfg.encoder.subsampling_factor * subject.model.cfg.preprocessor.hop_length
    seconds_per_frame = seconds / subject.model.cfg.sample_rate
    assert one.labels is not None
    rows = zip(one.labels, frames, strict=True)
    return torch.cat([frame_labels(phones, count, names, seconds_per_frame) for phones, count in rows])

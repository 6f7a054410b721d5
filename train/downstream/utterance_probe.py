"""``nest-fn probe``: accuracy of a linear probe for a label of whole utterances, for example the speaker or a digit.

Features are means over the frames of one layer. The layer and the penalty are chosen on a quarter of the training
utterances, the probe is then fitted on all of them, and the test manifest is used only for the final accuracy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nest_fn.config import Config
from nest_fn.frontend import log_mel
from nest_fn.hidden_states import are_reduced, features, layers_by_rate
from nest_fn.layers import random
from nest_fn.layers.tree import device_of
from nest_fn.layers.types import Params, State, Tensor
from nest_fn.model import init
from nest_fn.recording.mel import recording_statistics
from nest_fn.recording.windows import encoder_frames, recording_features
from nest_fn.train.data.dataset import Dataset
from nest_fn.train.errors import DataError
from nest_fn.train.reporter import NullReporter, Reporter
from nest_fn.train.run.device import prepare_device

from .inference import ALONE, Job, Model, load_model, not_finite, open_audio, place, utterances
from .linear_probe import accuracy, choose, fit_linear_probe, mean_pool
from .recordings import Recording, recordings
from .settings import inference_config
from .weighted_probe import fit_weighted_probe, weighted_accuracy


class Score(NamedTuple):
    """The accuracy of one kind of features."""

    name: str
    layer: int
    held_back: float  # accuracy on the training utterances on which the layer was chosen
    test: float  # accuracy on the test manifest


def probe_labels(
    path: str | Path, label: str, train: Sequence[str], test: Sequence[str], overrides: Sequence[str] = (),
    reporter: Reporter | None = None,
) -> Iterator[Score]:  # fmt: skip
    """Scores of a model's best layer, of a learned mixture of its layers, of the untrained encoder, and of log-mel.

    ``label`` is a key of the manifests' lines; ``overrides`` are settings of the job, such as ``trainer.device=cuda``.
    Raises ``DataError`` if a line lacks the label, ``CheckpointError``, ``ConfigError`` and ``UsageError``.
    """
    model = load_model(path)
    cfg = inference_config("probe", model.cfg, overrides)
    device, job = prepare_device(cfg), Job(reporter=reporter or NullReporter())
    params, state, _ = place(model, cfg, device)
    untrained = place(Model(*init(random.key(0), cfg), cfg), cfg, device)[:2]
    train_set, test_set = (open_audio(files, cfg, data=cfg.data) for files in (train, test))
    names = sorted({_label(train_set, index, label) for index in range(len(train_set.manifest))})
    y, test_y = (_targets(dataset, label, names) for dataset in (train_set, test_set))
    for name, features_of in (("learnt", (params, state)), ("untrained", untrained), ("log-mel", None)):
        x, test_x = (mean_features(dataset, features_of, cfg, job) for dataset in (train_set, test_set))
        best = choose(x, y, len(names), torch.arange(len(y)) % 16)
        probe = fit_linear_probe(x[best.layer], y, len(names), penalty=best.penalty)
        yield Score(name, best.layer, best.accuracy, accuracy(probe, test_x[best.layer], test_y))
        if name == "learnt":
            yield _weighted(x, y, test_x, test_y, len(names), best.penalty)


def _weighted(x: list[Tensor], y: Tensor, test_x: list[Tensor], test_y: Tensor, classes: int, penalty: float) -> Score:
    """Score of a learned mixture of all layers; its ``layer`` is the one with the largest weight."""
    held = torch.arange(len(y)) % 4 == 1
    trial = fit_weighted_probe([layer[~held] for layer in x], y[~held], classes, penalty)
    probe = fit_weighted_probe(x, y, classes, penalty)
    held_back = weighted_accuracy(trial, [layer[held] for layer in x], y[held])
    return Score("weighted", int(probe.mixture.argmax()), held_back, weighted_accuracy(probe, test_x, test_y))


def _label(dataset: Dataset, index: int, label: str) -> str:
    fields: dict[str, Any] = dict(dataset.manifest.fields(index))
    if label not in fields:
        raise DataError(f"{dataset.manifest.where(index)}: has no '{label}'; the probe's label must stand in each line")
    return str(fields[label])


def _targets(dataset: Dataset, label: str, names: Sequence[str]) -> Tensor:
    """Class of every utterance. Raises ``DataError`` for a label that does not occur in training."""
    place = {name: number for number, name in enumerate(names)}
    found = [_label(dataset, index, label) for index in range(len(dataset.manifest))]
    unknown = sorted(set(found) - place.keys())
    if unknown:
        raise DataError(f"probe: labels {unknown[:5]} occur in the test manifest alone; the probe cannot know them")
    return torch.tensor([place[name] for name in found])


@torch.no_grad()
def mean_features(dataset: Dataset, model: tuple[Params, State] | None, cfg: Config, job: Job = ALONE) -> list[Tensor]:
    """Mean features of every layer ``[utterances, D]``, in the manifest's order; without a model, mean log-mel.

    Raises ``DataError`` for an utterance of which the model makes what is not finite.
    """
    rows: list[list[Tensor]] = []
    order: list[int] = []
    for index, audio, lengths, _ in utterances(dataset, job):
        if model is not None:
            audio, lengths = audio.to(device_of(model[0])), lengths.to(device_of(model[0]))
        if model is None:
            # Normalised features have mean 0 by construction, so the baseline uses features without normalisation.
            mel, short = log_mel(audio, lengths, dataclasses.replace(cfg.preprocessor, normalize=None))
            means = [mean_pool(mel.transpose(1, 2), short)]
        else:
            made = (features(*model, audio, lengths, cfg, layers) for layers in layers_by_rate(cfg.encoder))
            means = [mean_pool(layer, short) for of_one_rate, short in made for layer in of_one_rate]
        rows = rows or [[] for _ in means]
        for one, mean in zip(rows, means, strict=True):
            one.append(mean.float().cpu())
        order += index.tolist()
    device = torch.device("cpu") if model is None else device_of(model[0])
    for recording in recordings(dataset, device, job):
        means = _recording_means(recording, model, cfg, dataset.config.batch_seconds)
        rows = rows or [[] for _ in means]
        for one, mean in zip(rows, means, strict=True):
            one.append(mean.float().cpu()[None])
        order.append(recording.number)
    back = torch.argsort(torch.tensor(order))
    found = [torch.cat(layer)[back] for layer in rows]
    finite = torch.stack([torch.isfinite(layer).all(dim=1) for layer in found]).all(dim=0)
    if not finite.all():
        raise not_finite(dataset, int(finite.long().argmin()))
    return found


def _recording_means(
    recording: Recording, model: tuple[Params, State] | None, cfg: Config, seconds: float
) -> list[Tensor]:
    """Mean features of every layer ``[D]`` of a recording too long for a batch; without a model, mean log-mel."""
    if model is None:
        plain = dataclasses.replace(cfg.preprocessor, normalize="per_feature")  # the mean is what it takes away
        block = max(1, round(seconds * cfg.sample_rate) // plain.hop_length)
        mean, _ = recording_statistics(recording.read, recording.samples, plain, block)
        return [] if mean is None else [mean[0, :, 0]]
    means: list[Tensor] = []
    for layers in layers_by_rate(cfg.encoder):
        pieces = recording_features(*model, recording.read, recording.samples, cfg, layers, seconds)
        sums = [torch.stack([layer.double().sum(dim=0) for layer in piece.frames]) for piece in pieces]
        frames = encoder_frames(recording.samples, cfg, are_reduced(cfg.encoder, layers))
        means += list(torch.stack(sums).sum(dim=0) / frames)
    return means

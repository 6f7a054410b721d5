"""Linear probes layer by layer: phones of frames, and the speaker or another label of whole utterances.

The features are those of clean speech, unmasked, in evaluation mode. A quarter is held back for the accuracy; the
penalty is chosen on a quarter of the rest (``train/downstream/linear_probe.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from nest_fn.analysis import representations
from nest_fn.layers import random
from nest_fn.layers.tree import device_of
from nest_fn.layers.types import Tensor
from nest_fn.model import init
from nest_fn.train.downstream.inference import Model
from nest_fn.train.downstream.linear_probe import UNKNOWN, accuracy, choose, fit_linear_probe

from .result import Picture, Result
from .subject import Subject, label_frames, on_device

PHONES = "phones"
_USUAL = ("speaker", "label", PHONES)  # keys that are probed for where every utterance has them
_LEAST = 4  # groups (speakers or utterances) of which one can be held back and one chosen on


class Task(NamedTuple):
    """What a probe is to tell of each item, a frame or an utterance."""

    of_frames: bool
    classes: int
    label: Tensor  # int64 [n]
    item: Tensor  # int64 [n] the frame or utterance, in the order of the features
    group: Tensor  # int64 [n] the speaker or utterance it is of
    held_back: Tensor  # bool [n] for the accuracy
    by: str  # what is held back: speakers, or utterances


class Layers(NamedTuple):
    """Features of all looked-at frames, on the CPU."""

    frames: list[Tensor]  # [n, D] of each layer
    utterance: Tensor  # int64 [n]

    def of(self, task: Task) -> list[Tensor]:
        """Features of a task's items: its frames, or means over its utterances, in each layer."""
        if task.of_frames:
            return [x[task.item] for x in self.frames]
        count = torch.bincount(self.utterance).clamp(min=1)[:, None]
        sums = (torch.zeros(len(count), x.shape[1]).index_add(0, self.utterance, x) for x in self.frames)
        return [(total / count)[task.item] for total in sums]


def analyse_probes(subject: Subject) -> Result:
    """Accuracy of a linear probe on each layer's features: of frames for phones, of their means for other labels."""
    cfg = subject.model.cfg
    models = {"learnt": subject.model, "untrained": _untrained(subject.model)}
    models |= {} if subject.against is None else {"against": subject.against}
    made = {name: _layers(subject, model) for name, model in models.items()}
    mel = {frames: _log_mel(subject, made["learnt"], frames) for frames in (False, True)}
    summary: dict[str, Any] = {}
    arrays: dict[str, Tensor] = {}
    pictures: list[Picture] = []
    for key in labels_of(subject):
        task = _task(subject, key, made["learnt"])
        if isinstance(task, str):
            summary[key] = {"not_probed": task}
            continue
        scores = {name: [_score(task, x) for x in layers.of(task)] for name, layers in made.items()}
        held = task.held_back
        summary[key] = {
            "classes": task.classes, "of": "frames" if task.of_frames else "utterances",
            "fitted_on": int((~held).sum()), "held_back": int(held.sum()), "held_back_by": task.by,
            "commonest": _commonest(task),
            "log_mel": _score(task, mel[task.of_frames].of(task)[0]), "layers": scores,
        }  # fmt: skip
        arrays |= {f"{key}_{name}": torch.tensor(values) for name, values in scores.items()}
        bounds = {name: [summary[key][name]] * cfg.encoder.n_layers for name in ("log_mel", "commonest")}
        pictures.append(Picture(f"{_safe(key)}", "lines", f"Linear probe for {key}", "layer", "accuracy, held back",
                                list(range(cfg.encoder.n_layers)), scores | bounds))  # fmt: skip
    return Result(analyse_probes.__doc__ or "", summary, arrays, tuple(pictures))


def labels_of(subject: Subject) -> list[str]:
    """The keys to probe for: those asked for, else the usual ones that every utterance has."""
    fields = [line for one in subject.batches for line in one.fields]
    return list(subject.labels) or [key for key in _USUAL if all(key in line for line in fields)]


def probes_obstacle(subject: Subject) -> str | None:
    """Why there is nothing to probe for; None if there is."""
    keys = labels_of(subject)
    if not keys:
        return f"the lines of the manifest have none of {', '.join(_USUAL)}; name another key with --labels."
    for key in keys:
        for one in subject.batches:
            for name, line in zip(one.names, one.fields, strict=True):
                if key not in line:
                    return (
                        f"--labels {key}: the line of {name} has no such key; it has {', '.join(sorted(line))[:200]}."
                    )
    return None


def _untrained(model: Model) -> Model:
    params, state = init(random.key(0), model.cfg)
    return on_device(Model(params, state, model.cfg), device_of(model.params))


def _layers(subject: Subject, model: Model) -> Layers:
    parts, utterance, before = [], [], 0
    for one in subject.batches:
        audio, lengths = one.batch["audio"], one.batch["audio_len"]
        layers, rows = representations.layer_frames(model.params, model.state, audio, lengths, model.cfg)
        parts.append([x.float().cpu() for x in layers])
        utterance.append(rows.cpu() + before)
        before += len(one.names)
    return Layers([torch.cat(layer) for layer in zip(*parts, strict=True)], torch.cat(utterance))


def _log_mel(subject: Subject, layers: Layers, of_frames: bool) -> Layers:
    """Log-mel of the same frames. For means over utterances without normalisation, which sets these to 0."""
    cfg, found, before = subject.model.cfg, [], 0
    if not of_frames:
        cfg = replace(cfg, preprocessor=replace(cfg.preprocessor, normalize=None))
    count = torch.bincount(layers.utterance, minlength=sum(len(one.names) for one in subject.batches))
    for one in subject.batches:
        frames = count[before : before + len(one.names)].to(one.batch["audio"].device)
        before += len(one.names)
        audio, lengths = one.batch["audio"], one.batch["audio_len"]
        found.append(representations.mel_frames(audio, lengths, frames, int(frames.max()), cfg).float().cpu())
    return Layers([torch.cat(found)], layers.utterance)


def _task(subject: Subject, key: str, layers: Layers) -> Task | str:
    """The labels and what is held back; or why there is no task in these utterances."""
    fields = [line for one in subject.batches for line in one.fields]
    speakers = [str(line["speaker"]) for line in fields] if all("speaker" in line for line in fields) else []
    by_speaker = key != "speaker" and len(set(speakers)) >= _LEAST
    group = _numbered(speakers) if by_speaker else torch.arange(len(fields))
    if key == PHONES:
        names = sorted({phone for one in subject.batches for row in one.labels or () for phone, _, _ in row})
        count = torch.bincount(layers.utterance, minlength=len(fields)).split(
            [len(one.names) for one in subject.batches]
        )
        parts = zip(subject.batches, count, strict=True)
        label = torch.cat([label_frames(subject, names, frames.tolist(), one) for one, frames in parts])
        group = group[layers.utterance]
    else:
        label = _numbered([str(line[key]) for line in fields])
    by = "speakers" if by_speaker else "utterances"
    held = _every_fourth(group) if by_speaker or key == PHONES else _every_fourth_of_each(label)
    return _known(Task(key == PHONES, 0, label, torch.arange(len(label)), group, held, by))


def _known(task: Task) -> Task | str:
    """The items whose class occurs in the part that probes are fitted on, with classes numbered anew."""
    fitted = torch.unique(task.label[~task.held_back & (task.label != UNKNOWN)])
    kept = torch.isin(task.label, fitted)
    label, held, group = task.label[kept], task.held_back[kept], task.group[kept]
    groups = len(torch.unique(group))
    if len(fitted) < 2 or groups < _LEAST or not held.any():
        return (
            f"{len(fitted)} classes in {groups} {task.by} to fit on and hold back; want 2 classes and {_LEAST} "
            f"{task.by} at least: raise --batches, or name other utterances with data.valid=FILE."
        )
    return Task(task.of_frames, len(fitted), torch.searchsorted(fitted, label), task.item[kept], group, held, task.by)


def _numbered(names: Sequence[str]) -> Tensor:
    place = {name: number for number, name in enumerate(sorted(set(names)))}
    return torch.tensor([place[name] for name in names])


def _every_fourth(group: Tensor) -> Tensor:
    """Whether an item is of every fourth group, from the first."""
    return torch.isin(group, torch.unique(group)[::4])


def _every_fourth_of_each(label: Tensor) -> Tensor:
    """Every fourth item of each class, from its second: a class with one item has none."""
    held = torch.zeros(len(label), dtype=torch.bool)
    for one in torch.unique(label).tolist():
        held[(label == one).nonzero()[1::4, 0]] = True
    return held


def _score(task: Task, x: Tensor) -> float:
    """Accuracy on what is held back, of a probe fitted on the rest with the penalty that is best within that."""
    fit = ~task.held_back
    penalty = choose([x[fit]], task.label[fit], task.classes, task.group[fit]).penalty
    probe = fit_linear_probe(x[fit], task.label[fit], task.classes, penalty=penalty)
    return accuracy(probe, x[task.held_back], task.label[task.held_back])


def _commonest(task: Task) -> float:
    """Accuracy of always naming the commonest class of the part that probes are fitted on."""
    common = torch.bincount(task.label[~task.held_back]).argmax()
    return float((task.label[task.held_back] == common).double().mean())


def _safe(name: str) -> str:
    """A key as a part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:80]

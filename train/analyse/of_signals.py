"""Analyses of what the model makes of speech: slopes, token stability, layers, heads, codes."""

from __future__ import annotations

from typing import Any

import torch

from nest_fn.analysis import attention, codes, representations, sensitivity
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.types import Tensor
from nest_fn.losses import token_histogram
from nest_fn.train.downstream.inference import Model
from nest_fn.train.errors import UsageError

from .result import Picture, Result, rows_of
from .subject import Subject, Utterances, label_frames

SNR = (-5.0, 0.0, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0)  # dB
SHIFTS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0)  # ms
_FRAMES = 256  # of a minibatch of CKA


def analyse_sensitivity(subject: Subject) -> Result:
    """Slopes of predictions and log-mel along noise at 10 dB and along a shift in time, unmasked."""
    params, state, cfg = subject.model
    per_ms = cfg.sample_rate / 1000
    information: dict[str, list[Tensor]] = {"noise": [], "shift": []}
    features: dict[str, list[Tensor]] = {"noise": [], "shift": []}
    for one in subject.batches:
        rows = slice(0, max(1, subject.chunk() // 2))
        batch = {name: leaf[rows] for name, leaf in one.batch.items()}
        shift = sensitivity.shifting(batch["noisy_audio"])
        changes = {
            "noise": sensitivity.louder_noise(batch["audio"], one.noise[rows], 10.0),
            "shift": _in_ms(shift, per_ms),
        }
        for name, change in changes.items():
            found = sensitivity.slopes(params, state, batch, cfg, change)
            inside = valid_mask(found.lengths, found.information.shape[1])
            information[name].append(found.information[inside].flatten().cpu())
            features[name].append(found.features.square().mean().sqrt()[None].cpu())
    units = {"noise": "dB", "shift": "ms"}
    summary: dict[str, Any] = {
        name: {"unit": units[name], "information_per_token": float(torch.cat(values).mean()),
               "median": float(torch.cat(values).median()), "log_mel_slope": float(torch.cat(features[name]).mean())}
        for name, values in information.items()
    }  # fmt: skip
    return Result(
        analyse_sensitivity.__doc__ or "", summary, {name: torch.cat(values) for name, values in information.items()}
    )


def _in_ms(shift: sensitivity.Change, per_ms: float) -> sensitivity.Change:
    """A shift by milliseconds, from one by samples."""
    return lambda s: shift(s * per_ms)


def analyse_stability(subject: Subject) -> Result:
    """Fractions of target tokens that noise leaves: that of validation, at several SNRs; or a shift in time."""
    params, state, cfg = subject.model
    shifts = [ms * cfg.sample_rate / 1000 for ms in SHIFTS]
    chunk = subject.chunk()
    by_noise, by_shift, by_mix, weights = [], [], [], []
    for one in subject.batches:
        found = sensitivity.token_stability(params, state, one.batch, one.noise, cfg, SNR, chunk=chunk)
        moved = sensitivity.shift_stability(params, state, one.batch, cfg, shifts, chunk=chunk)
        mixed = sensitivity.mixed_stability(params, state, one.batch, cfg, chunk=chunk)
        by_mix.append(mixed.by_row.cpu())
        by_noise.append(found.by_row.cpu())
        by_shift.append(moved.by_row.cpu())
        weights.append(one.batch["audio_len"].cpu())
    weight = torch.cat(weights).double() / torch.cat(weights).sum()
    parts = {"noise": by_noise, "shift": by_shift, "mixed": by_mix}
    kept = {name: torch.cat(rows, dim=1) for name, rows in parts.items()}
    means = {name: (rows * weight).sum(dim=1) for name, rows in kept.items()}
    summary = {
        "kept_as_mixed": float(means["mixed"][0]), "snr_db": SNR, "kept_by_snr": means["noise"], "shift_ms": SHIFTS,
        "kept_by_shift": means["shift"],
    }  # fmt: skip
    pictures = (
        Picture("stability_noise", "lines", "Target tokens that noise leaves", "SNR in dB", "fraction", list(SNR),
                {"tokens": means["noise"].tolist()}),
        Picture("stability_shift", "lines", "Target tokens that a shift leaves", "ms", "fraction", list(SHIFTS),
                {"tokens": means["shift"].tolist()}),
    )  # fmt: skip
    return Result(analyse_stability.__doc__ or "", summary, kept, pictures)


def analyse_representations(subject: Subject) -> Result:
    """Linear CKA of all layers (with --against of both models), effective rank, isotropy, correlation with log-mel."""
    frames = _all_frames(subject, subject.model)
    other = None if subject.against is None else _all_frames(subject, subject.against)[0]
    layers, mel = frames
    size = min(_FRAMES, layers[0].shape[0])
    if size < 4:
        raise UsageError(f"analyse representations: the utterances have {size} frames; give more with data.valid=FILE.")
    pairs = [
        (part[: len(layers)], part[-len(layers) :])
        for part in representations.minibatches([*layers, *(other or layers)], size, subject.key)
    ]
    cka = representations.minibatch_cka(pairs).cpu()
    rank = torch.stack([representations.rank_me(x) for x in layers]).cpu()
    spread = [representations.isotropy(x) for x in layers]
    to_mel = [representations.canonical_correlations(representations.moments(x, mel), ridge=1e-3) for x in layers]
    summary: dict[str, Any] = {
        "frames": layers[0].shape[0], "cka_with": "against" if other else "itself", "cka": cka, "effective_rank": rank,
        "mean_cosine": [one.mean_cosine for one in spread], "partition_isotropy": [one.partition for one in spread],
        "log_mel_cca": [one.mean for one in to_mel], "log_mel_pwcca": [one.weighted for one in to_mel],
    }  # fmt: skip
    number = list(range(len(layers)))
    pictures = (
        Picture("cka", "map", "Linear CKA", "layer of the other" if other else "layer", "layer", number, rows_of(cka)),
        Picture("effective_rank", "lines", "Effective rank (RankMe)", "layer", "rank", number, {"rank": rank.tolist()}),
        Picture("log_mel", "lines", "Correlation with log-mel", "layer", "mean canonical correlation", number,
                {"CCA": summary["log_mel_cca"], "PWCCA": summary["log_mel_pwcca"]}),
    )  # fmt: skip
    return Result(analyse_representations.__doc__ or "", summary, {"cka": cka, "effective_rank": rank}, pictures)


def _all_frames(subject: Subject, model: Model) -> tuple[list[Tensor], Tensor]:
    """Frames of all layers, and log-mel of the same, over all batches: ``[n, D]`` each, ``[n, s M]``."""
    found, mels = [], []
    for one in subject.batches:
        audio, lengths = one.batch["audio"], one.batch["audio_len"]
        layers, rows = representations.layer_frames(model.params, model.state, audio, lengths, model.cfg)
        frames = torch.bincount(rows, minlength=len(lengths))
        mels.append(representations.mel_frames(audio, lengths, frames, int(frames.max()), model.cfg))
        found.append(layers)
    return [torch.cat(parts) for parts in zip(*found, strict=True)], torch.cat(mels)


def analyse_attention(subject: Subject) -> Result:
    """Span, entropy and weight on the frame itself of every attention head."""
    params, state, cfg = subject.model
    each = [
        attention.head_statistics(params, state, one.batch["audio"], one.batch["audio_len"], cfg)
        for one in subject.batches
    ]
    total = sum(one.queries for one in each)
    means = {
        name: (sum(getattr(one, name) * one.queries for one in each) / max(total, 1)).cpu()
        for name in ("span", "entropy", "evenness", "itself")
    }
    seconds = cfg.encoder.subsampling_factor * cfg.preprocessor.hop_length / cfg.sample_rate
    means["span"] = means["span"] * seconds
    summary = {"layers_by_heads": means, "span_unit": "seconds", "frames": total}
    heads = list(range(means["span"].shape[1]))
    pictures = (
        Picture("span", "map", "Span of attention in seconds", "head", "layer", heads, rows_of(means["span"])),
        Picture(
            "evenness", "map", "Entropy over that of even weights", "head", "layer", heads, rows_of(means["evenness"])
        ),
    )
    return Result(analyse_attention.__doc__ or "", summary, means, pictures)


def analyse_codes(subject: Subject) -> Result:
    """Use and drift of codes, phone purity, confusions; accuracy by place in the block, SNR and length."""
    size = subject.model.cfg.num_classes
    found = [_predict(subject, subject.model, one) for one in subject.batches]
    targets, predicted = (
        _histogram([getattr(one, name) for one in found], found, size) for name in ("targets", "predicted")
    )
    times = [_used_by(subject, subject.load(path), size) for _, path in subject.earlier] + [predicted]
    summary: dict[str, Any] = {
        "targets": codes.usage(targets)._asdict(), "predictions": codes.usage(predicted)._asdict(),
        "steps": [step for step, _ in subject.earlier], "drift_between_steps": codes.drift(torch.stack(times)),
        "accuracy": _accuracy(subject, found), "confusions_of_book_0": _confusions(found),
        "phones": _phones(subject, found),
    }  # fmt: skip
    counts = targets[0].sort(descending=True).values
    blocks = summary["accuracy"]["by_distance_to_seen"]
    pictures = (
        Picture("code_use", "lines", "Use of target codes, sorted", "code", "log10 (1 + tokens)", list(range(size)),
                {"book 0": counts.add(1).double().log10().tolist()}),
        Picture("accuracy_by_distance", "lines", "Accuracy by distance to the nearest seen token", "tokens", "accuracy",
                list(range(1, len(blocks["accuracy"]) + 1)), {"masked tokens": blocks["accuracy"].tolist()}),
    )  # fmt: skip
    return Result(analyse_codes.__doc__ or "", summary, {"targets": targets, "predictions": predicted}, pictures)


def _predict(subject: Subject, model: Model, one: Utterances) -> codes.Predictions:
    found = codes.predictions(model.params, model.state, one.batch, model.cfg, key=subject.key)
    return codes.Predictions(*(leaf.cpu() for leaf in found))


def _histogram(tokens: list[Tensor], found: list[codes.Predictions], size: int) -> Tensor:
    """Counts of codes over the masked tokens of all batches: ``[K, C]``."""
    parts = [token_histogram(x, one.masked, size) for x, one in zip(tokens, found, strict=True)]
    return torch.stack(parts).sum(dim=0)


def _used_by(subject: Subject, model: Model, size: int) -> Tensor:
    found = [_predict(subject, model, one) for one in subject.batches]
    return _histogram([one.predicted for one in found], found, size)


def _accuracy(subject: Subject, found: list[codes.Predictions]) -> dict[str, Any]:
    """Accuracy and loss of the masked tokens by place, SNR and length."""
    columns: dict[str, list[Tensor]] = {
        name: [] for name in ("correct", "loss", "distance", "position", "snr", "seconds")
    }
    for one, part in zip(subject.batches, found, strict=True):
        blocks = codes.masked_blocks(part.masked)
        rows = part.masked.nonzero()[:, 0]
        columns["correct"].append((part.predicted == part.targets).double().mean(dim=2)[part.masked])
        columns["loss"].append(part.losses.double().mean(dim=2)[part.masked])
        columns["distance"].append(blocks.distance[part.masked])
        columns["position"].append(blocks.position[part.masked])
        columns["snr"].append(_snr(one)[rows])
        columns["seconds"].append(one.batch["audio_len"].cpu()[rows] / subject.model.cfg.sample_rate)
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    edges = {
        "distance_to_seen": [*range(1, 9), 1e9], "position_in_block": [*range(8), 1e9],
        "snr": [-1e9, -5, 0, 5, 10, 20, 60, 1e9], "seconds": [0, 1, 2, 4, 8, 16, 1e9],
    }  # fmt: skip
    values = {"distance_to_seen": "distance", "position_in_block": "position", "snr": "snr", "seconds": "seconds"}
    bins = {
        f"by_{name}": codes.by_bins(joined[values[name]], joined["correct"], joined["loss"], at)._asdict()
        for name, at in edges.items()
    }
    overall = {
        "accuracy": float(joined["correct"].mean()),
        "loss": float(joined["loss"].mean()),
        "tokens": len(joined["loss"]),
    }
    return {"of_all_masked": overall, **bins}


def _snr(one: Utterances) -> Tensor:
    """Signal-to-noise ratio of each row in dB, 100 where nothing is added: ``[B]``."""
    speech = torch.linalg.vector_norm(one.batch["audio"], dim=1)
    added = torch.linalg.vector_norm(one.batch["noisy_audio"] - one.batch["audio"], dim=1)
    ratio = 20 * torch.log10(speech.clamp(min=1e-12) / added.clamp(min=1e-12))
    return torch.where(added > 0, ratio, 100.0).cpu()


def _confusions(found: list[codes.Predictions]) -> list[tuple[int, int, int]]:
    targets, predicted = (
        torch.cat([getattr(one, name)[..., 0][one.masked] for one in found]) for name in ("targets", "predicted")
    )
    return codes.confusions(targets, predicted)


def _phones(subject: Subject, found: list[codes.Predictions]) -> dict[str, Any] | None:
    """Purity of targets and predictions of book 0 against the manifest's phones; None if it has none."""
    if any(one.labels is None for one in subject.batches):
        return None
    names = sorted({name for one in subject.batches for row in one.labels or () for name, _, _ in row})
    tables = []
    for which in ("targets", "predicted"):
        table = torch.zeros(len(names), subject.model.cfg.num_classes, dtype=torch.int64)
        for one, part in zip(subject.batches, found, strict=True):
            labels = label_frames(subject, names, part.valid.sum(dim=1).tolist(), one)
            table += codes.contingency(labels, getattr(part, which)[..., 0][part.valid], *table.shape)
        tables.append(codes.purity(table)._asdict())
    return {"names": names, "targets": tables[0], "predictions": tables[1]}

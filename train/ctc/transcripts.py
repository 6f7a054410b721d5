"""Transcripts of a dataset, judged before the first step: which lines CTC can learn from, and why not the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple
from unicodedata import is_normalized, normalize

import numpy as np
import torch

from nest_fn.config import Config
from nest_fn.encoder import reduced_length, subsampling_spec
from nest_fn.files.quoting import shown
from nest_fn.frontend import frames
from nest_fn.layers.subsampling import subsampled_length
from nest_fn.layers.types import Tensor
from nest_fn.train.data.dataset import Dataset
from nest_fn.train.errors import DataError

from .pieces import frames_needed
from .tokens import Tokenizer

_NAMED = 5  # lines that a message names


class Transcripts(NamedTuple):
    """Texts of the lines of a dataset, by utterance id, and their token numbers."""

    text: dict[str, str]
    targets: dict[str, list[int]]


class LeftOut(NamedTuple):
    """Lines that are not used, for one reason."""

    reason: str
    lines: tuple[str, ...]  # manifest and line, with what is special to it

    def __str__(self) -> str:
        more = f" and {len(self.lines) - _NAMED} more" if len(self.lines) > _NAMED else ""
        count = "1 line" if len(self.lines) == 1 else f"{len(self.lines):,} lines"
        return f"{count} {self.reason}: {', '.join(self.lines[:_NAMED])}{more}"


def encoder_frames(samples: Tensor, cfg: Config) -> Tensor:
    """Frames of the encoder's output for audio of ``samples [n]``, int64, each alone in its batch: ``[n]``."""
    made = torch.as_tensor(frames(samples, cfg.preprocessor))
    spec = subsampling_spec(cfg.encoder)
    return torch.as_tensor(reduced_length(subsampled_length(made, spec, 0), cfg.encoder))


def read_texts(dataset: Dataset) -> tuple[list[str], list[LeftOut]]:
    """The text of each line, runs of spaces as one; empty where there is none, with the reasons."""
    texts, missing, empty, other = [], [], [], []
    for index in range(len(dataset.manifest)):
        found, where = dataset.manifest.fields(index).get("text"), dataset.manifest.where(index)
        text = " ".join(found.split()) if isinstance(found, str) else ""
        if found is None:
            missing.append(where)
        elif not isinstance(found, str):
            other.append(f"{where} ({type(found).__name__} {shown(found)})")
        elif not text:
            empty.append(where)
        texts.append(text)
    reasons = ("without a 'text'", missing), ("with an empty text", empty), ("whose text is no string", other)
    return texts, [LeftOut(reason, tuple(lines)) for reason, lines in reasons if lines]


def frames_of(dataset: Dataset, cfg: Config) -> list[int]:
    """Encoder frames of each utterance of a dataset."""
    return list(encoder_frames(torch.from_numpy(dataset.length), cfg).tolist())


def judge(
    dataset: Dataset, texts: Sequence[str], tokenizer: Tokenizer, cfg: Config
) -> tuple[list[LeftOut], list[LeftOut], dict[int, list[int]]]:
    """Judge the lines that have a text: those with unknown characters, those too long, and the targets of the others.

    A line is too long if CTC needs more frames for its tokens than the encoder makes of its audio.
    """
    unknown, long, letters = [], [], set()
    targets: dict[int, list[int]] = {}
    for index, (text, most) in enumerate(zip(texts, frames_of(dataset, cfg), strict=True)):
        where = dataset.manifest.where(index)
        if not text:
            continue
        strange = tokenizer.unknown(text)
        encoded = tokenizer.encode(text)
        if strange or not encoded:
            unknown.append(where)
            letters.update(strange)
        elif frames_needed(encoded) > most:
            long.append(f"{where} ({frames_needed(encoded)} for {most})")
        else:
            targets[index] = encoded
    listed = ", ".join(map(shown, sorted(letters)[:10])) + (" ..." if len(letters) > 10 else "")
    seconds = cfg.frames_per_token * cfg.preprocessor.hop_length / cfg.sample_rate
    too_long = f"that need more frames of {1000 * seconds:.0f} ms than their audio has"
    return (
        [LeftOut(f"with what is no token ({listed})", tuple(unknown))] if unknown else [],
        [LeftOut(too_long, tuple(long))] if long else [],
        targets,
    )


def training_transcripts(
    dataset: Dataset, texts: Sequence[str], empty: Sequence[LeftOut], tokenizer: Tokenizer, cfg: Config,
    most_left_out: float, warn: Callable[[str], None],
) -> tuple[Dataset, Transcripts]:  # fmt: skip
    """The lines that can be learnt from; ``warn`` is told of all others, by reason, with their count and names.

    Raises ``DataError`` if none is left, or if more than the fraction ``most_left_out`` of the lines with a text
    cannot be used.
    """
    unknown, long, targets = judge(dataset, texts, tokenizer, cfg)
    with_text = sum(map(bool, texts))
    told = [*empty, *unknown, *long]
    lost = with_text - len(targets)
    if not targets or lost > most_left_out * with_text:
        what = "none is left" if not targets else f"{lost} of {with_text} lines cannot be learnt from"
        raise DataError(
            f"data.train: {what}: {'; '.join(map(str, told))}. {_remedy(tokenizer, bool(long))}"
            + ("" if not targets else f", or allow it with --most-left-out {lost / with_text:.2f}")
        )
    for reason in told:
        warn(f"left out of training: {reason}")
    if spelled := _spelled_twice(dataset, texts):
        warn(f"{spelled}: CTC learns each spelling as letters of its own; bring the texts into one form")
    kept = np.array(sorted(targets), np.int64)
    text = {dataset.manifest.identity(index): texts[index] for index in targets}
    return take(dataset, kept), Transcripts(text, {dataset.manifest.identity(i): targets[i] for i in targets})


def _spelled_twice(dataset: Dataset, texts: Sequence[str]) -> LeftOut | None:
    """The lines that spell a letter as two characters, accent by itself, which other lines spell as one."""
    strange = [index for index, text in enumerate(texts) if not is_normalized("NFC", text)]
    raw = "".join(texts[index] for index in strange)
    if not (set(normalize("NFC", raw)) - set(raw)) & set("".join(texts)):
        return None
    lines = tuple(dataset.manifest.where(index) for index in strange)
    return LeftOut("in Unicode's form NFD, where others have NFC", lines)


def validation_transcripts(
    dataset: Dataset, texts: Sequence[str], empty: Sequence[LeftOut], tokenizer: Tokenizer, cfg: Config,
    warn: Callable[[str], None],
) -> tuple[Dataset, Transcripts]:  # fmt: skip
    """The lines with a text. What cannot be aligned counts in the error rates and not in the loss; ``warn`` is told.

    Raises ``DataError`` if no line has a text.
    """
    unknown, long, targets = judge(dataset, texts, tokenizer, cfg)
    kept = np.array([index for index, text in enumerate(texts) if text], np.int64)
    if not len(kept):
        raise DataError(f"data.valid: none is left: {'; '.join(map(str, empty))}; error rates want transcripts")
    for reason in empty:
        warn(f"left out of validation: {reason}")
    for reason in (*unknown, *long):
        warn(f"in validation's error rates, and not in its loss: {reason}")
    names = {int(index): dataset.manifest.identity(int(index)) for index in kept}
    text = {name: texts[index] for index, name in names.items()}
    return take(dataset, kept), Transcripts(text, {names[index]: target for index, target in targets.items()})


def take(dataset: Dataset, kept: np.ndarray) -> Dataset:
    """A dataset of the lines with these indices, with the same shapes of batches."""
    if len(kept) == len(dataset.manifest):
        return dataset
    weight = None if dataset.weight is None else dataset.weight[kept]
    return replace(dataset, manifest=dataset.manifest.take(kept), length=dataset.length[kept], weight=weight)


def _remedy(tokenizer: Tokenizer, too_long: bool) -> str:
    if too_long and tokenizer.kind in ("characters", "list"):
        return "Sub-word tokens need fewer frames: leave --tokens out, or give a SentencePiece model"
    if too_long:
        return "More and longer pieces need fewer frames: raise --pieces, or give a model of more"
    return "Correct the transcripts, or choose other --tokens"

"""What a fine-tuning run is made of: its data and their texts, its tokens, and the origin that its folder records."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from nest_fn.config import Config
from nest_fn.files.outputs import Place
from nest_fn.interop.convert import model_digest
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Params, State
from nest_fn.train.ctc.pieces import train_fitting_pieces, train_pieces
from nest_fn.train.ctc.step import Recipe
from nest_fn.train.ctc.tokens import Tokenizer, characters_of, read_tokenizer, tokenizer_from
from nest_fn.train.ctc.transcripts import LeftOut, frames_of, read_texts
from nest_fn.train.data.dataset import Dataset, open_dataset
from nest_fn.train.distributed.launch import Job
from nest_fn.train.downstream.settings import model_alone
from nest_fn.train.errors import DataError
from nest_fn.version import versions

from .settings import COMMAND, lasting

_SUFFIX = {"sentencepiece": ".model", "tokenizers": ".json", "characters": ".txt", "list": ".txt"}


class Request(NamedTuple):
    """What is asked for, beside the config."""

    tokens: str | None = None  # "characters", a file (``read_tokenizer``), or None: pieces of the transcripts
    pieces: int | None = None  # their number; None: the smallest that fits
    most_left_out: float = 0.25  # fraction of the lines that may be left out of training
    from_scratch: bool = False


class Split(NamedTuple):
    """A dataset, the text of each line, and the lines without one, by reason."""

    dataset: Dataset
    texts: list[str]
    empty: list[LeftOut]


def open_split(cfg: Config, split: str) -> Split:
    """The dataset of ``train`` or ``valid`` with its texts. Raises ``DataError``."""
    dataset = open_dataset(cfg.data, cfg.trainer.seed, split=split, sample_rate=cfg.sample_rate)
    return Split(dataset, *read_texts(dataset))


def origin_of(
    params: Params, state: State, cfg: Config, request: Request, recipe: Recipe, train: Split, valid: Split
) -> dict[str, Any]:
    """All that the result follows from."""
    asked = request._asdict()
    if request.tokens not in (None, "characters"):
        tokenizer = read_tokenizer(str(request.tokens))
        asked["tokens"] = hashlib.sha256(tokenizer.kind.encode() + tokenizer.content).hexdigest()
    plain = {**recipe._asdict(), "design": recipe.design._asdict(), "masks": recipe.masks._asdict()}
    return {
        "command": COMMAND,
        "model": model_digest(params, state, model_alone(cfg)),
        "data.train": _digest(train),
        "data.valid": _digest(valid),
        **flatten({**lasting(cfg), "recipe": plain}),
        **asked,
        **versions(),
    }


def choose_tokenizer(request: Request, place: Place, train: Split, cfg: Config, job: Job) -> Tokenizer:
    """The tokens of an earlier part of the run, or those asked for; rank 0's, on every rank."""
    content = None
    if job.ranks.is_main:
        stored = [path for kind in sorted(_SUFFIX) if (path := tokenizer_path(place, kind)).is_file()]
        if place.begun and stored:
            kept = read_tokenizer(stored[0])
            kind = "characters" if request.tokens == "characters" else kept.kind
            content = (kind, kept.content)
        else:
            made = _made(request, train, cfg)
            content = (made.kind, made.content)
    content = job.ranks.broadcast_object(content)
    assert content is not None
    return tokenizer_from(*content)


def _made(request: Request, train: Split, cfg: Config) -> Tokenizer:
    used = [text for text in train.texts if text]
    if request.tokens is not None and request.tokens != "characters":
        return read_tokenizer(request.tokens)
    if not used:
        raise DataError(f"data.train: none is left: {'; '.join(map(str, train.empty))}; CTC learns from transcripts")
    if request.tokens == "characters":
        return characters_of(used)
    if request.pieces is not None:
        return train_pieces(used, request.pieces)
    frames = [most for most, text in zip(frames_of(train.dataset, cfg), train.texts, strict=True) if text]
    return train_fitting_pieces(used, frames)


def tokenizer_path(place: Place, kind: str) -> Path:
    """Where a run's folder holds its tokens."""
    return place.path / f"tokenizer{_SUFFIX[kind]}"


def _digest(split: Split) -> str:
    lines = "\n".join([split.dataset.manifest.digest, *split.texts])
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()

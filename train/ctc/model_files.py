"""A recogniser on disk: a checkpoint of the model in the layout of pre-training, with its head and its tokens.

``extract`` and all other commands about encoders read it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nest_fn.checkpoint.folder import META, own_checkpoint, read_checkpoint, write_checkpoint
from nest_fn.config import Config, ConfigError
from nest_fn.errors import CheckpointError
from nest_fn.files.atomic import last_complete
from nest_fn.layers.types import Params, State

from .recogniser import Design
from .tokens import Tokenizer, tokenizer_from

MODEL = "model"
"""The folder of a fine-tuning run that holds its best recogniser."""


class Recogniser(NamedTuple):
    """All that is needed to transcribe."""

    params: Params
    state: State
    head: Params
    cfg: Config
    design: Design
    tokenizer: Tokenizer


def recogniser_trees(made: Recogniser) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trees of tensors and values for a checkpoint; the tokenizer's bytes are a tensor."""
    content = torch.from_numpy(np.frombuffer(made.tokenizer.content, np.uint8).copy())
    trees = {"params": made.params, "state": made.state, "head": made.head, "tokenizer": {"content": content}}
    return trees, {"tokenizer": made.tokenizer.kind, "layer": made.design.layer}


def save_recogniser(path: str | Path, made: Recogniser, settings: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint folder; an earlier checkpoint there is replaced. Raises as ``write_checkpoint``."""
    trees, values = recogniser_trees(made)
    write_checkpoint(path, trees, settings, {**values, **meta}, replaces=own_checkpoint)


def load_recogniser(path: str | Path) -> tuple[Recogniser, dict[str, Any]]:
    """A recogniser and its checkpoint's meta, from a checkpoint folder or the folder of a fine-tuning run (its best).

    Raises ``CheckpointError``, also for a model without a head.
    """
    folder = Path(path)
    if not (folder / META).exists() and last_complete(folder / MODEL).is_dir():
        folder = folder / MODEL
    if not folder.is_dir():
        raise CheckpointError(f"{path}: is no folder; give that of a fine-tuning run, or of a checkpoint in it.")
    trees, settings, meta = read_checkpoint(folder)
    if "head" not in trees or "tokenizer" not in trees:
        raise CheckpointError(f"{path}: holds no recogniser but {', '.join(trees)}; nest-fn finetune-ctc makes one.")
    try:
        cfg = Config.from_dict(settings)
    except ConfigError as error:
        raise CheckpointError(f"{path}: its config is not one of this version: {error}") from error
    tokenizer = tokenizer_from(meta["tokenizer"], bytes(trees["tokenizer"]["content"].numpy().tobytes()))
    found = Recogniser(trees["params"], trees["state"], trees["head"], cfg, Design(meta["layer"]), tokenizer)
    return found, meta

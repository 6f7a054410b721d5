"""The recogniser: a linear layer and a softmax over tokens, on the frames of one layer of an encoder or of all.

head = init_head(key, cfg, design, tokens)
log_probs, lengths, state = token_log_probs(params, head, state, batch, cfg, design)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nest_fn.config import Config
from nest_fn.encoder import encode_frames
from nest_fn.layers import random
from nest_fn.layers.linear import init_linear, linear
from nest_fn.layers.tree import tree_map
from nest_fn.layers.types import Gather, Key, Params, State, Tensor
from nest_fn.mel import Tables
from nest_fn.parts import EAGER, Parts

from .spec_augment import SpecAugment, spec_augment


class Design(NamedTuple):
    """Which frames the head reads: those of layer ``layer``, from 0; None: a learned weighted sum of all layers."""

    layer: int | None


class Keys(NamedTuple):
    """Keys of a training step, by use."""

    dither: Key  # [B, 2]
    masks: Key  # [B, 2]
    dropout: Key  # [2]


def step_keys(key: Key, utterance: Tensor) -> Keys:
    """Keys from that of the step ``[2]`` and the utterances' hashes ``[B]``, so that draws follow the utterance."""
    dither, masks, dropout = random.split(key, 3).unbind(0)
    return Keys(random.fold_in(dither, utterance), random.fold_in(masks, utterance), dropout)


def init_head(key: Key, cfg: Config, design: Design, tokens: int) -> Params:
    """The head's parameters: ``linear`` to ``tokens + 1`` classes, the blank first; ``mixture [L]`` of the layers."""
    head: Params = {"linear": init_linear(key, encoder_width(cfg), tokens + 1)}
    return head if design.layer is not None else {**head, "mixture": torch.zeros(cfg.encoder.n_layers).to(key.device)}


def encoder_width(cfg: Config) -> int:
    """Features in a frame of the encoder's output."""
    return cfg.encoder.feat_out if cfg.encoder.feat_out > 0 else cfg.encoder.d_model


def token_log_probs(
    params: Params, head: Params, state: State, batch: Mapping[str, Any], cfg: Config, design: Design, *,
    keys: Keys | None = None, train: bool = False, masks: SpecAugment | None = None, gather: Gather | None = None,
    tables: Tables | None = None, parts: Parts = EAGER,
) -> tuple[Tensor, Tensor, State]:  # fmt: skip
    """Log-probabilities of the tokens ``[B, T, C]`` in nats, float32, their lengths ``[B]``, and the new state.

    ``batch`` has ``audio [B, N]``, ``audio_len [B]``, ``utterance [B]`` and, for ``masks``, ``frames``, the lengths in
    frames of 10 ms as numbers. ``train`` sets the encoder's mode; with ``keys`` features have dither and ``masks``.
    """
    dither = None if keys is None else keys.dither
    mel, frames = parts.features(
        batch["audio"], batch["audio_len"], cfg.preprocessor, key=dither, train=keys is not None, tables=tables
    )
    if keys is not None and masks is not None:
        mel = spec_augment(mel, batch["frames"], masks, keys.masks)
    return feature_log_probs(
        params, head, state, mel, frames, cfg, design, key=None if keys is None else keys.dropout, train=train,
        rows=batch["utterance"], gather=gather, parts=parts,
    )  # fmt: skip


def feature_log_probs(
    params: Params, head: Params, state: State, mel: Tensor, frames: Tensor, cfg: Config, design: Design, *,
    key: Key | None = None, train: bool = False, rows: Tensor | None = None, gather: Gather | None = None,
    parts: Parts = EAGER,
) -> tuple[Tensor, Tensor, State]:  # fmt: skip
    """``token_log_probs`` of log-mel: ``mel [B, M, F]``, ``frames [B]`` in 10 ms, ``rows [B]`` that key dropout."""
    encoder, encoder_state = _used_layers(params["encoder"], design), _used_layers(state["encoder"], design)
    x, short = parts.subsample(encoder, mel, frames, cfg.encoder)
    every = range(cfg.encoder.n_layers) if design.layer is None else ()
    encoded = encode_frames(
        encoder, encoder_state, x, short, cfg.encoder, key=key, train=train,
        rows=rows, layers=every, gather=gather, parts=parts.encoder,
    )  # fmt: skip
    hidden = encoded.frames if design.layer is not None else _mixed(head["mixture"], encoded.outputs)
    kept = [*encoded.state["layers"], *state["encoder"]["layers"][len(encoded.state["layers"]) :]]
    log_probs = F.log_softmax(linear(head["linear"], hidden).float(), dim=-1)
    return log_probs, encoded.lengths, {**state, "encoder": {**state["encoder"], "layers": kept}}


def used_encoder(params: Params, design: Design) -> Params:
    """The part of an encoder's parameters that the recogniser computes with."""
    return _used_layers(params["encoder"], design)


def with_encoder(params: Params, encoder: Params) -> Params:
    """A model's parameters with those of the used part of the encoder replaced."""
    layers = params["encoder"]["layers"]
    whole = {**params["encoder"], **encoder, "layers": [*encoder["layers"], *layers[len(encoder["layers"]) :]]}
    return {**params, "encoder": whole}


def cast(tree: Any, precision: str) -> Any:
    """Parameters in the precision of the arithmetic, ``fp32`` or ``bf16``."""
    return tree_map(lambda leaf: leaf.to(torch.bfloat16), tree) if precision == "bf16" else tree


def _used_layers(tree: Any, design: Design) -> Any:
    """Blocks above the layer that the head reads are left out."""
    return tree if design.layer is None else {**tree, "layers": tree["layers"][: design.layer + 1]}


def _mixed(mixture: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """The sum of the layers weighted by the softmax of ``mixture [L]`` (arXiv 2105.01051, section 3)."""
    weights = torch.softmax(mixture.float(), 0).to(layers[0].dtype)
    return torch.einsum("l,lbtd->btd", weights, torch.stack(tuple(layers)))

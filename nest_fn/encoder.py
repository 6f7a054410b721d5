"""The FastConformer encoder: subsampling, positions, Conformer blocks (arXiv 2305.05084; reference 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from nest_fn.layers import random
from nest_fn.layers.attention import AttentionParams, context_mask, init_position_biases
from nest_fn.layers.conformer import BlockContext, ConformerSpec, conformer_layer, init_conformer_layer
from nest_fn.layers.dropout import depth_rates, dropout, stochastic_depth
from nest_fn.layers.lengths import check_lengths, check_rows, strided, valid_mask
from nest_fn.layers.linear import init_linear, linear
from nest_fn.layers.positions import absolute_positions, relative_positions
from nest_fn.layers.subsampling import SubsamplingSpec, init_subsampling, subsample, subsampled_length
from nest_fn.layers.types import Gather, Key, Params, State, Tensor

from .config import EncoderConfig

LOCAL = "rel_pos_local_attn"


class Encoded(NamedTuple):
    """Output of the encoder: ``frames [B, T, D']``, lengths in encoder frames, new state, outputs of chosen blocks."""

    frames: Tensor
    lengths: Tensor
    state: State
    outputs: tuple[Tensor, ...]


def subsampling_spec(cfg: EncoderConfig) -> SubsamplingSpec:
    """Hyperparameters of the subsampling module, from the encoder's settings."""
    kind = cfg.subsampling if cfg.subsampling and cfg.subsampling_factor > 1 else None
    return SubsamplingSpec(
        kind=kind,
        factor=cfg.subsampling_factor if kind else 1,
        features=cfg.feat_in or 0,
        width=cfg.d_model,
        channels=cfg.subsampling_conv_channels if cfg.subsampling_conv_channels > 0 else cfg.d_model,
        causal=cfg.causal_downsampling,
        masked=cfg.compat == "current",
    )


def reduction_spec(cfg: EncoderConfig) -> SubsamplingSpec:
    """Hyperparameters of the second subsampling (``reduction="striding"``), whose frequency axis is the features."""
    return SubsamplingSpec("striding", cfg.reduction_factor, cfg.d_model, cfg.d_model, cfg.d_model)


def conformer_spec(cfg: EncoderConfig) -> ConformerSpec:
    """Hyperparameters of a Conformer block, from the encoder's settings."""
    return ConformerSpec(
        width=cfg.d_model,
        heads=cfg.n_heads,
        hidden=cfg.d_model * cfg.ff_expansion_factor,
        kernel=cfg.conv_kernel_size,
        conv_context=_conv_context(cfg),
        bias=cfg.use_bias,
        norm=cfg.conv_norm_type,
        masked_norm=cfg.masked_batch_norm,
        relative=cfg.self_attention_model != "abs_pos",
        tied=not cfg.untie_biases,
        window=cfg.att_context_size[0] if cfg.self_attention_model == LOCAL else None,
        aligned=cfg.aligned_local_positions,
        global_tokens=cfg.global_tokens,
        global_spacing=cfg.global_tokens_spacing,
        global_separate=cfg.global_attn_separate,
        fused=cfg.use_pytorch_sdpa,
        dropout=cfg.dropout,
        attention_dropout=cfg.dropout_att,
    )


def _conv_context(cfg: EncoderConfig) -> tuple[int, int]:
    if cfg.conv_context_size is None:
        return (cfg.conv_kernel_size - 1) // 2, (cfg.conv_kernel_size - 1) // 2
    if isinstance(cfg.conv_context_size, str):  # "causal"
        return cfg.conv_kernel_size - 1, 0
    return cfg.conv_context_size


def init_encoder(key: Key, cfg: EncoderConfig) -> tuple[Params, State]:
    """Initialise the encoder's parameters and state as the reference does (reference 4.8).

    Parameters: ``subsampling``, ``layers`` and, if the settings use them, ``biases``, ``reduction`` and ``out``.
    """
    spec = conformer_spec(cfg)
    sub_key, reduction_key, out_key, *layer_keys = random.split(key, 3 + cfg.n_layers)
    layers = [init_conformer_layer(layer_key, spec) for layer_key in layer_keys]
    params: Params = {
        "subsampling": init_subsampling(sub_key, subsampling_spec(cfg)),
        "layers": [layer for layer, _ in layers],
    }
    if spec.tied and spec.relative:
        params["biases"] = init_position_biases(cfg.d_model, cfg.n_heads)
    if cfg.reduction == "striding":
        params["reduction"] = init_subsampling(reduction_key, reduction_spec(cfg))
    if cfg.feat_out > 0 and cfg.feat_out != cfg.d_model:
        params["out"] = init_linear(out_key, cfg.d_model, cfg.feat_out)
    return params, {"layers": [state for _, state in layers]}


def encode(
    params: Params, state: State, features: Tensor, lengths: Tensor, cfg: EncoderConfig, *,
    key: Key | None = None, train: bool = False, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, State]:  # fmt: skip
    """Encode features: ``[B, M, F]``, lengths in frames -> ``[B, D, T]``, lengths in encoder frames, new state.

    Padded frames of the output are not zeroed (Q23). ``rows`` int64 ``[B]`` identify the rows for their dropout draws
    (default 0..B-1), so that a batch split over micro-batches or ranks draws the same numbers.

    Raises ``TypeError`` or ``ValueError`` for features, lengths and rows of another shape or dtype, and for a missing
    ``key``.
    """
    if features.ndim != 3 or features.shape[1] != cfg.feat_in:
        raise ValueError(f"encode: features are {list(features.shape)}, want [B, {cfg.feat_in}, F].")
    if not features.is_floating_point():
        raise TypeError(f"encode: features are {features.dtype}; pass floats, as log_mel makes them.")
    check_lengths("encode", features, lengths)
    x, lengths = subsample_features(params, features, lengths, cfg)
    encoded = encode_frames(params, state, x, lengths, cfg, key=key, train=train, rows=rows)
    return encoded.frames.transpose(1, 2), encoded.lengths, encoded.state


def subsample_features(params: Params, features: Tensor, lengths: Tensor, cfg: EncoderConfig) -> tuple[Tensor, Tensor]:
    """Apply only the subsampling: ``[B, M, F]``, lengths in frames -> ``[B, T, D]``, lengths in encoder frames.

    Lengths are clamped to ``F``.
    """
    weight = params["subsampling"]["out"]["weight"]
    lengths = lengths.to(torch.int64).clamp(min=0, max=features.shape[2])
    x = features.transpose(1, 2).to(weight.dtype)
    return subsample(params["subsampling"], x, lengths, subsampling_spec(cfg))


def encode_frames(
    params: Params, state: State, x: Tensor, lengths: Tensor, cfg: EncoderConfig, *,
    key: Key | None = None, train: bool = False, rows: Tensor | None = None, layers: Sequence[int] = (),
    gather: Gather | None = None, parts: EncoderParts | None = None,
) -> Encoded:  # fmt: skip
    """Apply all that follows the subsampling: ``[B, T, D]`` -> ``Encoded``, with the outputs of the blocks ``layers``.

    The output of the block after which frames are reduced is taken after that, so that the last is the encoder's.
    ``gather`` all-gathers batch statistics over the processes that share the batch. Raises ``ValueError`` for a
    missing ``key``.
    """
    if train and key is None and _is_stochastic(cfg):
        raise ValueError("encode: train=True with dropout or other chance needs key=; pass one, or train=False.")
    if key is not None:
        random.check_one_key(key, "encode: key")
    if rows is not None:
        check_rows("encode", rows, x.shape[0])
    parts = EAGER if parts is None else parts
    biases = params.get("biases", {})
    x, block_context, keys = parts.embed_input(biases, x, lengths, cfg, key if train else None, rows)
    block_context = block_context._replace(gather=gather)
    spec = conformer_spec(cfg)
    rates = depth_rates(
        cfg.n_layers, cfg.stochastic_depth_drop_prob, cfg.stochastic_depth_mode, cfg.stochastic_depth_start_layer
    )
    reduce_after = cfg.reduction_position if cfg.reduction_position is not None else -1
    states, outputs = [], []
    for index, (layer, layer_state) in enumerate(zip(params["layers"], state["layers"], strict=True)):
        layer_key = None if keys is None else keys.layers[index]
        y, layer_state = parts.block(layer, layer_state, x, block_context, spec, key=layer_key, train=train)
        depth_key = None if keys is None else keys.depth[index]
        x = stochastic_depth(x, y, rates[index], key=depth_key, train=train)
        states.append(layer_state)
        if cfg.reduction and index == reduce_after:
            x, lengths = _reduce(params, x, lengths, cfg)
            block_context = _block_context(biases, x, lengths, cfg, keys)._replace(gather=gather)
        if index in layers:
            outputs.append(x)
    if "out" in params:
        x = linear(params["out"], x)
        outputs = [linear(params["out"], output) for output in outputs]
    if cfg.reduction and reduce_after == -1:
        x, lengths = _reduce(params, x, lengths, cfg)
        if len(states) - 1 in layers:
            outputs[-1] = x
    return Encoded(x, lengths, {"layers": states}, tuple(outputs))


def _is_stochastic(cfg: EncoderConfig) -> bool:
    rates = (cfg.dropout, cfg.dropout_pre_encoder, cfg.dropout_emb, cfg.dropout_att, cfg.stochastic_depth_drop_prob)
    return any(rate > 0.0 for rate in rates) or len(cfg.att_context_size) > 1


class EncoderKeys(NamedTuple):
    """Keys of one forward pass, by use: one per row in ``before`` and ``layers``, one per batch in the others."""

    before: Key  # [B, 2]
    positions: Key
    context: Key
    layers: Key  # [L, B, 2]
    depth: Key  # [L, 2]


def _keys(key: Key, rows: Tensor, n_layers: int) -> EncoderKeys:
    before, positions, context, layers, depth = random.split(key, 5).unbind(0)
    by_row = random.fold_in(random.split(layers, n_layers)[:, None, :], rows.expand(n_layers, -1))
    return EncoderKeys(random.fold_in(before, rows), positions, context, by_row, random.split(depth, n_layers))


def embed_input(
    biases: AttentionParams, x: Tensor, lengths: Tensor, cfg: EncoderConfig, key: Key | None, rows: Tensor | None
) -> tuple[Tensor, BlockContext, EncoderKeys | None]:
    """Prepare the input of the blocks: scaling, absolute positions if used, dropout, masks, and the blocks' keys.

    ``x [B, T, D] -> [B, T, D]``. ``biases`` are u and v if all layers share them, else empty. Nothing is drawn if
    ``key`` is None (reference 4.2).
    """
    rows = torch.arange(x.shape[0], device=x.device) if rows is None else rows
    keys = None if key is None else _keys(key, rows, cfg.n_layers)
    if cfg.xscaling:
        x = x * math.sqrt(cfg.d_model)
    if cfg.self_attention_model == "abs_pos":
        x = x + absolute_positions(x.shape[1], cfg.d_model, x)
    if keys is not None:
        x = dropout(x, cfg.dropout_pre_encoder, key=keys.before, train=True)
    return x, _block_context(biases, x, lengths, cfg, keys), keys


def _block_context(
    biases: AttentionParams, x: Tensor, lengths: Tensor, cfg: EncoderConfig, keys: EncoderKeys | None
) -> BlockContext:
    frames = x.shape[1]
    valid = valid_mask(lengths, frames)
    if cfg.self_attention_model == "abs_pos":
        positions = None
    else:
        left, right = cfg.att_context_size[0] if cfg.self_attention_model == LOCAL else (frames - 1, frames - 1)
        positions = relative_positions(left, right, cfg.d_model, x)
        if keys is not None:
            positions = dropout(positions, cfg.dropout_emb, key=keys.positions, train=True)
    if cfg.self_attention_model == LOCAL:
        context = None  # the window alone limits the context
    else:
        before, after = _context(cfg, keys, x.device)
        context = context_mask(frames, before, after, cfg.att_context_style, x.device)
    return BlockContext(valid, context, positions, biases)


def _context(
    cfg: EncoderConfig, keys: EncoderKeys | None, device: torch.device
) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """(left, right) in encoder frames: the first choice, or in training one drawn with ``att_context_probs``."""
    choices = cfg.att_context_size
    if keys is None or len(choices) == 1:
        return choices[0]
    probabilities = torch.tensor(cfg.att_context_probs or [1.0 / len(choices)] * len(choices), device=device)
    drawn = (random.uniform(keys.context, ()) >= probabilities.cumsum(0)[:-1]).sum()
    # index_select, because indexing with a tensor would synchronise with the device.
    left, right = torch.tensor(choices, device=device).index_select(0, drawn[None])[0].unbind(0)
    return left, right


def _reduce(params: Params, x: Tensor, lengths: Tensor, cfg: EncoderConfig) -> tuple[Tensor, Tensor]:
    """Subsample encoder frames once more, by strided convolutions or by max pooling: ``[B, T, D] -> [B, T', D]``."""
    if cfg.reduction == "striding":
        return subsample(params["reduction"], x, lengths, reduction_spec(cfg))
    factor = cfg.reduction_factor
    pooled = F.max_pool1d(x.transpose(1, 2), factor, factor).transpose(1, 2)
    return pooled, cast(Tensor, reduced_length(lengths, cfg))


def reduced_length(length: Tensor | int, cfg: EncoderConfig) -> Tensor | int:
    """Frames that the reduction leaves of so many encoder frames, an int or a tensor ``[B]``; all without one."""
    if cfg.reduction == "striding":
        return subsampled_length(length, reduction_spec(cfg), 0)
    return strided(length, cfg.reduction_factor, cfg.reduction_factor, 0) if cfg.reduction else length


def first_reduced_layer(cfg: EncoderConfig) -> int:
    """The first block whose output has the frames that the reduction leaves; ``n_layers`` without one."""
    if cfg.reduction is None:
        return cfg.n_layers
    position = cfg.reduction_position
    return cfg.n_layers - 1 if position is None or position == -1 else position


class EncoderParts(NamedTuple):
    """The two functions that follow the subsampling, eager or compiled; ``block`` is the same for all layers."""

    embed_input: Callable[..., tuple[Tensor, BlockContext, EncoderKeys | None]]
    block: Callable[..., tuple[Tensor, Any]]


EAGER = EncoderParts(embed_input, conformer_layer)

"""The NEST model in one file: ``init``, ``forward``, ``loss`` (arXiv 2408.13106; reference 6.1).

Log-mel features of the clean audio are quantised to target tokens by a frozen random projection. Features of the noisy
audio are masked in blocks and encoded, and a linear layer with softmax predicts the clean tokens.

    params, state = init(key(0), cfg)
    loss, (metrics, state) = loss(params, state, batch, cfg, key=fold_in(key(1), step))

``batch`` is a mapping with ``audio [B, N]``, ``audio_len [B]`` (samples), ``noisy_audio [B, N]`` and
``noisy_audio_len [B]``. Optional are ``row`` int64 ``[B]``, which identifies each row for its random draws (default
0..B-1), and ``weight [B]``, 0 for rows to exclude from loss and metrics. Precomputed features may replace a signal:
``features [B, M, F]`` and ``features_len [B]`` (frames) for ``audio`` and ``audio_len``, and likewise
``noisy_features`` and ``noisy_features_len``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from nest_fn.layers import random
from nest_fn.layers.lengths import check_rows
from nest_fn.layers.tree import tree_map
from nest_fn.layers.types import Gather, Key, Params, State, Tensor

from . import encoder as encoders
from .arguments import check_config, check_tensor, check_trees
from .config import Config
from .decoder import init_decoder, log_probs
from .encoder import encode_frames, init_encoder
from .masking import apply_mask as replace_masked
from .masking import init_masking
from .mel import Tables, make_tables
from .parts import EAGER, Keys, Parts
from .quantizer import init_quantizer, quantize_features

Batch = Mapping[str, Tensor]


class Output(NamedTuple):
    """Result of ``forward``, in the reference's shapes."""

    log_probs: Tensor  # [B, T, C, K], nats
    encoded_len: Tensor  # [B], encoder frames
    masks: Tensor  # [B, M, F] of 0 and 1; [B, D, T] under post_conv
    tokens: Tensor  # [B, T, K], int64


def init(key: Key, cfg: Config) -> tuple[Params, State]:
    """Initialise params and state from one key ``[2]``, on the key's device, as in the reference (reference 4.8).

    ``params`` holds ``encoder``, ``decoder`` and, if the mask embedding is trained, ``masking``; ``state`` holds
    ``encoder`` (running statistics of batch norm), the frozen ``quantizer`` and, unless it is trained, ``masking``.
    Raises ``TypeError`` or ``ValueError`` for a wrong ``cfg`` or ``key``.
    """
    check_config("init", cfg)
    random.check_one_key(key, "init: key")
    encoder_key, decoder_key, quantizer_key, masking_key = random.split(key, 4)
    with key.device:
        encoder_params, encoder_state = init_encoder(encoder_key, cfg.encoder)
        masking_params, masking_state = init_masking(masking_key, cfg.masking)
        params: Params = {"encoder": encoder_params, "decoder": init_decoder(decoder_key, cfg.decoder)}
        state: State = {"encoder": encoder_state, "quantizer": init_quantizer(quantizer_key, cfg.quantizer)}
    if masking_params:
        params["masking"] = masking_params
    if masking_state:
        state["masking"] = masking_state
    return params, state


def abstract(cfg: Config) -> tuple[Params, State]:
    """The trees of ``init`` on the meta device: names, shapes and dtypes without memory for values."""
    check_config("abstract", cfg)
    return init(random.key(0, device="meta"), cfg)


def quantize(state: State, features: Tensor, cfg: Config) -> Tensor:
    """Target tokens of clean features: ``[B, M, F] -> int64 [B, T, K]`` (reference 2).

    Under post_conv, ``features`` are the subsampled ones, ``[B, D, T]``. Raises ``TypeError`` or ``ValueError`` for
    wrong arguments.
    """
    check_trees("quantize", cfg, None, state, "state.quantizer")
    check_tensor("quantize: features", features)
    return quantize_features(state["quantizer"], features, cfg.quantizer)


def encode(
    params: Params, state: State, features: Tensor, lengths: Tensor, cfg: Config, *,
    key: Key | None = None, train: bool = False, rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, State]:  # fmt: skip
    """Encode features: ``[B, M, F]``, lengths in frames -> ``[B, D, T]``, lengths in encoder frames, new state.

    ``key`` is needed for dropout in training; ``rows`` int64 ``[B]`` identify the rows for it (default 0..B-1). Padded
    frames of the output are not zeroed (Q23). Raises ``TypeError`` or ``ValueError`` for wrong arguments (reference 4).
    """
    check_trees("encode", cfg, params, state, "params.encoder.subsampling", "state.encoder.layers")
    check_tensor("encode: features", features)
    encoded, lengths, encoder_state = encoders.encode(
        params["encoder"], state["encoder"], features, lengths, cfg.encoder, key=key, train=train, rows=rows
    )
    return encoded, lengths, {**state, "encoder": encoder_state}


def forward(
    params: Params, state: State, batch: Batch, cfg: Config, *,
    key: Key | None = None, train: bool = False, apply_mask: bool = True, mask: Tensor | None = None,
) -> tuple[Output, State]:  # fmt: skip
    """Compute log-probabilities of all tokens from waveforms: ``Output`` and the new state (reference 6.1).

    ``mask``, bool ``[B, F]`` (``[B, T]`` under post_conv), is used instead of a drawn mask; without it,
    ``apply_mask=True`` needs ``key``. Raises ``TypeError`` or ``ValueError`` for wrong arguments.
    """
    check_trees("forward", cfg, params, state, *_REQUIRED)
    check_batch(batch)
    seen = _encode_pair(params, state, batch, cfg, key=key, train=train, apply_mask=apply_mask, mask=mask)
    width = cfg.masking.feat_in or 0
    masks = seen.mask[:, None, :].expand(-1, width, -1).to(seen.encoded.dtype)
    output = Output(log_probs(params["decoder"], seen.encoded, cfg.decoder), seen.lengths, masks, seen.tokens)
    return output, seen.state


def loss(
    params: Params, state: State, batch: Batch, cfg: Config, *,
    key: Key | None = None, train: bool = True, mask: Tensor | None = None,
) -> tuple[Tensor, tuple[dict[str, Tensor], State]]:  # fmt: skip
    """Mean cross-entropy in nats of the batch's masked tokens, a scalar ``[]``, with metrics and new state.

    0 with zero gradients if nothing is masked (Q14). ``mask``, bool ``[B, F]`` (``[B, T]`` under post_conv), is used
    instead of a drawn mask. See ``loss_sum`` for the metrics. Raises ``TypeError`` or ``ValueError`` for wrong
    arguments.
    """
    total, (metrics, state) = loss_sum(params, state, batch, cfg, key=key, train=train, mask=mask)
    return total / metrics["masked_tokens"].clamp(min=1).to(total.dtype), (metrics, state)


def loss_sum(
    params: Params, state: State, batch: Batch, cfg: Config, *,
    key: Key | None = None, train: bool = True, mask: Tensor | None = None, gather: Gather | None = None,
    tables: Tables | None = None, parts: Parts = EAGER,
) -> tuple[Tensor, tuple[dict[str, Tensor], State]]:  # fmt: skip
    """Sum of the cross-entropy in nats; divided by ``masked_tokens`` it is the loss. For batches computed in parts.

    Processes that compute parts of one batch at the same time share batch statistics through ``gather``, an all-gather.
    ``tables`` are ``make_tables(cfg.preprocessor, device)``, for callers that compute them once. ``parts`` are the
    functions to call, eager or compiled.

    All metrics are sums, additive over parts: ``loss_sum``, ``masked_tokens`` and ``correct`` (tokens x codebooks),
    ``valid_tokens``, ``overflow`` (masked tokens beyond ``loss.capacity``), and the number of tokens of each class,
    ``token_counts`` of valid and ``masked_token_counts`` of masked ones, ``[K, C]``.
    Raises ``TypeError`` or ``ValueError`` for wrong arguments.
    """
    check_trees("loss", cfg, params, state, *_REQUIRED)
    check_batch(batch)
    seen = _encode_pair(
        params, state, batch, cfg, key=key, train=train, apply_mask=True, mask=mask, gather=gather, tables=tables,
        parts=parts,
    )  # fmt: skip
    weight = batch.get("weight")
    total, metrics = parts.score(params["decoder"], seen.encoded, seen.lengths, seen.tokens, seen.mask, weight, cfg)
    return total, (metrics, seen.state)


class _EncodedPair(NamedTuple):
    encoded: Tensor  # [B, T, D]
    lengths: Tensor  # [B], encoder frames
    tokens: Tensor  # [B, T, K]
    mask: Tensor  # bool [B, F], or [B, T] under post_conv
    state: State


def _encode_pair(
    params: Params, state: State, batch: Batch, cfg: Config, *,
    key: Key | None, train: bool, apply_mask: bool, mask: Tensor | None, gather: Gather | None = None,
    tables: Tables | None = None, parts: Parts = EAGER,
) -> _EncodedPair:  # fmt: skip
    """Target tokens of the clean signal and encoded frames of the masked noisy signal."""
    keys, rows = _keys(key, batch, parts)
    given = next((batch[name] for name in _PRECOMPUTED if name in batch), None)
    if tables is None and given is not None:
        tables = make_tables(cfg.preprocessor, given.device)

    def features(name: str, key: Key | None) -> tuple[Tensor, Tensor]:
        """Features ``[B, M, F]`` of a signal and their lengths, computed or taken from the batch."""
        if name not in batch:
            return batch[_PRECOMPUTED[name]], batch[f"{_PRECOMPUTED[name]}_len"]
        signal, length = batch[name], batch[f"{name}_len"]
        return parts.features(signal, length, cfg.preprocessor, key=key, train=train, tables=tables)

    signals = (*features("audio", keys.clean), *features("noisy_audio", keys.noisy))
    return encode_pair_of_features(params, state, *signals, cfg, keys, rows, train, apply_mask, mask, gather, parts)


def encode_pair_of_features(
    params: Params, state: State, clean: Tensor, clean_len: Tensor, noisy: Tensor, noisy_len: Tensor, cfg: Config,
    keys: Keys, rows: Tensor | None, train: bool, apply_mask: bool, mask: Tensor | None, gather: Gather | None,
    parts: Parts,
) -> _EncodedPair:  # fmt: skip
    """Compute target tokens and encoded frames from the features ``[B, M, F]`` of both signals.

    Raises ``ValueError`` if the features differ in shape.
    """
    if clean.shape != noisy.shape:
        raise ValueError(
            f"forward: clean features are {list(clean.shape)}, noisy {list(noisy.shape)}; "
            "targets and input must be equally wide, so pad the two signals to one length."
        )
    embedding = (params["masking"] if "masking" in params else state["masking"])["embedding"]
    front = {"subsampling": params["encoder"]["subsampling"]}
    tokens_of = clean
    if cfg.mask_position == "post_conv":
        # Targets are computed with the same subsampling as the input, but without gradients.
        frozen = tree_map(torch.Tensor.detach, front["subsampling"])
        frames, _ = parts.subsample({"subsampling": frozen}, clean, clean_len, cfg.encoder)
        tokens_of = frames.transpose(1, 2)
        x, lengths = parts.subsample(front, noisy, noisy_len, cfg.encoder)
        mask = _mask(mask, apply_mask, keys.mask, lengths, x.shape[1], cfg, parts)
        if cfg.encoder.detach_subsampling:
            x = x.detach()
        x = replace_masked(x.transpose(1, 2), mask, embedding).transpose(1, 2)
    else:
        mask = _mask(mask, apply_mask, keys.mask, noisy_len, noisy.shape[2], cfg, parts)
        noisy = replace_masked(noisy, mask, embedding)
        x, lengths = parts.subsample(front, noisy, noisy_len, cfg.encoder)
    tokens = parts.quantize(state["quantizer"], tokens_of, cfg.quantizer)
    encoded = encode_frames(
        params["encoder"], state["encoder"], x, lengths, cfg.encoder,
        key=keys.dropout, train=train, rows=rows, gather=gather, parts=parts.encoder,
    )  # fmt: skip
    return _EncodedPair(encoded.frames, encoded.lengths, tokens, mask, {**state, "encoder": encoded.state})


def _keys(key: Key | None, batch: Batch, parts: Parts) -> tuple[Keys, Tensor | None]:
    rows = batch.get("row")
    if key is None:
        return Keys(), rows
    random.check_one_key(key, "forward: key")
    size = batch["audio" if "audio" in batch else "features"].shape[0]
    return parts.keys(key, torch.arange(size, device=key.device) if rows is None else rows), rows


def _mask(
    mask: Tensor | None, apply_mask: bool, key: Key | None, lengths: Tensor, frames: int, cfg: Config, parts: Parts
) -> Tensor:
    """The given mask, a drawn mask, or a mask that is all False: bool ``[B, frames]``."""
    shape = (lengths.shape[0], frames)
    if mask is not None:
        check_tensor("forward: mask", mask)
        if tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise ValueError(f"forward: mask is {mask.dtype} {list(mask.shape)}; want bool {list(shape)}.")
        return mask
    if not apply_mask:
        return torch.zeros(shape, dtype=torch.bool, device=lengths.device)
    if key is None:
        raise ValueError("forward: drawing a mask needs key=; pass one, or mask=, or apply_mask=False.")
    return parts.mask(key, lengths, frames, cfg.masking, cfg.mask_block)


_PRECOMPUTED = {"audio": "features", "noisy_audio": "noisy_features"}
_REQUIRED = ("params.encoder.subsampling", "params.decoder", "state.encoder.layers", "state.quantizer")


def check_batch(batch: Any) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``batch`` holds both signals, with equal shapes."""
    if not isinstance(batch, Mapping):
        names = ", ".join(f"{name}, {name}_len" for name in _PRECOMPUTED)
        raise TypeError(f"batch: want a mapping with {names}; got {type(batch).__name__}.")
    given = [name if name in batch or other not in batch else other for name, other in _PRECOMPUTED.items()]
    missing = [name for one in given for name in (one, f"{one}_len") if name not in batch]
    if missing:
        raise ValueError(f"batch: {', '.join(missing)} missing; it has {', '.join(sorted(batch)) or 'nothing'}.")
    for name in (*given, *(f"{one}_len" for one in given), *batch.keys() & {"row", "weight"}):
        check_tensor(f"batch: {name}", batch[name])
    twice = [name for name, other in _PRECOMPUTED.items() if name in batch and other in batch]
    if twice:
        raise ValueError(f"batch: has both {twice[0]} and {_PRECOMPUTED[twice[0]]}; keep one.")
    if given == list(_PRECOMPUTED) and batch["audio"].shape != batch["noisy_audio"].shape:
        raise ValueError(
            f"batch: audio is {list(batch['audio'].shape)}, noisy_audio {list(batch['noisy_audio'].shape)}; "
            "pad both to one width."
        )
    count = batch[given[0]].shape[0]
    if count == 0:
        raise ValueError(f"batch: {given[0]} is {list(batch[given[0]].shape)}, no row; leave an empty batch out.")
    if "row" in batch:
        check_rows("batch: row", batch["row"], count)
    if "weight" in batch and tuple(batch["weight"].shape) != (count,):
        raise ValueError(f"batch: weight is {list(batch['weight'].shape)}; want one number a row, [{count}].")

"""The decoder: one linear layer that predicts the token of every codebook (reference 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .config.model import DecoderConfig
from .config.required import required
from .layers import initializers, random
from .layers.linear import LinearParams, linear
from .layers.types import Key, Tensor

INIT_MODES: dict[str, Callable[[Key, Sequence[int]], Tensor]] = {
    "xavier_uniform": initializers.xavier_uniform,
    "xavier_normal": initializers.xavier_normal,
    # He et al. 2015: gain of ReLU, fan-in mode.
    "kaiming_uniform": lambda key, shape: initializers.uniform(key, shape, math.sqrt(6.0 / shape[1])),
    "kaiming_normal": lambda key, shape: initializers.normal(key, shape, math.sqrt(2.0 / shape[1])),
}


def init_decoder(key: Key, cfg: DecoderConfig) -> LinearParams:
    """Initialise ``weight [C * K, D]`` by ``cfg.init_mode`` and ``bias [C * K]`` as torch.nn.Linear does.

    Output ``c * K + k`` is the logit of class c of codebook k. Raises ``ValueError`` for an unknown ``init_mode``.
    """
    if cfg.init_mode not in INIT_MODES:
        raise ValueError(f"decoder: unknown init_mode {cfg.init_mode!r}; choose one of {', '.join(INIT_MODES)}.")
    width = required(cfg.feat_in, "decoder.feat_in")
    outputs = required(cfg.num_classes, "decoder.num_classes") * required(cfg.num_decoders, "decoder.num_decoders")
    weight_key, bias_key = random.split(key, 2)
    params: LinearParams = {"weight": INIT_MODES[cfg.init_mode](weight_key, (outputs, width))}
    if cfg.use_bias:
        params["bias"] = initializers.torch_default(bias_key, (outputs,), width)
    return params


def logits(params: LinearParams, encoded: Tensor, cfg: DecoderConfig) -> Tensor:
    """Logits: ``[..., D] -> [..., C, K]``. Raises ``ValueError`` if the weight does not fit ``D``, C and K."""
    books = required(cfg.num_decoders, "decoder.num_decoders")
    classes = required(cfg.num_classes, "decoder.num_classes")
    if params["weight"].shape[0] != classes * books:
        raise ValueError(
            f"decoder: {classes} classes of {books} books want {classes * books} outputs, "
            f"weight is {list(params['weight'].shape)}; check decoder.num_classes and num_decoders."
        )
    scores = linear(params, encoded)
    return scores.reshape(*scores.shape[:-1], classes, books)


def log_probs(params: LinearParams, encoded: Tensor, cfg: DecoderConfig) -> Tensor:
    """Log-probabilities in nats: ``[B, T, D] -> [B, T, C, K]``, float32, or float64 if the logits are.

    ``[B, T, C]`` for a single codebook under ``squeeze_single``.
    """
    scores = logits(params, encoded, cfg)
    dtype = scores.dtype if scores.dtype == torch.float64 else torch.float32
    # Over the last axis, where PyTorch's softmax is many times faster on a CPU.
    scores = torch.log_softmax(scores.transpose(2, 3), dim=-1, dtype=dtype).transpose(2, 3)
    return scores[..., 0] if cfg.squeeze_single and cfg.num_decoders == 1 else scores

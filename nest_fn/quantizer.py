"""Features to tokens: a frozen random projection and the nearest code of a frozen random codebook (reference 2).

Chiu et al., "Self-supervised learning with random-projection quantizer for speech recognition", ICML 2022. Nothing is
trained, and the same features give the same tokens in training and evaluation.
"""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F

from .config.model import QuantizerConfig
from .config.required import required
from .layers import random
from .layers.initializers import xavier_normal
from .layers.linear import LinearParams, linear
from .layers.types import Key, Tensor

_CPU_SCORES = 1 << 19  # scores computed at once on a CPU: 4 MiB of float64 (64 tokens x 8192 codes), to fit the cache
_GPU_SCORES = 1 << 26  # on other devices: 512 MiB of float64, to keep them busy
_COMPILED_PIECES = 8  # each piece is unrolled into a compiled graph


class QuantizerState(TypedDict):
    """``projection.weight [K * code_dim, combine * M]`` float32, ``codebooks [K, C, code_dim]`` float64, unit rows."""

    projection: LinearParams
    codebooks: Tensor


def init_quantizer(key: Key, cfg: QuantizerConfig) -> QuantizerState:
    """Initialise ``projection.weight [K * code_dim, combine * M]`` Xavier-normal and ``codebooks [K, C, code_dim]``.

    The codes are uniform on the unit sphere (reference 2).
    """
    books, dim = required(cfg.num_books, "quantizer.num_books"), required(cfg.code_dim, "quantizer.code_dim")
    classes, width = required(cfg.num_classes, "quantizer.num_classes"), required(cfg.feat_in, "quantizer.feat_in")
    stacked = width * required(cfg.combine_time_steps, "quantizer.combine_time_steps")
    projection_key, codebook_key = random.split(key, 2)
    codes = random.normal(codebook_key, (books, classes, dim), torch.float64)
    return {
        "projection": {"weight": xavier_normal(projection_key, (books * dim, stacked))},
        "codebooks": codes if codes.is_meta else F.normalize(codes, dim=-1),  # as in layers/initializers.py
    }


def quantize_features(state: QuantizerState, features: Tensor, cfg: QuantizerConfig) -> Tensor:
    """Quantise features: ``[B, M, F] -> int64 [B, T, K]`` with T = F / combine_time_steps (reference 2).

    ``[B, T]`` for a single codebook under ``squeeze_single``. Padded frames are quantised too. The projection is in
    float32 (float64 for float64 features), the search in ``cfg.precision``. Raises ``ValueError`` if ``F`` is not a
    multiple of ``combine_time_steps``, if ``M`` does not match the projection, or for unknown settings.
    """
    if cfg.dist_fn not in ("l2", "cosine"):
        raise ValueError(f"quantizer: unknown dist_fn {cfg.dist_fn!r}; choose 'l2' or 'cosine'.")
    if cfg.precision not in ("float64", "float32"):
        raise ValueError(f"quantizer: unknown precision {cfg.precision!r}; choose 'float64' or 'float32'.")
    with torch.autocast(features.device.type, enabled=False):
        points = _project(state, features, cfg)  # [B, T, K, dim]
        batch, steps, books, dim = points.shape
        flat = points.reshape(batch * steps, books, dim)
        codebooks = state["codebooks"].to(torch.float64 if cfg.precision == "float64" else torch.float32)
        tokens = torch.stack([_nearest(flat[:, k], codebooks[k], cfg.dist_fn) for k in range(books)], dim=-1)
    tokens = tokens.reshape(batch, steps, books)
    return tokens[..., 0] if cfg.squeeze_single and books == 1 else tokens


def code_vectors(state: QuantizerState, tokens: Tensor, cfg: QuantizerConfig) -> Tensor:
    """Look up the codes of tokens: ``[B, T, K] -> [B, code_dim, T, K]``, ``[B, T] -> [B, code_dim, T]``.

    Tokens of book k are looked up in book k (Q12: the reference permutes the axes wrongly if K > 1). Raises
    ``ValueError`` if the tokens do not match the number of codebooks.
    """
    codebooks = state["codebooks"]
    single = tokens.ndim == 2
    ids = tokens[..., None] if single else tokens
    if ids.ndim != 3 or ids.shape[-1] != codebooks.shape[0]:
        raise ValueError(
            f"quantizer: tokens {list(tokens.shape)} do not fit {codebooks.shape[0]} books; "
            f"pass [B, T, {codebooks.shape[0]}]."
        )
    chosen = torch.stack([book[ids[..., k]] for k, book in enumerate(codebooks.unbind())], dim=-1)  # [B, T, dim, K]
    chosen = chosen.transpose(1, 2)
    return chosen[..., 0] if single else chosen


def _project(state: QuantizerState, features: Tensor, cfg: QuantizerConfig) -> Tensor:
    """Stack frames (frame-major), project, normalise to length 1: ``[B, M, F] -> [B, T, K, dim]``; zeros stay zeros."""
    weight, (books, _, dim) = state["projection"]["weight"], state["codebooks"].shape
    combine = required(cfg.combine_time_steps, "quantizer.combine_time_steps")
    if features.ndim != 3 or features.shape[1] * combine != weight.shape[1]:
        raise ValueError(
            f"quantizer: features {list(features.shape)} with combine_time_steps {combine} do not fit the projection "
            f"{list(weight.shape)}; pass [B, {weight.shape[1] // combine}, F]."
        )
    batch, width, frames = features.shape
    if frames % combine:  # Q9
        raise ValueError(
            f"quantizer: {frames} frames are no multiple of combine_time_steps {combine}; "
            f"pad them (preprocessor.pad_to={2 * combine}) or crop."
        )
    x = features if features.dtype == torch.float64 else features.to(torch.float32)
    x = x.transpose(1, 2).reshape(batch, frames // combine, combine * width)
    if cfg.input_norm:
        x = F.layer_norm(x, (combine * width,))
    projected = linear({"weight": weight.to(x.dtype)}, x)
    return F.normalize(projected.reshape(batch, frames // combine, books, dim), dim=-1)


def _nearest(points: Tensor, codes: Tensor, dist_fn: str) -> Tensor:
    """Index of the nearest code, the lowest in case of a tie: ``[N, dim], [C, dim] -> int64 [N]``.

    ``|z - c|^2 = |z|^2 - 2 (z c - |c|^2 / 2)``, so the search is a matrix product and an argmax, in pieces (Q10).
    """
    z = points.to(codes.dtype)
    offset = codes.square().sum(-1) / -2 if dist_fn == "l2" else codes.new_zeros(codes.shape[0])
    transposed = codes.t()
    pieces = _pieces(z, codes.shape[0])
    ids = torch.cat([torch.addmm(offset, piece, transposed).argmax(-1) for piece in pieces])[: z.shape[0]]
    if dist_fn == "cosine":
        return ids
    # A zero vector (padding) is about equally far from all codes. The reference takes the code of smallest norm, which
    # depends on rounding, so that compiled or on a GPU it may be another. Padding never enters the loss.
    at_zero = torch.linalg.vector_norm(codes, dim=-1).argmin()
    return torch.where((points == 0).all(-1), at_zero, ids)


def _pieces(z: Tensor, classes: int) -> tuple[Tensor, ...]:
    """Split points ``[N, dim]`` into pieces; a compiled graph pads with zeros to have equally many for all ``N``."""
    if torch.compiler.is_compiling():
        filled = F.pad(z, (0, 0, 0, -z.shape[0] % _COMPILED_PIECES))
        return filled.reshape(_COMPILED_PIECES, -1, z.shape[1]).unbind(0)
    scores = _CPU_SCORES if z.device.type == "cpu" else _GPU_SCORES
    return z.split(max(1, scores // classes))

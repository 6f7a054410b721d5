"""Sliding-window self-attention in time and memory linear in the length (Longformer, arXiv 2004.05150).

Queries are split into blocks of ``c = max(left, right)`` frames. A block attends to itself and its two neighbours,
which contain all keys of its windows. All frames attend to the global tokens, if any, and these attend to all frames.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import random
from .attention import MASKED, AttentionParams, check_attention, merge_heads, split_heads
from .dropout import dropout
from .lengths import zero_padding
from .linear import linear
from .types import Key, Tensor


def local_attention(
    params: AttentionParams, x: Tensor, positions: Tensor, valid: Tensor, *, heads: int, left: int, right: int,
    aligned: bool = False, rate: float = 0.0, global_tokens: int = 0, global_spacing: int = 1,
    key: Key | None = None, train: bool = False,
) -> Tensor:  # fmt: skip
    """Attend from frame i to the valid frames i-left..i+right: ``[B, T, D] -> [B, T, D]`` (reference 4.4).

    ``positions [left+right+1, D]`` encode relative positions from ``left`` (key before query) down to ``-right``;
    ``valid`` is bool ``[B, T]``. With ``global_tokens``, frames 0, spacing, 2 spacing, ... are global: every frame
    attends to them, by content only and not again inside its window, and they attend to all valid frames.

    If left and right differ, the reference adds the position scores of the query's own frame and of later frames
    at the wrong end of the window; ``aligned`` adds them to the right keys (Q47).
    """
    check_attention("local_attention", x, positions, valid, left + right + 1)
    query = split_heads(linear(params["query"], x), heads)
    keys = split_heads(linear(params["key"], x), heads)
    values = split_heads(linear(params["value"], x), heads)
    scale = 1.0 / math.sqrt(query.shape[-1])
    relative = split_heads(linear(params["position"], positions), heads)
    by_position = ((query + params["position_bias"][:, None]) * scale) @ relative.transpose(-1, -2)
    window = _Window(x.shape[1], left, right, aligned)
    scores = window.scores((query + params["content_bias"][:, None]) * scale, keys, by_position)
    picks = slice(0, min(x.shape[1], global_tokens * global_spacing), global_spacing)
    tokens = len(range(picks.start, picks.stop, picks.step))
    index = torch.arange(x.shape[1], device=x.device)[picks]
    seen = valid & ~torch.zeros_like(valid).index_fill(1, index, True) if tokens else valid
    scores = torch.where(window.allowed(seen)[:, None], scores, MASKED)
    local_key, global_key = (None, None) if key is None else random.split(key, 2).unbind(0)
    if not tokens:
        weights = dropout(torch.softmax(scores, dim=-1), rate, key=local_key, train=train)
        return linear(params["output"], zero_padding(merge_heads(window.mix(weights, values)), valid))
    global_query, global_keys, global_values = _global_maps(params, x, query, keys, values, heads)
    to_global = (window.blocks(query) * scale) @ global_keys[..., picks, :].transpose(-1, -2)[:, :, None]
    to_global = torch.where(valid[:, None, None, None, picks], to_global, MASKED)
    weights = torch.softmax(torch.cat((to_global, scores), dim=-1), dim=-1)
    weights = dropout(weights, rate, key=local_key, train=train)
    mixed = window.mix(weights[..., tokens:], values)
    mixed = mixed + window.join(weights[..., :tokens] @ global_values[..., picks, :][:, :, None])
    everything = (global_query[..., picks, :] * scale) @ global_keys.transpose(-1, -2)
    everything = torch.softmax(torch.where(valid[:, None, None, :], everything, MASKED), dim=-1)
    by_global = dropout(everything, rate, key=global_key, train=train) @ global_values
    mixed = mixed.scatter(2, index[None, None, :, None].expand_as(by_global), by_global)
    return linear(params["output"], zero_padding(merge_heads(mixed), valid))


def _global_maps(
    params: AttentionParams, x: Tensor, query: Tensor, keys: Tensor, values: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    if "global_query" not in params:
        return query, keys, values
    maps = (params["global_query"], params["global_key"], params["global_value"])
    made = [split_heads(linear(one, x), heads) for one in maps]
    return made[0], made[1], made[2]


class _Window:
    """The block layout of one call: T queries in n blocks of c, each with 3 c keys. Holds sizes, no tensors."""

    def __init__(self, frames: int, left: int, right: int, aligned: bool) -> None:
        self.frames, self.left, self.right, self.aligned = frames, left, right, aligned
        self.size = max(left, right)
        self.fill = -frames % self.size

    def blocks(self, x: Tensor) -> Tensor:
        """Split into blocks: ``[B, H, T, d] -> [B, H, n, c, d]``; the last block is padded with zeros."""
        return F.pad(x, (0, 0, 0, self.fill)).unflatten(2, (-1, self.size))

    def join(self, x: Tensor) -> Tensor:
        """The inverse of ``blocks``: ``[B, H, n, c, d] -> [B, H, T, d]``."""
        return x.flatten(2, 3)[:, :, : self.frames]

    def with_neighbours(self, x: Tensor) -> Tensor:
        """Keys or values of each block and its neighbours: ``[B, H, T, d] -> [B, H, n, 3c, d]``."""
        padded = F.pad(x, (0, 0, self.size, self.fill + self.size))
        return padded.unfold(2, 3 * self.size, self.size).transpose(-1, -2)

    def scores(self, query: Tensor, keys: Tensor, by_position: Tensor) -> Tensor:
        """Content and position scores: ``[B, H, n, c, 3c]``."""
        return self.blocks(query) @ self.with_neighbours(keys).transpose(-1, -2) + self._skew(self.blocks(by_position))

    def _skew(self, scores: Tensor) -> Tensor:
        """Reindex scores from relative positions to keys: ``[..., c, left+right+1] -> [..., c, 3c]``.

        Row a is shifted right by a: rows are padded to one more than the target's length and reshaped to that length.
        """
        gap = scores.new_zeros(*scores.shape[:-1], 2 * self.size - self.left - self.right)
        parts: tuple[Tensor, ...]
        if self.aligned:
            # Pad the shorter side of the window to c positions, at its far end.
            parts = (gap, scores) if self.left < self.right else (scores, gap)
        else:
            parts = (scores[..., : self.left], gap, scores[..., self.left :])
        wide = 3 * self.size
        padded = F.pad(torch.cat(parts, dim=-1), (0, wide + 1 - (2 * self.size + 1)))
        return padded.flatten(-2)[..., : self.size * wide].unflatten(-1, (self.size, wide))

    def allowed(self, seen: Tensor) -> Tensor:
        """Mask of keys that are in the query's window and in ``seen``: bool ``[B, T] -> bool [B, n, c, 3c]``."""
        padded = F.pad(seen, (self.size, self.fill + self.size))
        near = padded.unfold(1, 3 * self.size, self.size)[:, :, None, :]
        query = torch.arange(self.size, device=seen.device)[:, None] + self.size
        distance = query - torch.arange(3 * self.size, device=seen.device)
        return near & (distance <= self.left) & (distance >= -self.right)

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        """Sum the values by their weights: ``[B, H, n, c, 3c], [B, H, T, d] -> [B, H, T, d]``."""
        return self.join(weights @ self.with_neighbours(values))

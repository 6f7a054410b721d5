"""Attention with relative positions as one operator for compiled training on CUDA: no scores in memory.

A score is made again wherever it is needed, from its query, key and position. What a step keeps of it is one bit, the
decision of dropout; the layers of ``attention`` keep and move some ten tensors of that size, a quarter of the memory
traffic of a step of NEST-Large.
"""

from __future__ import annotations

from typing import Any

import torch

from .types import Tensor


def relative_attention(
    query: Tensor, key: Tensor, value: Tensor, relative: Tensor, content_bias: Tensor, position_bias: Tensor,
    valid: Tensor, kept: Tensor | None, rate: float, masked: float,
) -> Tensor:  # fmt: skip
    """Mixed values of all heads, 0 for padded queries: ``query, key, value [B, T, D] -> [B, T, D]``.

    ``relative [2T-1, D]`` are projected positions, ``content_bias, position_bias [H, d_k]`` are u and v, ``valid`` is
    bool ``[B, T]``, ``kept`` the decisions of dropout with ``rate`` from ``random.dropout_bits``, ``masked`` what a
    padded key's score has added.
    """
    made: Tensor
    made, _ = _forward(query, key, value, relative, content_bias, position_bias, valid, kept, rate, masked)
    return made


@torch.library.custom_op("nest_fn::relative_attention", mutates_args=(), device_types="cuda")
def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, relative: torch.Tensor, content_bias: torch.Tensor,
    position_bias: torch.Tensor, valid: torch.Tensor, kept: torch.Tensor | None, rate: float, masked: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    from . import attention_triton

    return attention_triton.forward(query, key, value, relative, content_bias, position_bias, valid, kept, rate, masked)


@_forward.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, relative: torch.Tensor, content_bias: torch.Tensor,
    position_bias: torch.Tensor, valid: torch.Tensor, kept: torch.Tensor | None, rate: float, masked: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    norms = (query.shape[0], content_bias.shape[0], query.shape[1])
    return query.new_empty(query.shape), query.new_empty(norms, dtype=torch.float32)


@torch.library.custom_op("nest_fn::relative_attention_backward", mutates_args=(), device_types="cuda")
def _backward(
    grad: torch.Tensor, out: torch.Tensor, norm: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, relative: torch.Tensor, content_bias: torch.Tensor, position_bias: torch.Tensor,
    valid: torch.Tensor, kept: torch.Tensor | None, rate: float, masked: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    from . import attention_triton_backward

    return attention_triton_backward.backward(
        grad, out, norm, query, key, value, relative, content_bias, position_bias, valid, kept, rate, masked
    )


@_backward.register_fake
def _(
    grad: torch.Tensor, out: torch.Tensor, norm: torch.Tensor, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, relative: torch.Tensor, content_bias: torch.Tensor, position_bias: torch.Tensor,
    valid: torch.Tensor, kept: torch.Tensor | None, rate: float, masked: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    to_query, to_key, to_value = (x.new_empty(x.shape) for x in (query, key, value))
    to_relative, to_content, to_position = (
        x.new_empty(x.shape, dtype=torch.float32) for x in (relative, content_bias, position_bias)
    )
    return to_query, to_key, to_value, to_relative, to_content, to_position


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.rate, ctx.masked = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    made = _backward(grad, *ctx.saved_tensors, ctx.rate, ctx.masked)
    inputs = ctx.saved_tensors[2:8]
    return (*(one.to(given.dtype) for one, given in zip(made, inputs, strict=True)), None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_keep)

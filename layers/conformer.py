"""One Conformer block (arXiv 2005.08100, figure 1; reference 4.6)."""

from __future__ import annotations

from typing import NamedTuple, TypedDict

from . import random
from .attention import AttentionParams, attention, init_attention
from .conv_module import ConvModuleParams, ConvModuleState, conv_module, init_conv_module
from .dropout import dropout
from .feed_forward import FeedForwardParams, feed_forward, init_feed_forward
from .local_attention import local_attention
from .norm import NormParams, init_norm, layer_norm
from .types import Gather, Key, Tensor


class ConformerSpec(NamedTuple):
    """Hyperparameters of one block; all blocks of an encoder share them."""

    width: int
    heads: int
    hidden: int  # of the feed-forward modules
    kernel: int  # frames
    conv_context: tuple[int, int]  # (left, right) frames of the depthwise convolution
    bias: bool = True
    norm: str = "batch_norm"
    masked_norm: bool = False
    relative: bool = True
    tied: bool = False  # True: u and v belong to the encoder, not to the layer
    window: tuple[int, int] | None = None  # (left, right) frames of local attention
    aligned: bool = False  # if left != right: add position scores to the right keys (Q47)
    global_tokens: int = 0
    global_spacing: int = 1
    global_separate: bool = False
    fused: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0


class ConformerParams(TypedDict):
    """Four modules, each with a layer norm before it, and a final layer norm."""

    norm_feed_forward1: NormParams
    feed_forward1: FeedForwardParams
    norm_attention: NormParams
    attention: AttentionParams
    norm_conv: NormParams
    conv: ConvModuleParams
    norm_feed_forward2: NormParams
    feed_forward2: FeedForwardParams
    norm_out: NormParams


class ConformerState(TypedDict):
    """The convolution module's running statistics."""

    conv: ConvModuleState


class BlockContext(NamedTuple):
    """Inputs that all blocks of one forward pass share."""

    valid: Tensor  # bool [B, T]: True for frames that are not padding
    context: Tensor | None  # bool [T, T], (query, key): True where attention is allowed; None: everywhere
    positions: Tensor | None  # relative position encodings [P, D]; None for absolute positions
    biases: AttentionParams  # u and v if all layers share them, else empty
    gather: Gather | None = None  # all-gather over processes, for batch statistics of the whole batch


def init_conformer_layer(key: Key, spec: ConformerSpec) -> tuple[ConformerParams, ConformerState]:
    """Initialise one block as torch.nn does (reference 4.8)."""
    first, attend, convolve, second = random.split(key, 4)
    conv_params, conv_state = init_conv_module(convolve, spec.width, spec.kernel, bias=spec.bias, norm=spec.norm)
    params: ConformerParams = {
        "norm_feed_forward1": init_norm(spec.width),
        "feed_forward1": init_feed_forward(first, spec.width, spec.hidden, spec.bias),
        "norm_attention": init_norm(spec.width),
        "attention": init_attention(
            attend, spec.width, spec.heads, bias=spec.bias, relative=spec.relative, tied=spec.tied,
            separate_global=spec.global_separate,
        ),
        "norm_conv": init_norm(spec.width),
        "conv": conv_params,
        "norm_feed_forward2": init_norm(spec.width),
        "feed_forward2": init_feed_forward(second, spec.width, spec.hidden, spec.bias),
        "norm_out": init_norm(spec.width),
    }  # fmt: skip
    return params, {"conv": conv_state}


def conformer_layer(
    params: ConformerParams, state: ConformerState, x: Tensor, block_context: BlockContext, spec: ConformerSpec, *,
    key: Key | None = None, train: bool = False,
) -> tuple[Tensor, ConformerState]:  # fmt: skip
    """One block: ``[B, T, D] -> [B, T, D]`` and the new state (reference 4.6).

    Residual branches in order: feed-forward with factor 1/2, self-attention, convolution, feed-forward with factor 1/2;
    then a layer norm.
    """
    inner1, branch1, weights, attended, convolved, inner2, branch2 = _keys(key, train)

    def residual(x: Tensor, y: Tensor, key: Key | None, factor: float = 1.0) -> Tensor:
        return x + factor * dropout(y, spec.dropout, key=key, train=train)

    y = layer_norm(params["norm_feed_forward1"], x)
    x = residual(x, feed_forward(params["feed_forward1"], y, rate=spec.dropout, key=inner1, train=train), branch1, 0.5)
    y = layer_norm(params["norm_attention"], x)
    x = residual(x, _attend(params["attention"], y, block_context, spec, weights, train), attended)
    y = layer_norm(params["norm_conv"], x)
    y, conv_state = conv_module(
        params["conv"], state["conv"], y, block_context.valid, context=spec.conv_context, norm=spec.norm,
        masked_norm=spec.masked_norm, gather=block_context.gather, train=train,
    )  # fmt: skip
    x = residual(x, y, convolved)
    y = layer_norm(params["norm_feed_forward2"], x)
    x = residual(x, feed_forward(params["feed_forward2"], y, rate=spec.dropout, key=inner2, train=train), branch2, 0.5)
    return layer_norm(params["norm_out"], x), {"conv": conv_state}


def _keys(key: Key | None, train: bool) -> tuple[Key | None, ...]:
    """One key for each dropout in the block, in the order of the calls."""
    return (None,) * 7 if key is None or not train else tuple(random.split(key, 7).unbind(0))


def _attend(
    params: AttentionParams, x: Tensor, block_context: BlockContext, spec: ConformerSpec, key: Key | None, train: bool
) -> Tensor:
    params = {**params, **block_context.biases}
    if spec.window is None:
        return attention(
            params, x, block_context.positions, block_context.valid, block_context.context,
            heads=spec.heads, rate=spec.attention_dropout, fused=spec.fused, key=key, train=train,
        )  # fmt: skip
    assert block_context.positions is not None
    return local_attention(
        params, x, block_context.positions, block_context.valid,
        heads=spec.heads, left=spec.window[0], right=spec.window[1], aligned=spec.aligned,
        rate=spec.attention_dropout, global_tokens=spec.global_tokens,
        global_spacing=spec.global_spacing, key=key, train=train,
    )  # fmt: skip

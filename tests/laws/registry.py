"""Every layer once, over its options, for the laws of this folder, each of which is written once.

``LEAVES`` and ``COMPOSITES`` are functions of ``layers/``; ``ENCODERS`` are whole encoders; ``model()`` is the loss,
from waveform to number. An example is data and one pure function; laws must not change either.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from nest_fn import Config, init, loss
from nest_fn.config import EncoderConfig
from nest_fn.encoder import encode, init_encoder
from nest_fn.layers.attention import attention, context_mask, init_attention
from nest_fn.layers.conformer import BlockContext, ConformerSpec, conformer_layer, init_conformer_layer
from nest_fn.layers.conv import conv, init_conv
from nest_fn.layers.conv_module import conv_module, init_conv_module
from nest_fn.layers.dropout import dropout, stochastic_depth
from nest_fn.layers.feed_forward import feed_forward, init_feed_forward
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.linear import init_linear, linear
from nest_fn.layers.local_attention import local_attention
from nest_fn.layers.norm import (
    batch_norm,
    group_norm,
    init_batch_norm_state,
    init_norm,
    instance_norm,
    layer_norm,
    scale_shift,
)
from nest_fn.layers.positions import absolute_positions, relative_positions, shift
from nest_fn.layers.subsampling import SubsamplingSpec, init_subsampling, subsample

from .example import B, D, Example, H, Result, T, Tree, frames, jolt, key, no_gradient, noise, scalar

__all__ = ["Example", "Result", "jolt", "key", "no_gradient", "noise", "scalar"]


def plain(name: str, function: Callable[..., torch.Tensor], params: Tree, x: torch.Tensor, **options: Any) -> Example:
    """A layer without memory, chance or lengths."""
    return Example(name, lambda p, s, i, k, t: Result(function(p, i["x"])), jolt(params), {}, {"x": x}, **options)


def leaves() -> list[Example]:
    """One affine map, convolution, norm or draw each."""
    channels = noise(B, D, T)
    dropped = lambda p, s, i, k, t: Result(dropout(i["x"], 0.3, key=k, train=t))  # noqa: E731
    deep = lambda p, s, i, k, t: Result(stochastic_depth(i["x"], i["x"].sin(), 0.5, key=k, train=t))  # noqa: E731
    return [
        plain("linear", linear, init_linear(key(), D, 5), noise(B, T, D)),
        plain("linear, no bias", linear, init_linear(key(), D, 5, bias=False), noise(B, T, D)),
        plain("conv 1-d", lambda p, x: conv(p, x, 2, 1), init_conv(key(), D, 6, (3,)), channels),
        plain(
            "conv 1-d, groups, no bias",
            lambda p, x: conv(p, x, 1, 2, D),
            init_conv(key(), D, D, (5,), D, False),
            channels,
        ),
        plain("conv 2-d", lambda p, x: conv(p, x, 2, 1), init_conv(key(), 2, 4, (3, 3)), noise(B, 2, 7, 6)),
        plain(
            "conv 2-d, groups", lambda p, x: conv(p, x, 2, 1, 2), init_conv(key(), 2, 4, (3, 3), 2), noise(B, 2, 7, 6)
        ),
        plain("layer_norm", layer_norm, init_norm(D), noise(B, T, D)),
        plain("group_norm", lambda p, x: group_norm(p, x, 4), init_norm(D), channels),
        plain("instance_norm", lambda p, x: instance_norm(x), {}, channels),
        plain("scale_shift", scale_shift, init_norm(D), channels),
        norm_example("batch_norm", False),
        norm_example("batch_norm, masked", True),
        Example("dropout", dropped, inputs={"x": noise(B, T, D)}, chance=True),
        Example("stochastic_depth", deep, inputs={"x": noise(B, T, D)}, chance=True),
        plain("shift", lambda p, x: shift(x), {}, noise(B, H, T, 2 * T - 1)),
        plain("relative_positions", lambda p, x: x + relative_positions(T - 1, 0, D, x), {}, noise(B, T, D)),
        plain("absolute_positions", lambda p, x: x + absolute_positions(T, D, x), {}, noise(B, T, D)),
    ]


def norm_example(name: str, masked: bool) -> Example:
    def run(p: Tree, s: Tree, i: Tree, k: Any, train: bool) -> Result:
        valid = valid_mask(i["lengths"], i["x"].shape[1])
        y, state = batch_norm(p, s, i["x"].transpose(1, 2), valid if masked else None, train=train)
        return Result(y.transpose(1, 2), i["lengths"], state)

    return Example(name, run, jolt(init_norm(D)), jolt(init_batch_norm_state(D)), frames(), coupled_rows=True)


def attention_example(
    name: str, *, bias: bool = True, relative: bool = True, context: tuple[int, int, str] | None = None,
    fused: bool = False, rate: float = 0.3,
) -> Example:  # fmt: skip
    def run(p: Tree, s: Tree, i: Tree, k: Any, train: bool) -> Result:
        x, width = i["x"], i["x"].shape[1]
        positions = relative_positions(width - 1, width - 1, D, x) if relative else None
        around = None if context is None else context_mask(width, *context, x.device)
        valid = valid_mask(i["lengths"], width)
        y = attention(p, x, positions, valid, around, heads=H, rate=rate, fused=fused, key=k, train=train)
        return Result(y, i["lengths"])

    params = jolt(init_attention(key(), D, H, bias=bias, relative=relative))
    return Example(
        f"attention, {name}", run, params, {}, frames(), chance=rate > 0.0, forward_mode=not fused,
        without_gradient=("key.bias",),
    )  # fmt: skip


def local_example(
    name: str, left: int, right: int, *, aligned: bool = False, tokens: int = 0, separate: bool = False
) -> Example:
    def run(p: Tree, s: Tree, i: Tree, k: Any, train: bool) -> Result:
        x, valid = i["x"], valid_mask(i["lengths"], i["x"].shape[1])
        y = local_attention(
            p, x, relative_positions(left, right, D, x), valid, heads=H, left=left, right=right, aligned=aligned,
            rate=0.3, global_tokens=tokens, global_spacing=3, key=k, train=train,
        )  # fmt: skip
        return Result(y, i["lengths"])

    params = jolt(init_attention(key(), D, H, separate_global=separate))
    # Beside global tokens, which are seen without u, a key's bias moves the window's scores alone.
    falls_out = () if tokens else ("key.bias",)
    return Example(f"local attention, {name}", run, params, {}, frames(), chance=True, without_gradient=falls_out)


def conv_module_example(
    name: str, norm: str, *, masked: bool = False, bias: bool = True, context: tuple[int, int] = (2, 2)
) -> Example:
    def run(p: Tree, s: Tree, i: Tree, k: Any, train: bool) -> Result:
        valid = valid_mask(i["lengths"], i["x"].shape[1])
        y, state = conv_module(p, s, i["x"], valid, context=context, norm=norm, masked_norm=masked, train=train)
        return Result(y, i["lengths"], state)

    params, state = init_conv_module(key(), D, 5, bias=bias, norm=norm)
    # What is the same for all frames of a channel goes out again with the mean.
    falls_out = ("depthwise.bias",) if norm in ("batch_norm", "instance_norm") else ()
    return Example(
        f"conv_module, {name}", run, jolt(params), jolt(state), frames(), coupled_rows=norm == "batch_norm",
        padding=norm not in ("instance_norm", "group_norm4"), without_gradient=falls_out,
    )  # fmt: skip


def conformer_example(name: str, **options: Any) -> Example:
    spec = ConformerSpec(
        D, H, 2 * D, 5, options.pop("conv_context", (2, 2)), dropout=0.2, attention_dropout=0.2, **options
    )

    def run(p: Tree, s: Tree, i: Tree, k: Any, train: bool) -> Result:
        x, width = i["x"], i["x"].shape[1]
        left, right = spec.window or (width - 1, width - 1)
        positions = relative_positions(left, right, D, x) if spec.relative else None
        biases = p["biases"] if spec.tied else {}
        around = BlockContext(valid_mask(i["lengths"], width), None, positions, biases)
        y, state = conformer_layer(p["layer"], s, x, around, spec, key=k, train=train)
        return Result(y, i["lengths"], state)

    params, state = init_conformer_layer(key(), spec)
    trees = {"layer": params}
    if spec.tied:
        trees["biases"] = {"content_bias": torch.zeros(H, D // H), "position_bias": torch.zeros(H, D // H)}
    falls_out = () if spec.global_tokens else ("key.bias",)
    falls_out += ("conv.depthwise.bias",) if spec.norm == "batch_norm" else ()
    return Example(
        f"conformer_layer, {name}", run, jolt(trees), jolt(state), frames(), chance=True,
        coupled_rows=spec.norm == "batch_norm", forward_mode=not spec.fused, without_gradient=falls_out,
    )  # fmt: skip


def feed_forward_example() -> Example:
    def run(p: Tree, s: Tree, i: Tree, k: Any, train: bool) -> Result:
        return Result(feed_forward(p, i["x"], rate=0.3, key=k, train=train))

    return Example("feed_forward", run, jolt(init_feed_forward(key(), D, 16)), {}, {"x": noise(B, T, D)}, chance=True)


def subsampling_example(name: str, kind: str | None, factor: int, **options: Any) -> Example:
    spec = SubsamplingSpec(kind, factor, 10, D, 4, **options)

    def run(p: Tree, s: Tree, i: Tree, k: Any, train: bool) -> Result:
        return Result(*subsample(p, i["x"], i["lengths"], spec))

    inputs = {"x": noise(B, 33, 10), "lengths": torch.tensor([33, 22, 9])}
    params = jolt(init_subsampling(key(), spec))
    # A last stack may reach into the padding (Q26), which the reference relies on to be zeros.
    padding = spec.masked and not (kind in ("stacking", "stacking_norm") and factor == 4)
    return Example(f"subsample, {name}", run, params, {}, inputs, padding=padding)


def composites() -> list[Example]:
    """Attention, convolution modules, blocks and subsamplings."""
    return [
        feed_forward_example(),
        attention_example("relative"),
        attention_example("relative, no bias", bias=False),
        attention_example("plain", relative=False),
        attention_example("regular context", context=(3, 1, "regular")),
        attention_example("left context", context=(2, -1, "regular")),
        attention_example("chunks", context=(4, 1, "chunked_limited")),
        attention_example("fused kernel", fused=True, rate=0.0),
        local_example("even", 3, 3),
        local_example("more to the left", 4, 2),
        local_example("more to the right", 2, 5),
        local_example("more to the left, aligned", 4, 2, aligned=True),
        local_example("more to the right, aligned", 2, 5, aligned=True),
        local_example("global tokens", 3, 3, tokens=2),
        local_example("separate global tokens", 3, 2, tokens=2, separate=True),
        conv_module_example("batch norm", "batch_norm"),
        conv_module_example("masked batch norm", "batch_norm", masked=True),
        conv_module_example("layer norm, causal", "layer_norm", context=(4, 0)),
        conv_module_example("instance norm", "instance_norm"),
        conv_module_example("fused batch norm, no bias", "fused_batch_norm", bias=False, context=(1, 3)),
        conv_module_example("group norm", "group_norm4"),
        conformer_example("batch norm"),
        conformer_example("no bias, masked batch norm", bias=False, masked_norm=True),
        conformer_example("layer norm, tied biases, causal", norm="layer_norm", tied=True, conv_context=(4, 0)),
        conformer_example("plain attention", norm="layer_norm", relative=False),
        conformer_example("local attention", norm="layer_norm", window=(3, 2), global_tokens=1),
        subsampling_example("dw_striding 8", "dw_striding", 8),
        subsampling_example("dw_striding 2", "dw_striding", 2),
        subsampling_example("dw_striding 8, causal", "dw_striding", 8, causal=True),
        subsampling_example("dw_striding 4, legacy", "dw_striding", 4, masked=False),
        subsampling_example("striding 4", "striding", 4),
        subsampling_example("striding 4, causal", "striding", 4, causal=True),
        subsampling_example("vggnet 4", "vggnet", 4),
        subsampling_example("stacking 4", "stacking", 4),
        subsampling_example("stacking_norm 4", "stacking_norm", 4),
        subsampling_example("stacking 3", "stacking", 3),
        subsampling_example("none", None, 1),
    ]


def encoder_example(name: str, **options: Any) -> Example:
    small = {"feat_in": 10, "n_layers": 2, "d_model": D, "n_heads": H, "ff_expansion_factor": 2}
    small |= {"subsampling_factor": 2, "subsampling_conv_channels": 4, "conv_kernel_size": 5}
    cfg = EncoderConfig(**(small | options))

    def run(p: Tree, s: Tree, i: Tree, k: Any, train: bool) -> Result:
        y, lengths, state = encode(p, s, i["x"].transpose(1, 2), i["lengths"], cfg, key=k, train=train)
        return Result(y.transpose(1, 2), lengths, state)

    params, state = init_encoder(key(), cfg)
    inputs = {"x": noise(B, 29, 10), "lengths": torch.tensor([29, 18, 9])}
    falls_out = ("key.bias", "conv.depthwise.bias") if cfg.conv_norm_type == "batch_norm" else ("key.bias",)
    return Example(
        f"encode, {name}", run, jolt(params), jolt(state), inputs, chance=True,
        coupled_rows=cfg.conv_norm_type == "batch_norm", forward_mode=not cfg.use_pytorch_sdpa,
        without_gradient=falls_out,
    )  # fmt: skip


def encoders() -> list[Example]:
    """Whole encoders of two blocks, over what only they decide."""
    contexts = {"att_context_size": ((4, 1), (-1, -1), (2, 0)), "att_context_probs": (0.2, 0.5, 0.3)}
    layered = {"conv_norm_type": "layer_norm"}
    only = {**layered, "dropout": 0.0, "dropout_pre_encoder": 0.0, "dropout_att": 0.0}
    return [
        encoder_example("default"),
        encoder_example("stochastic depth", stochastic_depth_drop_prob=0.5, **only),
        encoder_example("dropped positions, no scaling", dropout_emb=0.3, xscaling=False, **layered),
        encoder_example("drawn context", **contexts, **only),
        encoder_example("tied biases, another width out", untie_biases=False, feat_out=6, **layered),
        encoder_example("absolute positions", self_attention_model="abs_pos", **layered),
        encoder_example("local attention", self_attention_model="rel_pos_local_attn", att_context_size=((3, 2),)),
        encoder_example("pooling", reduction="pooling", reduction_factor=2, reduction_position=0, **layered),
        encoder_example("reduction by striding", reduction="striding", reduction_factor=2, **layered),
        encoder_example("fused kernel", use_pytorch_sdpa=True, dropout_att=0.0, **layered),
        encoder_example("masked batch norm", masked_batch_norm=True),
    ]


LEAVES, COMPOSITES, ENCODERS = leaves(), composites(), encoders()
ALL = [*LEAVES, *COMPOSITES, *ENCODERS]


def tiny(*overrides: str) -> Config:
    """The tiny preset with dither and with a mask in every utterance."""
    return Config.preset("tiny", ["masking.mask_prob=0.03", "masking.force_block=true", *overrides])


def batch(rows: int = 3, seconds: float = 1.0, seed: int = 7) -> dict[str, torch.Tensor]:
    """Noise of three lengths; the second signal is a noisier first."""
    width = int(16000 * seconds)
    clean = 0.1 * noise(rows, width, seed=seed)
    lengths = torch.tensor([width - 2400 * (row % 3) for row in range(rows)])
    noisy = clean + 0.05 * noise(rows, width, seed=seed + 1)
    return {"audio": clean, "audio_len": lengths, "noisy_audio": noisy, "noisy_audio_len": lengths.clone()}


@functools.cache
def model(*overrides: str) -> Example:
    """The whole tiny model, from waveform to loss (``y`` is a scalar)."""
    cfg = tiny(*overrides)

    def run(p: Tree, s: Tree, i: Tree, k: Any, train: bool) -> Result:
        value, (_, state) = loss(p, s, i, cfg, key=k, train=train)
        return Result(value, None, state)

    params, state = init(key(), cfg)
    # Small moves: the codebooks' rows must stay on the sphere.
    state = {**state, "encoder": jolt(state["encoder"])}
    return Example(
        "loss", run, params, state, batch(), chance=True, coupled_rows=True,
        without_gradient=("key.bias", "conv.depthwise.bias"),
    )  # fmt: skip

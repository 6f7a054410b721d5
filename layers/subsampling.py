"""Subsampling from frames of 10 ms to encoder frames, as in FastConformer (arXiv 2305.05084; reference 4.3)."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F

from . import random
from .conv import bfloat16_on_cpu, conv, init_conv
from .lengths import strided, valid_mask
from .linear import init_linear, linear
from .norm import init_norm, layer_norm
from .subsampling_fused import convolve_twice
from .types import Key, Params, Tensor


class SubsamplingSpec(NamedTuple):
    """Hyperparameters of a subsampling module; ``kind`` None is one linear layer without subsampling."""

    kind: str | None  # dw_striding, striding, vggnet, stacking, stacking_norm, None
    factor: int
    features: int  # M
    width: int  # D
    channels: int
    causal: bool = False
    masked: bool = True  # False: padding affects the last valid frames, as in the reference up to 2.4

    @property
    def stages(self) -> int:
        """Number of stages, each with stride 2."""
        return self.factor.bit_length() - 1

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros added before and after, on both axes, by each strided 3x3 convolution."""
        return (2, 1) if self.causal else (1, 1)


CONVOLUTIONAL = ("dw_striding", "striding", "vggnet")
STACKING = ("stacking", "stacking_norm")


def check_subsampling(spec: SubsamplingSpec) -> None:
    """Raise ``ValueError`` for an unknown kind or a factor that this kind does not support."""
    if spec.kind is not None and spec.kind not in CONVOLUTIONAL + STACKING:
        known = ", ".join(CONVOLUTIONAL + STACKING)
        raise ValueError(f"subsampling: no kind is called '{spec.kind}'; use one of {known}, or None.")
    if spec.kind in CONVOLUTIONAL and (spec.factor < 2 or spec.factor & (spec.factor - 1)):
        raise ValueError(f"subsampling: {spec.kind} halves, so factor {spec.factor} must be 2, 4, 8, 16, ...")
    if spec.kind in STACKING and spec.factor < 2:
        raise ValueError(f"subsampling: {spec.kind} with factor {spec.factor} stacks nothing; use at least 2, or None.")


def subsampled_length(length: Tensor | int, spec: SubsamplingSpec, frames: int) -> Tensor | int:
    """Encoder frames of utterances of ``length`` frames, an int or a tensor ``[B]``, in a batch of width ``frames``."""
    if spec.kind is None:
        return length
    if spec.kind in STACKING:
        # Depends on the batch's padding: a short row may have one frame less than in a batch of its own (Q26).
        return (length + -frames % spec.factor) // spec.factor
    for _ in range(spec.stages):
        length = strided(length, *_geometry(spec))
    return length


def _geometry(spec: SubsamplingSpec) -> tuple[int, int, int]:
    """(kernel, stride, sum of the padding on both sides) of the strided layer of a stage."""
    return (2, 2, 0) if spec.kind == "vggnet" else (3, 2, sum(spec.padding))


def init_subsampling(key: Key, spec: SubsamplingSpec) -> Params:
    """Initialise as torch.nn does: ``stages`` (convolutional kinds), ``out``, ``norm`` (stacking_norm).

    Raises ``ValueError`` as ``check_subsampling`` does.
    """
    check_subsampling(spec)
    out_key, *keys = random.split(key, 1 + max(spec.stages, 0))
    if spec.kind not in CONVOLUTIONAL:
        stack = spec.factor if spec.kind in STACKING else 1
        params: Params = {"out": init_linear(out_key, spec.features * stack, spec.width)}
        if spec.kind == "stacking_norm":
            params["norm"] = init_norm(spec.features)
        return params
    bins = spec.features
    for _ in range(spec.stages):
        bins = cast(int, strided(bins, *_geometry(spec), ceil=spec.kind == "vggnet"))
    stages = [_init_stage(stage_key, spec, index == 0) for index, stage_key in enumerate(keys)]
    return {"stages": stages, "out": init_linear(out_key, spec.channels * bins, spec.width)}


def _init_stage(key: Key, spec: SubsamplingSpec, first: bool) -> Params:
    """Initialise one stage; of ``dw_striding``, the first is a full convolution, as it has one input channel."""
    one, two = random.split(key, 2)
    channels, inputs = spec.channels, 1 if first else spec.channels
    if spec.kind == "vggnet":
        return {"conv1": init_conv(one, inputs, channels, (3, 3)), "conv2": init_conv(two, channels, channels, (3, 3))}
    if spec.kind == "striding" or first:
        return {"conv": init_conv(one, inputs, channels, (3, 3))}
    return {
        "depthwise": init_conv(one, channels, channels, (3, 3), groups=channels),
        "pointwise": init_linear(two, channels, channels),
    }


def subsample(params: Params, x: Tensor, lengths: Tensor, spec: SubsamplingSpec) -> tuple[Tensor, Tensor]:
    """Subsample features: ``[B, F, M]``, lengths ``[B]`` in frames -> ``[B, T, D]``, lengths ``[B]`` in encoder frames.

    Raises ``ValueError`` if ``x`` has another shape.
    """
    if x.ndim != 3 or x.shape[-1] != spec.features:
        raise ValueError(f"subsample: x is {list(x.shape)}, want [B, F, {spec.features}].")
    new_lengths = cast(Tensor, subsampled_length(lengths, spec, x.shape[1]))
    if spec.kind is None:
        return linear(params["out"], x), lengths
    if spec.kind in STACKING:
        x = F.pad(x, (0, 0, 0, -x.shape[1] % spec.factor))
        if spec.kind == "stacking_norm":
            x = layer_norm(params["norm"], x)
        return linear(params["out"], x.unflatten(1, (-1, spec.factor)).flatten(2)), new_lengths
    # [B, F, M] -> [B, 1, F, M]: time is height, frequency is width.
    x, stages = _mask(x[:, None], lengths, spec), params["stages"]
    if _is_fused(x, spec):
        (x, lengths), stages = _first_two_stages(stages, x[:, 0], lengths, spec), stages[2:]
    for stage in stages:
        x, lengths = _stage(stage, x, lengths, spec)
    # [B, C, T, M'] -> [B, T, C M']: channel-major, as in the reference's weights.
    return linear(params["out"], x.transpose(1, 2).flatten(2)), new_lengths


def _is_fused(x: Tensor, spec: SubsamplingSpec) -> bool:
    """Whether one operator makes the first two convolutions: compiled on CUDA, where ``x`` has no gradient."""
    return (
        torch.compiler.is_compiling()
        and x.is_cuda
        and not x.requires_grad
        and x.dtype in (torch.bfloat16, torch.float32)
        and spec.kind == "dw_striding"
        and spec.stages > 1
    )


def _first_two_stages(stages: Any, x: Tensor, lengths: Tensor, spec: SubsamplingSpec) -> tuple[Tensor, Tensor]:
    """As ``_stage`` twice: ``[B, F, M] -> [B, C, T, M']`` and the lengths."""

    def after(n: Any) -> Any:
        return strided(n, *_geometry(spec))

    frames, bins = after(x.shape[1]), after(x.shape[2])
    kept, shape = after(lengths), (bins, after(frames), after(bins))
    kept = kept if spec.masked else torch.full_like(kept, frames)
    y = convolve_twice(stages[0]["conv"], stages[1]["depthwise"], x, kept, shape, spec.padding[0])
    y = linear(stages[1]["pointwise"], y).permute(0, 3, 1, 2)
    twice = after(after(lengths))
    return F.relu(_mask(y, twice, spec)), twice


def _mask(x: Tensor, lengths: Tensor, spec: SubsamplingSpec) -> Tensor:
    """Set padded frames of ``[B, C, T, M]`` to 0.

    The reference masks before every layer. Masking only before layers with a kernel larger than 1 is equivalent,
    because ReLU and 1x1 convolutions do not mix frames.
    """
    if not spec.masked:
        return x
    return x * valid_mask(lengths, x.shape[2])[:, None, :, None].to(x.dtype)


def _stage(stage: Params, x: Tensor, lengths: Tensor, spec: SubsamplingSpec) -> tuple[Tensor, Tensor]:
    """One stage, ``[B, C, T, M] -> [B, C, T', M']``, and its lengths; padded frames are 0, before it and after it.

    The mask comes before the ReLU, not after it, so that its result is all that the backward pass keeps.
    """
    strided_lengths = cast(Tensor, strided(lengths, *_geometry(spec)))
    if spec.kind == "vggnet":
        x = F.relu(_mask(conv(stage["conv1"], x, padding=1), lengths, spec))
        x = F.relu(_mask(conv(stage["conv2"], x, padding=1), lengths, spec))
        # Pooling rounds the width of the tensor up but the lengths down, as in the reference.
        return _mask(F.max_pool2d(x, 2, ceil_mode=True), strided_lengths, spec), strided_lengths
    if "conv" in stage and x.shape[1] == 1:
        return F.relu(_conv_of_one_channel(stage["conv"], x, strided_lengths, spec)), strided_lengths
    if "conv" in stage:
        x = _strided_conv(stage["conv"], x, spec, groups=1)
    else:
        x = _strided_conv(stage["depthwise"], x, spec, groups=spec.channels)
        # A 1x1 convolution is a linear layer over channels, which are the last axis in memory here.
        x = linear(stage["pointwise"], x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return F.relu(_mask(x, strided_lengths, spec)), strided_lengths


def _conv_of_one_channel(params: Any, x: Tensor, lengths: Tensor, spec: SubsamplingSpec) -> Tensor:
    """3x3 convolution with stride 2 of one channel, as a matrix product of patches: ``[B, 1, F, M] -> [B, C, T, M']``.

    The result is the largest tensor of the encoder. It comes in channels-last memory format, which PyTorch's
    convolution does not give for a single channel, and the gradient of the weight is one product over all frames.
    """
    before, after = spec.padding
    patches = F.pad(x[:, 0], (before, after, before, after)).unfold(1, 3, 2).unfold(2, 3, 2)  # [B, T, M', 3, 3]
    # The bias is the weight of a tenth number that is 1: no pass of its own over the result and its gradient.
    patches = F.pad(patches.flatten(3), (0, 1), value=1.0)
    if spec.masked:  # as ``_mask`` does with the result, but of ten numbers instead of C
        patches = patches * valid_mask(lengths, patches.shape[1])[:, :, None, None].to(x.dtype)
    weight = torch.cat((params["weight"].flatten(1).T, params["bias"][None]))  # [10, C], by rows: so is its gradient
    if bfloat16_on_cpu(weight) and spec.kind == "dw_striding" and spec.stages > 1:
        # The depthwise convolution that follows wants float32.
        patches, weight = patches.float(), weight.float()
    return (patches @ weight).permute(0, 3, 1, 2)


def _strided_conv(params: Any, x: Tensor, spec: SubsamplingSpec, groups: int) -> Tensor:
    """3x3 convolution with stride 2 in channels-last memory format: about twice as fast on CPU, preferred on GPUs."""
    before, after = spec.padding
    padding = before
    if before != after:
        x, padding = F.pad(x, (before, after, before, after)), 0
    # Equivalent to contiguous(memory_format=channels_last), which vmap does not support.
    x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return conv(params, x, stride=2, padding=padding, groups=groups)

"""Consistency checks of the model's settings, before anything is allocated; ``checks_training`` checks those of a run.

The functions record problems by key path and do not raise. Messages cite the reference's quirk (Q1 to Q47), if any.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from nest_fn.files.quoting import shown

from . import derive
from .model import EncoderConfig, PreprocessorConfig
from .parse.problems import Problems

if TYPE_CHECKING:
    from . import Config

_CONVOLUTIONS = ("dw_striding", "striding", "vggnet")
_BROKEN_SUBSAMPLING = ("striding_conv1d", "dw_striding_conv1d")
_WINDOWS = ("hann", "hamming", "blackman", "bartlett")
_INITS = ("xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal")


def one_of(problems: Problems, path: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Record a problem if ``value`` is not one of the choices; messages show ``None`` as null."""
    names = ", ".join("null" if choice is None else str(choice) for choice in choices)
    problems.require(value in choices, path, f"must be one of {names}; got {shown(value)}")


def check_model(config: Config, problems: Problems) -> None:
    """Check all settings of the model."""
    one_of(problems, "mask_position", config.mask_position, ("pre_conv", "post_conv"))
    one_of(problems, "compat", config.compat, ("current", "legacy"))
    _check_derived(config, problems)
    _check_preprocessor(config.preprocessor, problems)
    _check_spectrum(config.preprocessor, problems)
    _check_subsampling(config.encoder, problems)
    _check_encoder(config.encoder, problems)
    _check_attention(config.encoder, problems)
    _check_convolution(config.encoder, problems)
    _check_heads(config, problems)
    _check_frames(config, problems)


def _check_derived(config: Config, problems: Problems) -> None:
    for (name, field), value in derive.derived(config).items():
        given = getattr(getattr(config, name), field)
        why = f"is {given}, the rest of the config makes it {value}; leave it out (null) or change the rest"
        problems.require(given == value, f"{name}.{field}", why)


def _check_preprocessor(section: PreprocessorConfig, problems: Problems) -> None:
    path = "preprocessor."
    for samples, seconds in (("n_window_size", "window_size"), ("n_window_stride", "window_stride")):
        given = sum(getattr(section, name) is not None for name in (samples, seconds))
        if given != 1:
            came = "both are given" if given else "neither is given"
            problems.add(path + samples, f"(samples) excludes '{seconds}' (seconds), and one of them is needed; {came}")
        elif min(length := section.window_length, hop := section.hop_length) < 1:
            problems.add(path + seconds, f"makes a window of {length} and a hop of {hop} samples; both must be above 0")
    one_of(problems, path + "window", section.window, _WINDOWS)
    one_of(problems, path + "mel_norm", section.mel_norm, ("slaney", None))
    one_of(problems, path + "normalize", section.normalize, ("per_feature", "all_features", "fixed", None))
    for field in ("fixed_mean", "fixed_std"):
        values = getattr(section, field)
        given = len(values) if values is not None else 0
        wanted = section.features if section.normalize == "fixed" else 0
        problems.require(
            given == wanted, path + field, f"has {given} values; normalize={section.normalize} wants {wanted}"
        )


def _check_spectrum(section: PreprocessorConfig, problems: Problems) -> None:
    path, half = "preprocessor.", section.sample_rate / 2
    high = half if section.highfreq is None else section.highfreq
    band = f"must lie in (lowfreq, sample_rate / 2] = ({section.lowfreq}, {half}]; got {high}"
    problems.require(section.lowfreq < high <= half, path + "highfreq", band)
    length, fft = section.window_length, section.fft_length
    problems.require(fft >= length, path + "n_fft", f"is {fft}, shorter than the window of {length} samples")
    one_of(problems, path + "log_zero_guard_type", section.log_zero_guard_type, ("add", "clamp"))
    guard = section.log_zero_guard_value
    valid = guard in ("tiny", "eps") if isinstance(guard, str) else guard > 0
    problems.require(valid, path + "log_zero_guard_value", f"must be above 0, tiny or eps; got {guard!r}")
    if section.exact_pad and section.hop_length % 2:
        problems.add(path + "exact_pad", f"wants an even hop; got {section.hop_length} samples")


def _check_subsampling(section: EncoderConfig, problems: Problems) -> None:
    path, kind, factor = "encoder.", section.subsampling, section.subsampling_factor
    if kind in _BROKEN_SUBSAMPLING:
        problems.add(path + "subsampling", f"'{kind}' fails in the reference (Q25) and is not offered; use dw_striding")
    else:
        one_of(problems, path + "subsampling", kind, (*_CONVOLUTIONS, "stacking", "stacking_norm", None))
    power = factor >= 1 and factor & (factor - 1) == 0
    if kind in _CONVOLUTIONS:
        problems.require(power, path + "subsampling_factor", f"must be a power of two for '{kind}'; got {factor}")
    if section.subsampling_conv_chunking_factor != 1:
        problems.add(
            path + "subsampling_conv_chunking_factor", "must be 1; splitting fails in the reference (Q22, Q24)"
        )
    one_of(problems, path + "reduction", section.reduction, (None, "pooling", "striding"))
    factor, position = section.reduction_factor, section.reduction_position
    if section.reduction is None:
        problems.require(
            factor == 1, path + "reduction_factor", f"is {factor} without 'reduction'; give pooling or striding"
        )
    elif section.reduction == "striding":
        problems.require(factor & (factor - 1) == 0, path + "reduction_factor", f"must be a power of two; got {factor}")
    inside = position is None or -1 <= position < section.n_layers
    problems.require(inside, path + "reduction_position", f"must lie in -1..{section.n_layers - 1}; got {position}")


def _check_encoder(section: EncoderConfig, problems: Problems) -> None:
    path = "encoder."
    one_of(problems, path + "stochastic_depth_mode", section.stochastic_depth_mode, ("linear", "uniform"))
    channels = section.subsampling_conv_channels
    problems.require(channels != 0, path + "subsampling_conv_channels", "must be -1 (d_model) or above 0; got 0")
    out = section.feat_out
    problems.require(out == -1 or out > 0, path + "feat_out", f"must be -1 (off) or above 0; got {out}")
    width, heads = section.d_model, section.n_heads
    if heads >= 1:
        problems.require(
            width % heads == 0, path + "n_heads", f"must divide d_model; {width} / {heads} is no whole number"
        )
    problems.require(
        width % 2 == 0, path + "d_model", f"must be even, positions are sine and cosine pairs; got {width}"
    )


def _check_attention(section: EncoderConfig, problems: Problems) -> None:
    path, kind, contexts = "encoder.", section.self_attention_model, section.att_context_size
    one_of(problems, path + "self_attention_model", kind, ("rel_pos", "rel_pos_local_attn", "abs_pos"))
    one_of(problems, path + "att_context_style", section.att_context_style, ("regular", "chunked_limited"))
    problems.require(len(contexts) > 0, path + "att_context_size", "must hold at least one [left, right]")
    local = kind == "rel_pos_local_attn"
    for left, right in contexts:
        if min(left, right) < -1:
            problems.add(path + "att_context_size", f"[{left}, {right}] must hold -1 (unlimited) or counts of frames")
        elif local and min(left, right) < 1:
            problems.add(path + "att_context_size", f"[{left}, {right}] must be above 0 for rel_pos_local_attn")
        elif section.att_context_style == "chunked_limited" and left > 0 and right >= 0 and left % (right + 1):
            why = f"[{left}, {right}]: left must be a multiple of the chunk, right + 1 = {right + 1}"
            problems.add(path + "att_context_size", why)
    if local and section.att_context_style != "regular":
        problems.add(path + "att_context_style", "must be regular for rel_pos_local_attn")
    probs = section.att_context_probs
    if probs is not None:
        fits = len(probs) == len(contexts) and min(probs, default=-1) >= 0 and abs(sum(probs) - 1) < 1e-6
        why = f"must hold one probability for each of {len(contexts)} contexts, with sum 1; got {list(probs)}"
        problems.require(fits, path + "att_context_probs", why)
    if section.global_tokens and not local:
        problems.add(path + "global_tokens", f"works with rel_pos_local_attn only; got {kind}")


def _check_convolution(section: EncoderConfig, problems: Problems) -> None:
    path, kernel, norm = "encoder.", section.conv_kernel_size, section.conv_norm_type
    odd = kernel >= 1 and kernel % 2 == 1
    problems.require(odd, path + "conv_kernel_size", f"must be odd, so that a frame has a middle; got {kernel}")
    group = re.fullmatch(r"group_norm([1-9][0-9]{0,5})", norm)
    if group:
        divides = section.d_model % int(group[1]) == 0
        problems.require(divides, path + "conv_norm_type", f"{norm}: groups must divide d_model {section.d_model}")
    else:
        names = ("batch_norm", "layer_norm", "instance_norm", "fused_batch_norm", "group_normN (N groups)")
        problems.require(
            norm in names[:-1], path + "conv_norm_type", f"must be one of {', '.join(names)}; got '{norm}'"
        )
    context = section.conv_context_size
    if isinstance(context, str):
        one_of(problems, path + "conv_context_size", context, ("causal", None))
    elif context is not None:
        fits = min(context) >= 0 and sum(context) + 1 == kernel
        why = f"{list(context)}: left + right + 1 must be conv_kernel_size {kernel}"
        problems.require(fits, path + "conv_context_size", why)


def _check_heads(config: Config, problems: Problems) -> None:
    one_of(problems, "quantizer.dist_fn", config.quantizer.dist_fn, ("l2", "cosine"))
    one_of(problems, "quantizer.precision", config.quantizer.precision, ("float64", "float32"))
    one_of(problems, "decoder.init_mode", config.decoder.init_mode, _INITS)


def _check_frames(config: Config, problems: Problems) -> None:
    """Check that the sizes of tokens, masked blocks and padding are compatible."""
    token, block, pad_to = derive.frames_in_token(config), config.masking.block_size, config.preprocessor.pad_to
    if token < 1:
        return
    why = f"is {block} frames, less than the {token} of one token, so that hardly a token could be masked"
    problems.require(block >= token, "masking.block_size", why)
    why = f"must be a multiple of the {token} frames of a token, or 0; got {pad_to}"
    problems.require(pad_to % token == 0, "preprocessor.pad_to", why)

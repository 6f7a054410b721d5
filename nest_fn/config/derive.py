"""Derived values: filled in where a section has ``None``, otherwise compared with the given value."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import Config

Derived = dict[tuple[str, str], Any]


def frames_in_token(config: Config) -> int:
    """Frames of 10 ms per token: the total subsampling factor of the encoder."""
    return encoder_frames_in_token(config) * subsampling_factor(config)


def subsampling_factor(config: Config) -> int:
    """Frames of 10 ms per frame after subsampling; 1 if there is no subsampling."""
    return config.encoder.subsampling_factor if config.encoder.subsampling else 1


def encoder_frames_in_token(config: Config) -> int:
    """Frames after subsampling per frame of the encoder's output."""
    return config.encoder.reduction_factor if config.encoder.reduction else 1


def input_width(config: Config) -> int:
    """Number of features in a frame of the encoder's input."""
    return config.preprocessor.features * config.preprocessor.frame_splicing


def derived(config: Config) -> Derived:
    """All derived values by (section, field): widths, classes, frames per token (post_conv: reference 3.3)."""
    encoder, post_conv = config.encoder, config.mask_position == "post_conv"
    masked_width = encoder.d_model if post_conv else input_width(config)
    frames = encoder_frames_in_token(config) if post_conv else frames_in_token(config)
    shared = {"num_classes": config.num_classes, "squeeze_single": config.squeeze_single}
    sections: dict[str, dict[str, Any]] = {
        "preprocessor": {"sample_rate": config.sample_rate, "compat": config.compat},
        "masking": {"feat_in": masked_width},
        "quantizer": {
            **shared,
            "code_dim": config.code_dim,
            "num_books": config.num_books,
            "combine_time_steps": frames,
            "feat_in": masked_width,
        },
        "encoder": {"feat_in": input_width(config), "compat": config.compat},
        "decoder": {
            **shared,
            "num_decoders": config.num_books,
            "feat_in": encoder.feat_out if encoder.feat_out > 0 else encoder.d_model,
        },
        "loss": {
            "combine_time_steps": frames,
            "num_decoders": config.num_books,
            "squeeze_single": config.squeeze_single,
        },
    }
    return {(name, field): value for name, fields in sections.items() for field, value in fields.items()}


def fill(config: Config) -> dict[str, Any]:
    """The sections with their derived fields filled in, by name."""
    values: dict[str, dict[str, Any]] = {}
    for (name, field), value in derived(config).items():
        given = getattr(getattr(config, name), field)
        if given is None or _is_replaced(config, name, field, given):
            values.setdefault(name, {})[field] = value
    encoder = values.setdefault("encoder", {})
    if config.encoder.subsampling_conv_channels == -1:
        encoder["subsampling_conv_channels"] = config.encoder.d_model
    if not config.encoder.subsampling or config.encoder.subsampling_factor == 1:
        encoder |= {"subsampling": None, "subsampling_factor": 1}
    filled = {name: replace(getattr(config, name), **fields) for name, fields in values.items()}
    sched = config.optim.sched
    if sched is not None:
        d_model = config.encoder.d_model if sched.d_model is None else sched.d_model
        max_steps = config.trainer.max_steps if sched.max_steps is None else sched.max_steps
        filled["optim"] = replace(config.optim, sched=replace(sched, d_model=d_model, max_steps=max_steps))
    return filled


def _is_replaced(config: Config, name: str, field: str, given: Any) -> bool:
    """Whether a given value is replaced: ``compat`` by that of the config, widths of pre_conv under post_conv (Q20)."""
    if field == "compat":
        return config.compat == "legacy"
    if config.mask_position != "post_conv" or name not in ("masking", "quantizer", "loss"):
        return False
    before = {"feat_in": input_width(config), "combine_time_steps": frames_in_token(config)}
    return field in before and bool(given == before[field])


def strip(config: Config, plain: dict[str, Any]) -> dict[str, Any]:
    """The plain mapping with derived fields set to ``None`` again, so that overrides applied to it stay consistent."""
    for name, field in derived(config):
        plain[name][field] = None
    if config.optim.sched is not None:
        plain["optim"]["sched"] |= _open_schedule(config)
    return plain


def unfilled(config: Config, name: str) -> Any:
    """One field of ``config``; if it is a section, with the values that ``fill`` put in reset to their defaults."""
    value = getattr(config, name)
    derived_here = {field for section, field in derived(config) if section == name}
    if not derived_here and name != "optim":
        return value
    reset: dict[str, Any] = {
        field.name: None for field in fields(value) if field.name in derived_here and field.default is None
    }
    if "compat" in derived_here and config.compat == "legacy":
        return replace(value, **reset, compat="current")
    if name == "optim" and config.optim.sched is not None:
        reset = {"sched": replace(config.optim.sched, **_open_schedule(config))}
    return replace(value, **reset) if reset else value


def _open_schedule(config: Config) -> dict[str, Any]:
    """``None`` for each field of the schedule that holds what ``fill`` would put in."""
    sched = config.optim.sched
    filled = {"d_model": config.encoder.d_model, "max_steps": config.trainer.max_steps}
    return {field: None for field, value in filled.items() if getattr(sched, field) == value}

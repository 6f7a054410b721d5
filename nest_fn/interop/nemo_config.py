"""Conversion between our configuration and the reference's ``model_config.yaml`` (reference 9.2).

It differs from reading our own YAML in one respect: a key that is missing has the default of the reference's class,
which is often not that of the NEST recipe. Settings without a key in the reference (our additions and those of a run)
are stored under the top-level key ``nest_fn``, which the reference ignores.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from nest_fn.config import Compat, Config, ConfigError
from nest_fn.errors import CheckpointError
from nest_fn.layers.tree import flatten

NEMO_VERSION = "2.7.3"  # the version whose schema is written
OWN = "nest_fn"
_MODEL = "nemo.collections.asr.models.ssl_models.EncDecDenoiseMaskedTokenPredModel"
_MODULES = "nemo.collections.asr.modules."
_TARGETS = {
    "preprocessor": _MODULES + "AudioToMelSpectrogramPreprocessor",
    "masking": _MODULES + "RandomBlockMasking",
    "quantizer": _MODULES + "RandomProjectionVectorQuantizer",
    "encoder": _MODULES + "ConformerEncoder",
    "decoder": _MODULES + "MultiSoftmaxDecoder",
    "loss": "nemo.collections.asr.losses.MultiMLMLoss",
}
_SPEC_AUGMENT = {"_target_": _MODULES + "SpectrogramAugmentation", "freq_masks": 0, "time_masks": 0}
_TOP = ("sample_rate", "num_classes", "num_books", "code_dim", "squeeze_single", "mask_position")

# Our fields that the reference's classes do not accept.
_ADDED = {
    "preprocessor": {"compat", "fixed_mean", "fixed_std"},
    "masking": {"force_block"},
    "quantizer": {"input_norm", "precision"},
    "encoder": {"masked_batch_norm", "aligned_local_positions", "detach_subsampling", "compat"},
    "decoder": set[str](),
    "loss": {"capacity"},
}

# Settings without a counterpart with which the reference would compute different numbers from the same weights.
_CHANGES_OUTPUT = ("quantizer.input_norm", "encoder.aligned_local_positions")

# Defaults of the reference's classes that differ from ours.
_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "preprocessor": {"window_size": 0.02, "n_fft": None, "features": 64},
    "masking": {"block_size": 48, "mask_prob": 0.5, "allow_overlap": False},
    "quantizer": {"dist_fn": "cosine"},
    "encoder": {
        "n_heads": 4, "subsampling": "striding", "subsampling_factor": 4, "subsampling_conv_channels": -1,
        "conv_kernel_size": 31, "dropout_emb": 0.1, "dropout_att": 0.0,
    },
    "decoder": {"use_bias": False},
}  # fmt: skip

# Sections that are not needed to read a model.
_RUN_SECTIONS = ("train_ds", "validation_ds", "test_ds", "optim", "trainer", "data", "exp_manager")


def to_reference(cfg: Config) -> dict[str, Any]:
    """Convert to the reference's model-level configuration, with class paths.

    Raises ``CheckpointError`` naming settings with which the reference would compute different numbers.
    """
    flat = flatten(cfg.to_dict())
    lost = [f"{path}={str(flat[path]).lower()}" for path in _CHANGES_OUTPUT if flat[path]]
    if lost:
        raise CheckpointError(f".nemo: the reference has no {' and no '.join(lost)} and would compute other numbers.")
    theirs: dict[str, Any] = {name: getattr(cfg, name) for name in _TOP}
    for name, target in _TARGETS.items():
        section = getattr(cfg, name)
        fields = (field for field in section.__dataclass_fields__ if field not in _ADDED[name])
        theirs[name] = {"_target_": target} | {field: _plain(getattr(section, field)) for field in fields}
    _to_reference_form(theirs, cfg)
    theirs["spec_augment"] = dict(_SPEC_AUGMENT)
    theirs["optim"] = _optim(cfg)
    theirs |= {"target": _MODEL, "nemo_version": NEMO_VERSION}
    own = _difference(cfg.to_dict(), Config.from_dict(theirs).to_dict())
    return theirs | ({OWN: own} if own else {})


def from_reference(mapping: Mapping[str, Any], source: str, compat: Compat | None = None) -> Config:
    """Convert a ``model_config.yaml`` or the hyper-parameters of a Lightning checkpoint to a ``Config``.

    ``compat`` chooses the numerics (reference 0). None means those of the file if this library wrote it, else
    ``current``, with which the reference itself loads files of any age. Sections of the training run that cannot be
    read are dropped with a warning. Raises ``CheckpointError`` listing all unsupported settings of the model.
    """
    tree = {name: value for name, value in mapping.items() if name != OWN}
    model = tree.get("model")
    if isinstance(model, Mapping):
        tree = {**tree, "model": _with_class_defaults(model)}
    else:
        tree = _with_class_defaults(tree)
    try:
        cfg = _read(tree, source)
        own = mapping.get(OWN) or (model or {}).get(OWN)
        if own:
            cfg = Config.from_dict(_merge(cfg.to_dict(), own))
        return cfg if compat is None else cfg.override(f"compat={compat}")
    except ConfigError as error:
        raise CheckpointError(f"{source}: its config cannot be had here: {error}") from error


def _read(tree: dict[str, Any], source: str) -> Config:
    """Read the whole configuration or, if that fails, the model without the settings of its training run."""
    try:
        return Config.from_dict(tree)
    except ConfigError as error:
        model = {name: value for name, value in tree.items() if name not in _RUN_SECTIONS}
        if isinstance(model.get("model"), Mapping):
            model["model"] = {name: value for name, value in model["model"].items() if name not in _RUN_SECTIONS}
        cfg = Config.from_dict(model)
        left = "; ".join(error.problems)
        warnings.warn(f"{source}: settings of its training run are left out: {left}", stacklevel=5)
        return cfg


def _with_class_defaults(model: Mapping[str, Any]) -> dict[str, Any]:
    filled = {name: value for name, value in model.items() if name != OWN}
    for name, defaults in _CLASS_DEFAULTS.items():
        section = filled.get(name)
        if isinstance(section, Mapping):
            samples = name == "preprocessor" and section.get("n_window_size") is not None
            given = {key: value for key, value in defaults.items() if not (samples and key == "window_size")}
            filled[name] = {**given, **section}
    _undo_post_conv(filled)
    return filled


def _undo_post_conv(model: dict[str, Any]) -> None:
    """Undo that the reference, under post_conv, divides the block size in the config that it saves (reference 3.3)."""
    masking, encoder = model.get("masking"), model.get("encoder")
    if model.get("mask_position") != "post_conv" or not (isinstance(masking, Mapping) and isinstance(encoder, Mapping)):
        return
    width, factor, block = encoder.get("d_model"), encoder.get("subsampling_factor"), masking.get("block_size")
    if not (isinstance(factor, int) and isinstance(block, int)) or masking.get("feat_in") != width:
        return
    if encoder.get("feat_in") != width or block < factor:
        model["masking"] = {**masking, "block_size": block * factor, "feat_in": None}


def _to_reference_form(theirs: dict[str, Any], cfg: Config) -> None:
    """Adapt values that the reference writes in another form."""
    section = theirs["preprocessor"]
    if section["normalize"] == "fixed":
        statistics = {"fixed_mean": cfg.preprocessor.fixed_mean, "fixed_std": cfg.preprocessor.fixed_std}
        section["normalize"] = {name: _plain(value) for name, value in statistics.items()}
    contexts = theirs["encoder"]["att_context_size"]
    if len(contexts) == 1:
        theirs["encoder"]["att_context_size"] = contexts[0]
    if cfg.mask_position == "post_conv":  # the reference derives the other widths from this one
        theirs["masking"]["feat_in"] = cfg.encoder.feat_in


def _optim(cfg: Config) -> dict[str, Any]:
    optim, sched = cfg.optim, cfg.optim.sched
    theirs: dict[str, Any] = {"name": optim.name, "lr": optim.lr, "weight_decay": optim.weight_decay}
    if optim.name == "sgd":
        theirs["momentum"] = optim.momentum
    else:
        theirs |= {"betas": list(optim.betas), "eps": optim.eps}
    names = {"noam": "NoamAnnealing", "cosine": "CosineAnnealing"}
    if sched is not None and sched.name in names:
        theirs["sched"] = {
            "name": names[sched.name], "warmup_steps": sched.warmup_steps, "warmup_ratio": sched.warmup_ratio,
            "min_lr": sched.min_lr, "max_steps": sched.max_steps,
        }  # fmt: skip
        theirs["sched"] |= (
            {"d_model": sched.d_model} if sched.name == "noam" else {"constant_steps": sched.constant_steps}
        )
    return theirs


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _difference(wanted: Mapping[str, Any], have: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``wanted`` that are missing or different in ``have``."""
    found: dict[str, Any] = {}
    for name, value in wanted.items():
        if isinstance(value, Mapping) and isinstance(have.get(name), Mapping):
            below = _difference(value, have[name])
            found |= {name: below} if below else {}
        elif value != have.get(name):
            found[name] = value
    return found


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if both else value
    return merged

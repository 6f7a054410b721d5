"""The reference's YAML read as ours: where its sections differ, what of it says nothing here, what is refused and why.

Read: ``train_ds``, ``validation_ds`` and ``batch_augmentor`` (as ``data``), a Lightning ``trainer``, ``_target_``
lines, ``normalize`` given as fixed statistics, ``NoamAnnealing`` and ``CosineAnnealing``. Dropped without effect:
exactly the names listed below. The reference's data sections have one counterpart here, so validation has the training
set's noise and augmentation, ``test_ds`` is not read, and ``batch_size`` bounds a batch beside ``data.batch_seconds``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import Problems

Tree = dict[str, Any]

_TOP_LEVEL_INERT = {"name", "exp_manager", "hydra", "defaults"}
_MODEL_INERT = {"nemo_version", "log_prediction", "test_ds"}
_SECTIONS = {"preprocessor", "masking", "quantizer", "encoder", "decoder", "loss", "optim"}

_TARGETS = {
    "model": {"EncDecDenoiseMaskedTokenPredModel", "EncDecMaskedTokenPredModel"},
    "preprocessor": {"AudioToMelSpectrogramPreprocessor"},
    "spec_augment": {"SpectrogramAugmentation"},
    "masking": {"RandomBlockMasking"},
    "quantizer": {"RandomProjectionVectorQuantizer"},
    "encoder": {"ConformerEncoder"},
    "decoder": {"MultiSoftmaxDecoder"},
    "loss": {"MultiMLMLoss", "MLMLoss"},
    "batch_augmentor": {"MultiSpeakerNoiseAugmentation"},
}

_SECTION_INERT = {
    "preprocessor": {"stft_conv", "stft_exact_pad"},  # deprecated there, without effect
    "encoder": {"sync_max_audio_length", "use_pytorch_sdpa_backends"},
    "sched": {"last_epoch", "monitor", "reduce_on_plateau"},
}

_NO_TORCHAUDIO = "selects other conventions in the reference (spec 1.6); features come from torchaudio here anyway"
_REFUSED_UNLESS_FALSE = {
    ("preprocessor", "use_torchaudio"): _NO_TORCHAUDIO,
    ("preprocessor", "rng"): "cannot come from YAML; randomness comes from keys",
    ("quantizer", "time_ahead"): "is not supported; features are [B, F, M] throughout",
}

_DATA_COUNTERPARTS = {
    "manifest_filepath": "train",
    "noise_manifest": "noise",
    "min_duration": "min_duration",
    "max_duration": "max_duration",
    "shuffle": "shuffle",
    "num_workers": "num_workers",
    "batch_size": "max_batch_size",
    "batch_duration": "batch_seconds",
    "num_buckets": "num_buckets",
    "channel_selector": "channel",
    "batch_augmentor": "augment",
}
_DATA_INERT = set(
    "sample_rate pin_memory use_start_end_token shuffle_n drop_last use_lhotse use_bucketing bucketing_strategy "
    "bucketing_batch_size bucketing_weights bucket_duration_bins bucket_batch_size bucket_buffer_size "
    "shuffle_buffer_size quadratic_duration concurrent_bucketing shard_seed shard_manifests tarred_shard_strategy "
    "concat_sampling concat_sampling_technique concat_sampling_temperature concat_sampling_seed concat_shuffle "
    "concat_sampling_probabilities concat_sampling_scale return_sample_id text_field lang_field seed parser labels "
    "num_worker_per_concat_dataset prefetch_factor persistent_workers defer_setup".split()
)
_DATA_REFUSED_UNLESS_FALSE = {
    "is_tarred": "is not supported; give plain audio files in data.train",
    "tarred_audio_filepaths": "is not supported; give plain audio files in data.train",
    "is_concat": "is not supported; give several manifests in data.train and data.weights",
    "trim_silence": "is not supported; trim before training",
    "augmentor": "is not supported; data.augment mixes noise and speakers",
}

_TRAINER_COUNTERPARTS = {
    "accumulate_grad_batches": "accumulate",
    "gradient_clip_val": "clip_norm",
    "log_every_n_steps": "log_every",
}
_TRAINER_INERT = set(
    "devices gpus num_nodes max_epochs min_epochs min_steps max_time accelerator strategy enable_checkpointing "
    "checkpoint_callback logger sync_batchnorm benchmark check_val_every_n_epoch num_sanity_val_steps plugins "
    "enable_progress_bar progress_bar_refresh_rate enable_model_summary use_distributed_sampler replace_sampler_ddp "
    "limit_train_batches limit_val_batches limit_test_batches val_check_interval resume_from_checkpoint profiler "
    "detect_anomaly fast_dev_run barebones inference_mode callbacks default_root_dir".split()
)
_PRECISIONS = {
    "fp32": ("32", "32-true", "fp32"),
    "bf16": ("bf16", "bf16-mixed"),
}

_SCHEDULES = {"noamannealing": "noam", "cosineannealing": "cosine", "none": "constant"}


def read_dialect(tree: Mapping[str, Any], problems: Problems) -> Tree:
    """Our flat mapping (model keys, ``data``, ``trainer``) from a whole file, ours or the reference's.

    What cannot be read is noted in ``problems``, which also learns how keys are called in the user's file.
    """
    root = {key: value for key, value in tree.items() if key not in _TOP_LEVEL_INERT}
    if isinstance(root.get("model"), Mapping):
        model = dict(root.pop("model"))
        problems.written[""] = "model"
        for key in root:
            problems.written[key] = key
            if key in model:
                problems.add(key, f"stands both at the top level and in 'model'; keep one '{key}'")
    else:
        if root.get("model", 0) is None:
            root.pop("model")
        model, root = root, {}
    flat = {key: value for key, value in {**model, **root}.items() if key not in _MODEL_INERT}
    _check_target(flat, "target", "model", "target", problems)
    for name in _SECTIONS:
        if isinstance(flat.get(name), Mapping):
            flat[name] = _section(name, flat[name], name, problems)
    _spec_augment(flat.pop("spec_augment", None), problems)
    _skip_nan(flat, problems)
    _off_and_fixed(flat)
    _optim(flat, problems)
    _data(flat, problems)
    _trainer(flat, problems)
    _inherit(flat)
    return flat


def _check_target(section: Tree, key: str, name: str, path: str, problems: Problems) -> None:
    """Drop a class path whose last part is the class that we stand for; refuse any other by name."""
    target = section.pop(key, None)
    expected = _TARGETS.get(name, set())
    if target is not None and str(target).rpartition(".")[2] not in expected:
        wanted = f"only {' or '.join(sorted(expected))} is read" if expected else "no class is read"
        problems.add(path, f"names '{target}'; {wanted} here")


def _section(name: str, given: Mapping[str, Any], path: str, problems: Problems) -> Tree:
    """A section without its class path and its inert keys."""
    section = {key: value for key, value in given.items() if key not in _SECTION_INERT.get(name, ())}
    _check_target(section, "_target_", name, f"{path}._target_", problems)
    for (owner, key), reason in _REFUSED_UNLESS_FALSE.items():
        if owner == name and section.pop(key, None):
            problems.add(f"{path}.{key}", reason)
    return section


def _spec_augment(section: Any, problems: Problems) -> None:
    """Masking of spectrogram strips: accepted where it is off, as in every recipe of the reference."""
    if section is None:
        return
    if not isinstance(section, Mapping):
        problems.add("spec_augment", "wants a mapping")
        return
    rest = _section("spec_augment", section, "spec_augment", problems)
    for key in ("freq_masks", "time_masks"):
        if rest.pop(key, 0):
            problems.add(f"spec_augment.{key}", "must be 0; the input is masked by 'masking'")
    for key in rest.keys() - {"freq_width", "time_width", "rng", "mask_value", "use_numba_kernel"}:
        problems.unknown(f"spec_augment.{key}", ("freq_masks", "time_masks", "freq_width", "time_width"))


def _skip_nan(flat: Tree, problems: Problems) -> None:
    if flat.pop("skip_nan_grad", None):
        problems.add("skip_nan_grad", "is not supported; a batch without masked tokens has loss 0 here")


def _off_and_fixed(flat: Tree) -> None:
    """``false`` for off, and fixed statistics given as a mapping."""
    section = flat.get("preprocessor")
    if isinstance(section, dict):
        fixed = section.get("normalize")
        if isinstance(fixed, Mapping) and {"fixed_mean", "fixed_std"} == set(fixed):
            section |= {"normalize": "fixed", **fixed}
        elif fixed is False:
            section["normalize"] = None
    encoder = flat.get("encoder")
    if isinstance(encoder, dict) and (encoder.get("subsampling") is False or encoder.get("subsampling") == ""):
        encoder["subsampling"] = None


def _optim(flat: Tree, problems: Problems) -> None:
    optim = flat.get("optim")
    if not isinstance(optim, dict) or not isinstance(optim.get("sched"), Mapping):
        return
    sched = _section("sched", optim["sched"], "optim.sched", problems)
    name = sched.get("name")
    if isinstance(name, str):
        sched["name"] = _SCHEDULES.get(name.lower(), name)
    if sched.get("warmup_ratio") is not None:
        sched.setdefault("warmup_steps", None)
    optim["sched"] = sched


def _inherit(flat: Tree) -> None:
    """Values that one place gives for another: the sample rate, and either seconds or samples of a window."""
    section = flat.setdefault("preprocessor", {})
    if not isinstance(section, dict):
        return
    if section.get("sample_rate") is None:
        section["sample_rate"] = flat.get("sample_rate")
    elif flat.get("sample_rate") is None:
        flat["sample_rate"] = section["sample_rate"]
    for samples, seconds in (("n_window_size", "window_size"), ("n_window_stride", "window_stride")):
        if section.get(samples) is not None:
            section.setdefault(seconds, None)


def _data(flat: Tree, problems: Problems) -> None:
    """``train_ds`` and ``validation_ds`` as ``data``; what an own ``data`` section says goes before."""
    found: Tree = {}
    for name in ("train_ds", "validation_ds"):
        given = flat.pop(name, None)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            problems.add(name, "wants a mapping")
            continue
        values = _data_set(name, given, flat.get("sample_rate"), problems)
        if name == "validation_ds":
            values = {"valid": values["train"]} if "train" in values else {}
            problems.written["data.valid"] = f"{problems.name(name)}.manifest_filepath"
        found |= values
    own = flat.get("data")
    if found and (own is None or isinstance(own, Mapping)):
        flat["data"] = {**found, **(own or {})}


def _data_set(name: str, given: Mapping[str, Any], sample_rate: Any, problems: Problems) -> Tree:
    values: Tree = {}
    for key, value in given.items():
        path = f"{name}.{key}"
        if key in _DATA_COUNTERPARTS:
            if value is not None:
                values[_DATA_COUNTERPARTS[key]] = value
            if name == "train_ds":
                problems.written[f"data.{_DATA_COUNTERPARTS[key]}"] = problems.name(path)
        elif key in _DATA_REFUSED_UNLESS_FALSE:
            problems.require(not value, path, _DATA_REFUSED_UNLESS_FALSE[key])
        elif key not in _DATA_INERT:
            problems.unknown(path, _DATA_COUNTERPARTS)
    rate = given.get("sample_rate")
    problems.require(
        rate is None or sample_rate is None or rate == sample_rate,
        f"{name}.sample_rate",
        f"is {rate}, the model's is {sample_rate}; leave it out",
    )
    if isinstance(values.get("augment"), Mapping):
        values["augment"] = _section("batch_augmentor", values["augment"], f"{name}.batch_augmentor", problems)
    if values.get("channel") in ("average", "avg", "mean"):
        values["channel"] = "mix"
    return values


def _trainer(flat: Tree, problems: Problems) -> None:
    """A Lightning block: what has a counterpart is translated, the known rest dropped."""
    if not isinstance(flat.get("trainer"), Mapping):
        return
    trainer: Tree = {}
    for key, value in flat["trainer"].items():
        ours = _TRAINER_COUNTERPARTS.get(key, key)
        if key in _TRAINER_INERT or (key == "max_steps" and value == -1):
            continue
        if ours in trainer:
            problems.add("trainer", f"gives '{ours}' twice, once as '{key}'; keep one")
        if key == "gradient_clip_algorithm":
            problems.require(value in (None, "norm"), f"trainer.{key}", "must be 'norm'; clipping is by norm")
            continue
        if key == "precision":
            value = next((own for own, names in _PRECISIONS.items() if str(value) in names), value)
        if ours != key:
            problems.written[f"trainer.{ours}"] = problems.name(f"trainer.{key}")
        trainer[ours] = value
    flat["trainer"] = trainer

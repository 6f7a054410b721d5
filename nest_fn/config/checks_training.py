"""Consistency checks of a run's settings, and remarks on valid settings that are probably mistakes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .checks import one_of
from .parse.problems import Problems
from .training import AugmentConfig, DataConfig, OptimConfig, SchedConfig, TrainerConfig

if TYPE_CHECKING:
    from . import Config


def check_training(config: Config, problems: Problems) -> None:
    """Check all settings of a run."""
    _check_data(config.data, problems)
    _check_augment(config.data.augment, problems)
    _check_optim(config.optim, problems)
    if config.optim.sched is not None:
        _check_sched(config.optim.sched, config.optim.lr, problems)
    _check_trainer(config.trainer, problems)


def _check_data(section: DataConfig, problems: Problems) -> None:
    path = "data."
    low, high = section.min_duration, section.max_duration
    problems.require(low <= high, path + "min_duration", f"is {low} s, above max_duration {high} s")
    one_of(problems, path + "long", section.long, ("drop", "crop"))
    one_of(problems, path + "short_audio", section.short_audio, ("pad", "repeat"))
    one_of(problems, path + "on_error", section.on_error, ("raise", "zero_weight"))
    if section.weights is not None:
        fits = len(section.weights) == len(section.train) and all(weight > 0 for weight in section.weights)
        why = f"must hold one number above 0 for each of {len(section.train)} training manifests"
        problems.require(fits, path + "weights", why)


def _check_augment(section: AugmentConfig, problems: Problems) -> None:
    path = "data.augment."
    for name in ("r_speech", "r_noise", "mix_rate", "num_segments", "num_speakers"):
        low, high = getattr(section, f"min_{name}"), getattr(section, f"max_{name}")
        problems.require(low <= high, f"{path}min_{name}", f"is {low}, above max_{name} {high}")


def _check_optim(section: OptimConfig, problems: Problems) -> None:
    path = "optim."
    one_of(problems, path + "name", section.name, ("adamw", "adam", "sgd"))


def _check_sched(section: SchedConfig, lr: float, problems: Problems) -> None:
    path = "optim.sched."
    one_of(problems, path + "name", section.name, ("noam", "cosine", "constant"))
    if section.warmup_ratio is not None:
        alone = section.warmup_steps is None
        problems.require(alone, path + "warmup_ratio", "excludes 'warmup_steps'; set one of them to null")
    if section.name != "constant":
        low = section.min_lr
        problems.require(lr >= low, path + "min_lr", f"is {low}, above optim.lr {lr}")
    if section.name == "cosine" and section.max_steps is not None and not problems.lines:
        busy = section.warmup + section.constant_steps
        why = f"is {section.max_steps}, but warm-up and constant part take {busy} steps"
        problems.require(busy <= section.max_steps, path + "max_steps", why)


def _check_trainer(section: TrainerConfig, problems: Problems) -> None:
    path = "trainer."
    precisions = ("fp32", "bf16")
    one_of(problems, path + "precision", section.precision, precisions)
    for name in section.loggers:
        one_of(problems, path + "loggers", name, ("tensorboard", "wandb"))
    one_of(problems, path + "compile", section.compile, ("auto", "on", "off"))
    device = re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", section.device)
    why = f"must be auto, cpu, cuda or cuda:N; got '{section.device}'"
    problems.require(device is not None, path + "device", why)


def advice(config: Config) -> tuple[str, ...]:
    """Remarks on settings that are valid but probably a mistake, one line each."""
    remarks = []
    sched, lr = config.optim.sched, config.optim.lr
    if sched is not None and sched.name == "noam" and sched.d_model:
        peak = lr * (sched.d_model * max(1, sched.warmup)) ** -0.5
        if peak < sched.min_lr:
            remarks.append(
                f"optim.lr {lr:g} with noam peaks at {peak:.2g}, below min_lr {sched.min_lr:g}; NEST uses 5.0, "
                "a plain rate wants sched.name=cosine or constant"
            )
    if config.preprocessor.pad_to == 0 and config.frames_per_token > 1:
        remarks.append(
            f"preprocessor.pad_to 0 leaves frames that do not fill a token of {config.frames_per_token}; "
            "the batch's width must be a multiple of it"
        )
    if config.data.batch_seconds < config.data.max_duration:
        remarks.append(
            f"data.batch_seconds {config.data.batch_seconds:g} is less than one utterance of "
            f"data.max_duration {config.data.max_duration:g} seconds"
        )
    return (*remarks, *_without_use(config.data))


def _without_use(data: DataConfig) -> list[str]:
    """Files that are named, and that no other setting lets a run read."""
    remarks = []
    if data.rir and data.augment.rir_prob == 0:
        remarks.append("data.rir is never used, for data.augment.rir_prob is 0; set it above 0 to reverberate")
    if data.noise and data.augment.prob == 0 and not data.augment.keep_raw_noise:
        remarks.append("data.noise is never used, for data.augment.prob is 0; set it above 0 to mix noise in")
    if data.valid_shards and not data.valid:
        remarks.append("data.valid_shards are never used, for data.valid names no manifest of what is in them")
    return remarks

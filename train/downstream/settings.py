"""Settings of commands that use a trained model: the same KEY=VALUE as in pre-training; unused ones are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nest_fn.config import Config, DataConfig, OptimConfig, TrainerConfig
from nest_fn.files.quoting import shown
from nest_fn.layers.tree import flatten
from nest_fn.train.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

JOB = ("trainer.device", "trainer.precision", "trainer.threads", "data.num_workers", "data.prefetch", "data.timeout_s")
"""Settings of the machine and of the arithmetic, which every command about a trained model uses."""

READING = (
    "data.batch_seconds", "data.max_batch_size", "data.row_multiple", "data.num_buckets", "data.channel",
    "data.resample", "data.root", "data.valid_shards", "data.remote_cache", "data.remote_cache_mb", "data.check_files",
    "data.duration_tolerance",
)  # fmt: skip
"""Settings of how audio is read and batched."""


def with_settings(command: str, cfg: Config, overrides: Sequence[str], used: Sequence[str]) -> Config:
    """``cfg`` with overrides, each of which must be among ``used`` (a key, or a section with all below it).

    Raises ``ConfigError`` for what no setting is, ``UsageError`` for a setting without effect on the command.
    """
    made = cfg.override(*overrides)
    for key in sorted(_given(overrides) | _changed(cfg, made)):
        if not any(key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in used):
            raise UsageError(f"{command}: {key} has no effect here; leave it out. {command} uses {', '.join(used)}.")
    return made


def inference_config(
    command: str, cfg: Config, overrides: Sequence[str], used: Sequence[str] = (), *, min_audio: float | None = None
) -> Config:
    """A model's config with a job's settings for applying the model to audio of any length, mixed to mono.

    Utterances shorter than ``min_audio`` seconds (default: as in training) are filled up with silence. Raises
    ``ConfigError`` and ``UsageError``, as ``with_settings``.
    """
    data = DataConfig(
        min_duration=0.0, max_duration=1e9, batch_seconds=60.0, channel="mix",
        min_audio=cfg.data.min_audio if min_audio is None else min_audio,
    )  # fmt: skip
    trainer = TrainerConfig(compile="off")
    return with_settings(command, replace(cfg, data=data, trainer=trainer), overrides, (*JOB, *READING, *used))


def seconds_per_frame(cfg: Config) -> float:
    """Seconds from one frame of the encoder's output to the next."""
    return cfg.frames_per_token * cfg.preprocessor.hop_length / cfg.sample_rate


def model_alone(cfg: Config) -> Config:
    """A config with the defaults of all that a model does not read, for digests of models."""
    return replace(cfg, data=DataConfig(), trainer=TrainerConfig(), optim=OptimConfig())


def lasting_settings(cfg: Config) -> dict[str, object]:
    """Settings of a job on which its result depends, for the origin of an output."""
    data = cfg.data
    reading = {"channel": data.channel, "resample": data.resample, "min_audio": data.min_audio}
    return {"precision": cfg.trainer.precision, **reading}


def refuse_other_model(command: str, before: Config, after: Config, free: Sequence[str]) -> None:
    """Raise ``UsageError`` for a setting that differs from the checkpoint's model and is not ``free`` to."""
    old, new = flatten(before.to_dict()), flatten(after.to_dict())
    for key in sorted(_changed(before, after)):
        if not key.startswith(tuple(free)):
            raise UsageError(
                f"{command}: {key} is {shown(new.get(key))}, the checkpoint's model has {shown(old.get(key))}; "
                "leave it out, or start from random weights with --from-scratch."
            )


def _given(overrides: Iterable[str]) -> set[str]:
    return {text.partition("=")[0].strip().removeprefix("model.") for text in overrides}


def _changed(before: Config, after: Config) -> set[str]:
    old, new = flatten(before.to_dict()), flatten(after.to_dict())
    return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}

"""Settings of a fine-tuning run: the recipe that overrides start from, and which settings have an effect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nest_fn.config import Config, DataConfig, TrainerConfig
from nest_fn.train.downstream.settings import JOB, READING, refuse_other_model, with_settings
from nest_fn.train.errors import UsageError
from nest_fn.train.run.record.checkpoints import recorded

COMMAND = "finetune-ctc"

# What fine-tuning starts from, instead of the settings with which the model was pre-trained.
RECIPE = (
    "optim.name=adamw", "optim.lr=1e-3", "optim.betas=[0.9,0.98]", "optim.eps=1e-8", "optim.weight_decay=1e-3",
    "optim.sched={name: cosine, warmup_steps: null, warmup_ratio: 0.1, min_lr: 1e-6}",
    "trainer.max_steps=1000", "trainer.log_every=10", "trainer.valid_every=100", "trainer.save_every=100",
    "trainer.keep_last=2", "trainer.clip_norm=1.0", "trainer.compile=off",
    "data.min_duration=0.1", "data.batch_seconds=120",
)  # fmt: skip

_TRAINER = (
    "max_steps", "seed", "compile", "accumulate", "clip_norm", "log_every", "valid_every", "save_every", "keep_last",
    "deterministic", "rank_timeout_s", "collective_timeout_s",
)  # fmt: skip
_DATA = (
    "train", "valid", "train_shards", "valid_shards", "weights", "min_duration", "max_duration", "shuffle",
    "short_audio", "min_audio", "skip_silent", "on_error", "max_bad_fraction",
)  # fmt: skip
_MODEL = ("encoder", "preprocessor", "sample_rate", "compat")
USED = (
    *JOB, *READING, *(f"trainer.{name}" for name in _TRAINER), *(f"data.{name}" for name in _DATA), "optim", *_MODEL,
)  # fmt: skip

# Settings of a model that may differ from those of its pre-training: chance in training, and how things are computed.
_FREE = (
    "data.", "optim.", "trainer.", "encoder.dropout", "encoder.stochastic_depth", "encoder.use_pytorch_sdpa",
    "preprocessor.dither", "preprocessor.nb_",
)  # fmt: skip

# Settings of where and how a run is computed: they may change when it goes on.
_OF_THE_MACHINE = ("device", "compile", "save_every", "keep_last", "log_every")


def finetune_config(model: Config, overrides: Sequence[str], from_scratch: bool) -> Config:
    """The config of a fine-tuning run. Raises ``ConfigError`` and ``UsageError``."""
    base = replace(model, data=DataConfig(), trainer=TrainerConfig()).override(*RECIPE)
    cfg = with_settings(COMMAND, base, overrides, USED)
    if not from_scratch:
        refuse_other_model(COMMAND, base, cfg, _FREE)
    for split in ("train", "valid"):
        if not getattr(cfg.data, split):
            raise UsageError(f"{COMMAND}: data.{split} names no manifest; set data.{split}=FILE.jsonl")
    return cfg


def lasting(cfg: Config) -> dict[str, Any]:
    """The settings that must be the same when a run goes on."""
    settings = recorded(cfg)
    for name in _OF_THE_MACHINE:
        settings["trainer"].pop(name, None)
    for name in ("train", "valid", "train_shards", "valid_shards", "root"):  # what they hold, digests say
        settings["data"].pop(name, None)
    return settings

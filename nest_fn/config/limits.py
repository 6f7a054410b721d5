"""The valid range of every number in a configuration.

All are checked before other values are derived from them. The upper limits are far above practical values; they prevent
a typing error from allocating terabytes or causing an endless loop.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from nest_fn.files.quoting import shown

from .parse.problems import Problems


class Range(NamedTuple):
    """An interval from ``low`` to ``high``, which includes its ends unless they are open."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __str__(self) -> str:
        """The interval in words: ``1 to 1024``, ``above 0, at most 8``."""
        low, high = _plain(self.low), _plain(self.high)
        if not self.open_low and not self.open_high:
            return f"{low} to {high}"
        return f"{'above' if self.open_low else 'at least'} {low}, {'below' if self.open_high else 'at most'} {high}"

    def fault(self, value: float) -> str | None:
        """Describe why a number is outside of the interval; None if it is inside."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if above and below:
            return None
        if value != value or (self.low, self.high) == (0, 1):
            ends = ("(" if self.open_low else "[", ")" if self.open_high else "]")
            return f"must lie in {ends[0]}{self.low:g}, {self.high:g}{ends[1]}"
        if above:
            return f"must be at most {self.high:g}"
        return f"must be above {self.low:g}" if self.open_low else f"must be at least {self.low:g}"


def _plain(number: float) -> str:
    """A bound as people write it: large powers of two and ten stay short."""
    power = number.bit_length() - 1 if isinstance(number, int) and number > 0 else 0
    if power > 16 and number == 2**power:
        return f"2^{power}"
    return f"-{_plain(-number)}" if number < 0 else re.sub(r"e\+0*", "e", f"{number:g}")


FRACTION = Range(0, 1)
BELOW_ONE = Range(0, 1, open_high=True)
FRAMES = Range(-1, 2**31)
COUNT = Range(0, 10**12)  # steps, updates, checkpoints
SECONDS = Range(0, 1e9)
WAIT = Range(0, 1e8, open_low=True)  # seconds, within the limits of system timeouts
DECIBEL = Range(-200, 200)

_NUMBER_OR_TEXT = ("preprocessor.log_zero_guard_value", "encoder.conv_context_size", "data.channel")

LIMITS: dict[str, Range] = {
    "sample_rate": Range(1, 1_000_000),
    "num_classes": Range(2, 2**24),
    "num_books": Range(1, 1024),
    "code_dim": Range(1, 2**16),
    "preprocessor.sample_rate": Range(1, 1_000_000),
    "preprocessor.window_size": Range(0, 60),
    "preprocessor.window_stride": Range(0, 60),
    "preprocessor.n_window_size": Range(1, 2**20),
    "preprocessor.n_window_stride": Range(1, 2**20),
    "preprocessor.n_fft": Range(1, 2**20),
    "preprocessor.preemph": Range(-1, 1),
    "preprocessor.features": Range(1, 2**14),
    "preprocessor.lowfreq": Range(0, 500_000),
    "preprocessor.highfreq": Range(0, 500_000),
    "preprocessor.mag_power": Range(0, 8, open_low=True),
    "preprocessor.log_zero_guard_value": Range(0, 1e6),
    "preprocessor.dither": Range(0, 1e3),
    "preprocessor.pad_to": Range(0, 2**20),
    "preprocessor.pad_value": Range(-1e6, 1e6),
    "preprocessor.fixed_mean": Range(-1e6, 1e6),
    "preprocessor.fixed_std": Range(0, 1e6, open_low=True),
    "preprocessor.frame_splicing": Range(1, 1024),
    "preprocessor.nb_augmentation_prob": FRACTION,
    "preprocessor.nb_max_freq": Range(0, 500_000, open_low=True),
    "masking.block_size": Range(1, 2**20),
    "masking.mask_prob": FRACTION,
    "masking.mask_value": Range(-1e6, 1e6),
    "masking.max_mask_ratio": Range(0, 1, open_low=True),
    "masking.feat_in": Range(1, 2**24),
    "quantizer.code_dim": Range(1, 2**16),
    "quantizer.num_classes": Range(2, 2**24),
    "quantizer.num_books": Range(1, 1024),
    "quantizer.combine_time_steps": Range(1, 2**20),
    "quantizer.feat_in": Range(1, 2**24),
    "encoder.feat_in": Range(1, 2**24),
    "encoder.feat_out": Range(-1, 2**16),
    "encoder.n_layers": Range(1, 1024),
    "encoder.d_model": Range(1, 2**16),
    "encoder.n_heads": Range(1, 2**16),
    "encoder.subsampling_factor": Range(1, 1024),
    "encoder.subsampling_conv_channels": Range(-1, 2**16),
    "encoder.subsampling_conv_chunking_factor": Range(-1, 2**31),
    "encoder.reduction_position": Range(-1, 1024),
    "encoder.reduction_factor": Range(1, 1024),
    "encoder.ff_expansion_factor": Range(1, 1024),
    "encoder.att_context_size": Range(-(2**31), 2**31),
    "encoder.att_context_probs": FRACTION,
    "encoder.global_tokens": Range(0, 2**20),
    "encoder.global_tokens_spacing": Range(1, 2**20),
    "encoder.pos_emb_max_len": Range(1, 2**31),
    "encoder.conv_kernel_size": Range(1, 2**16),
    "encoder.conv_context_size": Range(0, 2**16),
    "encoder.dropout": BELOW_ONE,
    "encoder.dropout_pre_encoder": BELOW_ONE,
    "encoder.dropout_emb": BELOW_ONE,
    "encoder.dropout_att": BELOW_ONE,
    "encoder.stochastic_depth_drop_prob": BELOW_ONE,
    "encoder.stochastic_depth_start_layer": Range(1, 2**31),
    "decoder.feat_in": Range(1, 2**24),
    "decoder.num_classes": Range(2, 2**24),
    "decoder.num_decoders": Range(1, 1024),
    "loss.mask_threshold": BELOW_ONE,
    "loss.combine_time_steps": Range(1, 2**20),
    "loss.num_decoders": Range(1, 1024),
    "loss.capacity": Range(0, 1, open_low=True),
    "optim.lr": Range(0, 1e38),
    "optim.betas": BELOW_ONE,
    "optim.eps": Range(0, 1e3, open_low=True),
    "optim.weight_decay": Range(0, 1e38),
    "optim.momentum": BELOW_ONE,
    "optim.sched.d_model": Range(1, 2**31),
    "optim.sched.warmup_steps": COUNT,
    "optim.sched.warmup_ratio": FRACTION,
    "optim.sched.constant_steps": COUNT,
    "optim.sched.min_lr": Range(0, 1e38),
    "optim.sched.max_steps": Range(1, 10**12),
    "data.weights": Range(0, 1e6, open_low=True),
    "data.min_duration": SECONDS,
    "data.max_duration": Range(0, 1e9, open_low=True),
    "data.batch_seconds": Range(0, 1e9, open_low=True),
    "data.max_batch_size": Range(1, 2**20),
    "data.row_multiple": Range(1, 2**20),
    "data.num_buckets": Range(1, 2**16),
    "data.num_workers": Range(0, 1024),
    "data.prefetch": Range(1, 2**16),
    "data.channel": Range(0, 1023),
    "data.min_audio": Range(0, 1e6, open_low=True),
    "data.noise_budget_mb": Range(1, 2**31),
    "data.remote_cache_mb": Range(0, 1e12),
    "data.duration_tolerance": SECONDS,
    "data.max_bad_fraction": FRACTION,
    "data.timeout_s": WAIT,
    "data.augment.prob": FRACTION,
    "data.augment.noise_ratio": FRACTION,
    "data.augment.min_r_speech": DECIBEL,
    "data.augment.max_r_speech": DECIBEL,
    "data.augment.min_r_noise": DECIBEL,
    "data.augment.max_r_noise": DECIBEL,
    "data.augment.min_mix_rate": FRACTION,
    "data.augment.max_mix_rate": FRACTION,
    "data.augment.min_num_segments": Range(1, 1024),
    "data.augment.max_num_segments": Range(1, 1024),
    "data.augment.min_num_speakers": Range(1, 1024),
    "data.augment.max_num_speakers": Range(1, 1024),
    "data.augment.rir_prob": FRACTION,
    "trainer.max_steps": Range(1, 10**12),
    "trainer.seed": Range(-(2**63), 2**64, open_high=True),
    "trainer.accumulate": Range(1, 2**20),
    "trainer.clip_norm": Range(0, 1e30),
    "trainer.ema_decay": BELOW_ONE,
    "trainer.log_every": COUNT,
    "trainer.valid_every": COUNT,
    "trainer.save_every": COUNT,
    "trainer.digest_every": COUNT,
    "trainer.keep_last": Range(1, 10**12),
    "trainer.keep_best": COUNT,
    "trainer.keep_every": COUNT,
    "trainer.skip_nonfinite": COUNT,
    "trainer.skip_norm": Range(0, 1e30),
    "trainer.rank_timeout_s": WAIT,
    "trainer.collective_timeout_s": WAIT,
    "trainer.threads": Range(0, 4096),
}


def check_limits(config: Any, problems: Problems) -> None:
    """Record a problem for every number that is out of its range."""
    for path, value in _values(config, ""):
        limit = LIMITS.get(path)
        if limit and isinstance(value, str | bool) and path not in _NUMBER_OR_TEXT:
            problems.add(path, f"wants a number, got {shown(value)}")
        for number in _numbers(value) if limit else ():
            fault = limit.fault(number) if limit else None
            if fault:
                problems.add(path, f"{fault}; got {shown(value)}")
                break


def check_sections(config: Any) -> None:
    """Raise ``TypeError`` if a section is not of its class, for example a mapping."""
    for field in dataclasses.fields(config):
        wanted, value = field.default_factory, getattr(config, field.name)
        if isinstance(wanted, type) and not isinstance(value, wanted):
            kind = type(value).__name__
            raise TypeError(f"Config: {field.name} is a {kind}; pass a {wanted.__name__}, or use Config.from_dict.")


def _values(section: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All settings with their dotted paths."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", value


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value

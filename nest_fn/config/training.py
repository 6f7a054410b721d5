"""Settings of a training run: data, augmentation, optimizer, schedule, trainer. The model does not read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .representation import ShortRepr


@dataclass(frozen=True, repr=False)
class AugmentConfig(ShortRepr):
    """Noise and other speakers mixed into the input (reference 7.5). Ratios are dB of the audio over what is added."""

    prob: float = 0.5  # probability that an utterance is augmented
    noise_ratio: float = 0.5  # probability that noise is added, else other speakers of the batch
    min_r_speech: float = -5.0  # dB
    max_r_speech: float = 5.0  # dB
    min_r_noise: float = -5.0  # dB
    max_r_noise: float = 20.0  # dB
    min_mix_rate: float = 0.5  # fraction of the utterance that is covered
    max_mix_rate: float = 0.5
    min_num_segments: int = 1
    max_num_segments: int = 1
    min_num_speakers: int = 1
    max_num_speakers: int = 1
    rir_prob: float = 0.0  # probability that an utterance is convolved with a room impulse response
    keep_raw_noise: bool = False  # True: rows without augmentation keep noise at gain 1, as in the reference (Q32)


@dataclass(frozen=True, repr=False)
class DataConfig(ShortRepr):
    """Sources of audio, and batching."""

    train: tuple[str, ...] = ()  # manifests (JSONL)
    valid: tuple[str, ...] = ()
    noise: tuple[str, ...] = ()
    rir: tuple[str, ...] = ()
    train_shards: tuple[str, ...] = ()  # tar archives with the audio, e.g. audio_{0..511}.tar; empty: files
    valid_shards: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = None  # one per training manifest: how often its utterances occur in an epoch
    min_duration: float = 1.0  # seconds
    max_duration: float = 60.0  # seconds
    batch_seconds: float = 240.0  # seconds of padded audio in one batch, over all ranks
    max_batch_size: int = 256  # utterances
    row_multiple: int = 1  # the rows of a batch are a multiple of it; ranks x accumulate avoids empty rows
    num_buckets: int = 24  # maximum number of padded widths, each a multiple of 8 encoder frames
    shuffle: bool = True
    num_workers: int = 4
    prefetch: int = 4  # batches prepared ahead of the step
    channel: Literal["error", "mix", "first"] | int = "error"  # or the index of one channel
    resample: bool = True  # False: a file of another sample rate is an error
    short_audio: str = "pad"  # pad, repeat: how to fill an utterance shorter than min_audio (reference 7.2, Q30)
    min_audio: float = 1.0  # seconds
    noise_budget_mb: int = 1024  # MB of int16 noise kept in memory
    root: str | None = None  # if set, all audio files must be inside this folder
    check_files: bool = True  # True: check at the start of a run that all files exist
    duration_tolerance: float | None = None  # seconds by which a file may be too short; None: 2 samples, MP3 0.5 s
    skip_silent: bool = False  # True: an utterance whose samples are all 0 has weight 0
    on_error: str = "raise"  # raise, zero_weight
    max_bad_fraction: float = 0.01  # zero_weight: the run ends if a larger fraction of utterances is unreadable
    timeout_s: float = 300.0  # seconds to wait for a worker
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, repr=False)
class SchedConfig(ShortRepr):
    """Learning rate as a function of the step (reference 6.4)."""

    name: str = "noam"  # noam, cosine, constant
    d_model: int | None = None  # None: encoder.d_model
    warmup_steps: int | None = 25000
    warmup_ratio: float | None = None  # of max_steps; excludes warmup_steps
    constant_steps: int = 0  # cosine: steps at min_lr at the end (reference 6.4)
    min_lr: float = 1e-6
    max_steps: int | None = None  # None: trainer.max_steps

    @property
    def warmup(self) -> int:
        """Warm-up steps, from ``warmup_steps`` or ``warmup_ratio``; 0 if neither is given."""
        if self.warmup_ratio is not None:
            return int(self.warmup_ratio * (self.max_steps or 0))
        return self.warmup_steps or 0


@dataclass(frozen=True, repr=False)
class OptimConfig(ShortRepr):
    """Optimizer and its schedule (reference 6.4)."""

    name: str = "adamw"  # adamw, adam, sgd
    lr: float = 5.0  # noam: its factor; else the peak learning rate
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 1e-3
    momentum: float = 0.9  # sgd only
    sched: SchedConfig | None = field(default_factory=SchedConfig)


@dataclass(frozen=True, repr=False)
class TrainerConfig(ShortRepr):
    """Duration, precision, device, logging, checkpoints and fault handling of a run."""

    max_steps: int = 100_000
    seed: int = 0
    precision: str = "fp32"  # fp32, bf16
    compile: str = "auto"  # auto (on with CUDA), on, off
    device: str = "auto"  # auto, cpu, cuda
    accumulate: int = 1  # micro-batches in one update
    clip_norm: float = 0.0  # 0: off
    ema_decay: float = 0.0  # 0: off
    log_every: int = 10  # steps
    valid_every: int = 1000  # steps
    save_every: int = 1000  # steps
    keep_last: int = 3  # checkpoints
    keep_best: int = 0  # in addition, this many with the lowest validation loss
    keep_every: int = 0  # in addition, those of steps divisible by it; 0: none
    skip_nonfinite: int = 0  # consecutive updates to skip because of NaN or infinity; 0: the first ends the run
    skip_norm: float = 0.0  # updates with a larger gradient norm are skipped; 0: off
    stop_on_collapse: bool = False  # True: codebook collapse ends the run; False: it is a warning
    recompute: bool = False  # True: activations of the blocks are recomputed in the backward pass, to save memory
    shard: bool = False  # True: parameters and optimizer state are sharded over ranks; False: replicated
    rank_timeout_s: float = 60.0  # seconds without a heartbeat after which a rank counts as lost
    collective_timeout_s: float = 900.0  # maximum seconds that a rank may keep the others waiting, e.g. in a save
    threads: int = 0  # CPU threads; 0: PyTorch's default
    deterministic: bool = False

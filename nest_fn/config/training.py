"""Settings of a training run: data, augmentation, optimizer, schedule, trainer. The model does not read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .representation import ShortRepr


@dataclass(frozen=True, repr=False)
class AugmentConfig(ShortRepr):
    """Noise and other speakers mixed into the input (reference 7.5). Ratios are dB of the audio over what is added."""

    prob: float = 0.5  # probability; that an utterance is augmented
    noise_ratio: float = 0.5  # probability; that noise is added, else other speakers of the batch
    min_r_speech: float = -5.0  # dB; lowest ratio to other speakers
    max_r_speech: float = 5.0  # dB; highest ratio to other speakers
    min_r_noise: float = -5.0  # dB; lowest ratio to noise
    max_r_noise: float = 20.0  # dB; highest ratio to noise
    min_mix_rate: float = 0.5  # fraction; least part of the utterance that is covered
    max_mix_rate: float = 0.5  # fraction; greatest part of the utterance that is covered
    min_num_segments: int = 1  # fewest segments that the covering is cut into
    max_num_segments: int = 1  # most segments that the covering is cut into
    min_num_speakers: int = 1  # fewest interfering speakers
    max_num_speakers: int = 1  # most interfering speakers
    rir_prob: float = 0.0  # probability; that an utterance is convolved with a room impulse response
    keep_raw_noise: bool = False  # True: rows without augmentation keep noise at gain 1, as in the reference (Q32)


@dataclass(frozen=True, repr=False)
class DataConfig(ShortRepr):
    """Sources of audio, and batching."""

    train: tuple[str, ...] = ()  # manifests (JSONL) to train on
    valid: tuple[str, ...] = ()  # manifests of the validation; none: no validation
    noise: tuple[str, ...] = ()  # manifests of noise that is mixed in
    rir: tuple[str, ...] = ()  # manifests of room impulse responses
    train_shards: tuple[str, ...] = ()  # tar archives with the audio, e.g. audio_{0..511}.tar; empty: files
    valid_shards: tuple[str, ...] = ()  # tar archives with the validation's audio; empty: files
    weights: tuple[float, ...] | None = None  # one per training manifest: how often its utterances occur in an epoch
    min_duration: float = 1.0  # seconds; shorter utterances are left out
    max_duration: float = 60.0  # seconds; what becomes of longer utterances says data.long
    long: str = "drop"  # drop, crop; of utterances above max_duration: left out, or divided into equal crops
    batch_seconds: float = 240.0  # seconds; of padded audio in one batch, over all ranks
    max_batch_size: int = 256  # utterances; at most in one batch, over all ranks
    row_multiple: int = 1  # the rows of a batch are a multiple of it; ranks x accumulate avoids empty rows
    num_buckets: int = 24  # maximum number of padded widths, each a multiple of 8 encoder frames
    shuffle: bool = True  # True: another order in each epoch; False: that of the manifests
    num_workers: int = 4  # threads that read audio; 0: the loop reads it
    prefetch: int = 4  # batches; prepared ahead of the step
    channel: Literal["error", "mix", "first"] | int = "error"  # which of several: error, mix, first, or an index
    resample: bool = True  # False: a file of another sample rate is an error
    short_audio: str = "pad"  # how to fill an utterance shorter than min_audio: pad, repeat (reference 7.2, Q30)
    min_audio: float = 1.0  # seconds; shorter audio is filled up to it
    noise_budget_mb: int = 1024  # MB; of int16 noise kept in memory
    root: str | None = None  # if set, all audio files must be inside this folder
    remote_cache: str | None = None  # folder of copies of files at https://, s3://, ...; None: ~/.cache/nest_fn
    remote_cache_mb: float | None = 100_000.0  # MB; of copies that are kept, those used last; None: all
    check_files: bool = True  # True: check at the start of a run that all files exist
    duration_tolerance: float | None = None  # seconds; by which a file may be too short; None: 2 samples, MP3 0.5 s
    skip_silent: bool = False  # True: an utterance whose samples are all 0 has weight 0
    on_error: str = "raise"  # what an unreadable file does, end the run or count for nothing: raise, zero_weight
    max_bad_fraction: float = 0.01  # fraction; zero_weight: the run ends if more utterances are unreadable
    timeout_s: float = 300.0  # seconds; to wait for a worker
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, repr=False)
class SchedConfig(ShortRepr):
    """Learning rate as a function of the step (reference 6.4)."""

    name: str = "noam"  # shape of the learning rate over the steps: noam, cosine, constant
    d_model: int | None = None  # noam: the rate is lr * d_model^-0.5 * ...; None: encoder.d_model
    warmup_steps: int | None = 25000  # steps; over which the rate rises
    warmup_ratio: float | None = None  # fraction; of max_steps over which the rate rises; excludes warmup_steps
    constant_steps: int = 0  # steps; cosine: at min_lr at the end (reference 6.4)
    min_lr: float = 1e-6  # the rate does not fall below it after the warm-up
    max_steps: int | None = None  # steps; cosine: where the rate is lowest; None: trainer.max_steps

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
    betas: tuple[float, float] = (0.9, 0.98)  # decay of Adam's means of the gradient and of its square
    eps: float = 1e-8  # added to the root of Adam's mean square
    weight_decay: float = 1e-3  # of all parameters, decoupled from the gradient in adamw
    momentum: float = 0.9  # sgd only
    sched: SchedConfig | None = field(default_factory=SchedConfig)


@dataclass(frozen=True, repr=False)
class TrainerConfig(ShortRepr):
    """Duration, precision, device, logging, checkpoints and fault handling of a run."""

    max_steps: int = 100_000  # steps; updates, at which the run ends
    seed: int = 0  # of all random numbers of the run
    precision: str = "fp32"  # of the forward and backward pass: fp32, bf16
    compile: str = "auto"  # the step by parts: auto (on with CUDA), on, off
    device: str = "auto"  # auto (CUDA where there is one), cpu, cuda, cuda:N
    accumulate: int = 1  # micro-batches in one update
    clip_norm: float = 0.0  # largest norm of the gradient; it is scaled down to it; 0: off
    ema_decay: float = 0.0  # of a moving average of the parameters, in each step; 0: off
    loggers: tuple[str, ...] = ("tensorboard",)  # curves beside metrics.jsonl: tensorboard (if installed), wandb
    log_every: int = 10  # steps; from one line of metrics to the next
    valid_every: int = 1000  # steps; from one validation to the next; 0: at the end alone
    save_every: int = 1000  # steps; from one checkpoint to the next; 0: at the end alone
    digest_every: int = 0  # steps; from one record of every tensor's digest to the next, for verify and diff; 0: off
    keep_last: int = 3  # checkpoints; the newest ones that are kept
    keep_best: int = 0  # checkpoints; kept in addition, those with the lowest validation loss
    keep_every: int = 0  # steps; in addition, checkpoints of steps divisible by it are kept; 0: none
    skip_nonfinite: int = 0  # consecutive updates to skip because of NaN or infinity; 0: the first ends the run
    skip_norm: float = 0.0  # updates with a larger gradient norm are skipped; 0: off
    stop_on_collapse: bool = False  # True: codebook collapse ends the run; False: it is a warning
    recompute: bool = False  # True: activations of the blocks are recomputed in the backward pass, to save memory
    shard: bool = False  # True: parameters and optimizer state are sharded over ranks; False: replicated
    rank_timeout_s: float = 60.0  # seconds; without a heartbeat after which a rank counts as lost
    collective_timeout_s: float = 900.0  # seconds; at most that a rank may keep the others waiting, e.g. in a save
    threads: int = 0  # CPU threads; 0: PyTorch's default
    deterministic: bool = False  # True: PyTorch's deterministic algorithms alone, slower on CUDA

"""The model's settings: frozen dataclasses that mirror the reference's ``model:`` YAML (reference 1.2, 2 to 5).

The defaults are those of the NEST recipe (the reference's ``nest_fast-conformer.yaml``), so that ``Config()`` is
NEST-Large. Comments give the units; ``None`` means "derived" or "off", as noted at each field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .representation import ShortRepr

Compat = Literal["current", "legacy"]
"""Numerics of the reference from version 2.5 on (``current``) or up to 2.4 (``legacy``): reference 0."""


@dataclass(frozen=True, repr=False)
class PreprocessorConfig(ShortRepr):
    """Waveform to log-mel (reference 1.2)."""

    sample_rate: int = 16000  # Hz
    window_size: float | None = 0.025  # seconds; or n_window_size
    window_stride: float | None = 0.01  # seconds; or n_window_stride
    n_window_size: int | None = None  # samples; excludes window_size
    n_window_stride: int | None = None  # samples; excludes window_stride
    window: str = "hann"  # hann, hamming, blackman, bartlett
    n_fft: int | None = 512  # samples; None: next power of two not below the window
    preemph: float | None = 0.97  # None: off
    features: int = 80  # mel bins
    lowfreq: float = 0.0  # Hz
    highfreq: float | None = None  # Hz; None: sample_rate / 2
    mel_norm: str | None = "slaney"  # slaney or None
    mag_power: float = 2.0
    log: bool = True  # natural logarithm
    log_zero_guard_type: str = "add"  # add, clamp
    log_zero_guard_value: float | str = 2.0**-24  # or tiny, eps (of float32)
    dither: float = 1e-5  # standard deviation, train only
    pad_to: int = 16  # frames; 0: no padding
    pad_value: float = 0.0
    normalize: str | None = "per_feature"  # per_feature, all_features, fixed, None
    fixed_mean: tuple[float, ...] | None = None  # [features], for normalize=fixed
    fixed_std: tuple[float, ...] | None = None  # [features], for normalize=fixed
    frame_splicing: int = 1
    exact_pad: bool = False
    nb_augmentation_prob: float = 0.0  # probability that an utterance is made narrow-band in training
    nb_max_freq: float = 4000.0  # Hz
    compat: Compat = "current"

    @property
    def window_length(self) -> int:
        """Samples in one analysis window."""
        return self.n_window_size if self.n_window_size is not None else int((self.window_size or 0) * self.sample_rate)

    @property
    def hop_length(self) -> int:
        """Samples between the starts of two frames."""
        if self.n_window_stride is not None:
            return self.n_window_stride
        return int((self.window_stride or 0) * self.sample_rate)

    @property
    def fft_length(self) -> int:
        """Samples in one FFT: ``n_fft``, or the next power of two not below the window."""
        return self.n_fft if self.n_fft is not None else 1 << (self.window_length - 1).bit_length()


@dataclass(frozen=True, repr=False)
class MaskingConfig(ShortRepr):
    """Random block masking (reference 3)."""

    block_size: int = 40  # frames of 10 ms, also under post_conv (divided by the subsampling factor there)
    mask_prob: float = 0.01  # probability per frame with allow_overlap, fraction of all frames without
    allow_overlap: bool = True
    freeze: bool = True  # False: the mask embedding is trained
    mask_value: float | None = None  # None: embedding drawn from N(0, 0.1^2); else a constant, never trained
    max_mask_ratio: float = 0.8  # an utterance is short if block_size >= max_mask_ratio * frames
    feat_in: int | None = None  # None: derived
    force_block: bool = False  # True: every utterance has at least one masked block (Q14)


@dataclass(frozen=True, repr=False)
class QuantizerConfig(ShortRepr):
    """Random-projection vector quantizer (reference 2)."""

    code_dim: int | None = None  # None: Config.code_dim
    num_classes: int | None = None  # None: Config.num_classes
    num_books: int | None = None  # None: Config.num_books
    dist_fn: str = "l2"  # l2, cosine
    freeze: bool = True
    squeeze_single: bool | None = None  # None: Config.squeeze_single
    combine_time_steps: int | None = None  # frames per token; None: the subsampling factor (1 under post_conv)
    feat_in: int | None = None  # None: derived
    input_norm: bool = False  # True: normalise stacked frames before projection, as newer NeMo (reference 0)
    precision: str = "float64"  # of the nearest-code search: float64 (as the reference), float32


@dataclass(frozen=True, repr=False)
class EncoderConfig(ShortRepr):
    """FastConformer encoder (reference 4.1)."""

    feat_in: int | None = None  # None: preprocessor.features
    feat_out: int = -1  # > 0: width of an extra linear layer after the last layer
    n_layers: int = 17
    d_model: int = 512
    n_heads: int = 8
    subsampling: str | None = "dw_striding"  # dw_striding, striding, stacking, stacking_norm, vggnet, None
    subsampling_factor: int = 8
    subsampling_conv_channels: int = 256  # -1: d_model
    subsampling_conv_chunking_factor: int = 1
    causal_downsampling: bool = False
    reduction: str | None = None  # pooling, striding
    reduction_position: int | None = None  # after which layer; -1 or None: at the end
    reduction_factor: int = 1
    ff_expansion_factor: int = 4
    self_attention_model: str = "rel_pos"  # rel_pos, rel_pos_local_attn, abs_pos
    att_context_size: tuple[tuple[int, int], ...] = ((-1, -1),)  # encoder frames (left, right); -1: unlimited
    att_context_probs: tuple[float, ...] | None = None  # None: uniform over att_context_size
    att_context_style: str = "regular"  # regular, chunked_limited
    global_tokens: int = 0
    global_tokens_spacing: int = 1
    global_attn_separate: bool = False
    xscaling: bool = True
    untie_biases: bool = True
    pos_emb_max_len: int = 5000  # accepted without effect; positions are computed for any length
    conv_kernel_size: int = 9
    conv_norm_type: str = "batch_norm"  # batch_norm, layer_norm, instance_norm, fused_batch_norm, group_normN
    conv_context_size: tuple[int, int] | str | None = None  # (left, right), causal, None: symmetric
    use_bias: bool = True
    dropout: float = 0.1
    dropout_pre_encoder: float = 0.1
    dropout_emb: float = 0.0
    dropout_att: float = 0.1
    stochastic_depth_drop_prob: float = 0.0
    stochastic_depth_mode: str = "linear"  # linear, uniform
    stochastic_depth_start_layer: int = 1
    use_pytorch_sdpa: bool = False
    masked_batch_norm: bool = False  # True: padded frames are excluded from batch statistics (Q27)
    aligned_local_positions: bool = False  # True: position scores at the right keys if left != right (Q47)
    detach_subsampling: bool = False  # True: post_conv as in the reference, where subsampling is not trained (Q18)
    compat: Compat = "current"


@dataclass(frozen=True, repr=False)
class DecoderConfig(ShortRepr):
    """Linear layer and softmax for each codebook (reference 5)."""

    feat_in: int | None = None  # None: the encoder's output width
    num_classes: int | None = None  # None: Config.num_classes
    num_decoders: int | None = None  # None: Config.num_books
    use_bias: bool = True
    squeeze_single: bool | None = None  # None: Config.squeeze_single
    init_mode: str = "xavier_uniform"  # xavier_uniform, xavier_normal, kaiming_uniform, kaiming_normal


@dataclass(frozen=True, repr=False)
class LossConfig(ShortRepr):
    """Cross-entropy on masked tokens (reference 5)."""

    mask_threshold: float = 0.8  # a token enters the loss if more than this fraction of its frames is masked
    combine_time_steps: int | None = None  # frames per token; None: as for the quantizer
    num_decoders: int | None = None  # None: Config.num_books
    squeeze_single: bool | None = None  # None: Config.squeeze_single
    capacity: float = 1.0  # compiled runs: maximum fraction of a batch's tokens that the decoder processes

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

    sample_rate: int = 16000  # Hz; that of Config, which replaces it
    window_size: float | None = 0.025  # seconds; length of an analysis window; or n_window_size
    window_stride: float | None = 0.01  # seconds; from one frame to the next; or n_window_stride
    n_window_size: int | None = None  # samples; length of an analysis window; excludes window_size
    n_window_stride: int | None = None  # samples; from one frame to the next; excludes window_stride
    window: str = "hann"  # shape of the window: hann, hamming, blackman, bartlett
    n_fft: int | None = 512  # samples; length of the FFT; None: next power of two not below the window
    preemph: float | None = 0.97  # share of the sample before that is subtracted from each; None: off
    features: int = 80  # mel bins
    lowfreq: float = 0.0  # Hz; lower edge of the lowest mel filter
    highfreq: float | None = None  # Hz; upper edge of the highest mel filter; None: sample_rate / 2
    mel_norm: str | None = "slaney"  # slaney: all mel filters have the same area; None: off
    mag_power: float = 2.0  # power of the magnitude that the mel filters sum
    log: bool = True  # True: natural logarithm of the mel features
    log_zero_guard_type: str = "add"  # how the logarithm of 0 is avoided: add, clamp
    log_zero_guard_value: float | str = 2.0**-24  # what is added, or the least value; or tiny, eps (of float32)
    dither: float = 1e-5  # standard deviation of white noise added to the samples, train only
    pad_to: int = 16  # frames; the padded width is a multiple of it; 0: no padding
    pad_value: float = 0.0  # value of padded frames
    normalize: str | None = "per_feature"  # to mean 0 and deviation 1: per_feature, all_features, fixed, None
    fixed_mean: tuple[float, ...] | None = None  # [features], for normalize=fixed
    fixed_std: tuple[float, ...] | None = None  # [features], for normalize=fixed
    frame_splicing: int = 1  # copies of a frame that are stacked (Q7)
    exact_pad: bool = False  # True: (n_fft - hop) / 2 zeros on both sides, frames are not centred (Q8)
    nb_augmentation_prob: float = 0.0  # probability; that an utterance is made narrow-band in training
    nb_max_freq: float = 4000.0  # Hz; narrow-band utterances have nothing above it
    compat: Compat = "current"  # that of Config, which replaces it

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

    block_size: int = 40  # frames of 10 ms; length of a block, also under post_conv (divided by the factor there)
    mask_prob: float = 0.01  # probability that a block starts with allow_overlap, fraction of all frames without
    allow_overlap: bool = True  # True: blocks may overlap; False: they are drawn without overlap
    freeze: bool = True  # False: the mask embedding is trained
    mask_value: float | None = None  # None: embedding drawn from N(0, 0.1^2); else a constant, never trained
    max_mask_ratio: float = 0.8  # fraction; an utterance is short if block_size >= max_mask_ratio * frames
    feat_in: int | None = None  # width of what is masked; None: derived
    force_block: bool = False  # True: every utterance has at least one masked block (Q14)


@dataclass(frozen=True, repr=False)
class QuantizerConfig(ShortRepr):
    """Random-projection vector quantizer (reference 2)."""

    code_dim: int | None = None  # width of a code; None: Config.code_dim
    num_classes: int | None = None  # codes in a codebook; None: Config.num_classes
    num_books: int | None = None  # codebooks; None: Config.num_books
    dist_fn: str = "l2"  # distance by which the nearest code is found: l2, cosine
    freeze: bool = True  # True: projection and codebooks are never trained
    squeeze_single: bool | None = None  # None: Config.squeeze_single
    combine_time_steps: int | None = None  # frames; in a token; None: the subsampling factor (1 under post_conv)
    feat_in: int | None = None  # width of a frame; None: derived
    input_norm: bool = False  # True: normalise stacked frames before projection, as newer NeMo (reference 0)
    precision: str = "float64"  # of the nearest-code search: float64 (as the reference), float32


@dataclass(frozen=True, repr=False)
class EncoderConfig(ShortRepr):
    """FastConformer encoder (reference 4.1)."""

    feat_in: int | None = None  # width of the input; None: preprocessor.features
    feat_out: int = -1  # width of an extra linear layer after the last layer; -1: none
    n_layers: int = 17  # Conformer blocks
    d_model: int = 512  # width of the blocks
    n_heads: int = 8  # attention heads; they divide d_model
    subsampling: str | None = "dw_striding"  # dw_striding, striding, stacking, stacking_norm, vggnet, None
    subsampling_factor: int = 8  # frames of 10 ms; in one encoder frame
    subsampling_conv_channels: int = 256  # channels of the subsampling's convolutions; -1: d_model
    subsampling_conv_chunking_factor: int = 1  # must be 1 (Q22, Q24)
    causal_downsampling: bool = False  # True: the subsampling sees no later frames
    reduction: str | None = None  # second subsampling, between the blocks: pooling, striding, None
    reduction_position: int | None = None  # after which layer; -1 or None: at the end
    reduction_factor: int = 1  # encoder frames; that the reduction makes one of
    ff_expansion_factor: int = 4  # width of the feed-forward layers, in units of d_model
    self_attention_model: str = "rel_pos"  # positions: rel_pos, rel_pos_local_attn, abs_pos
    att_context_size: tuple[tuple[int, int], ...] = ((-1, -1),)  # encoder frames; (left, right); -1: all
    att_context_probs: tuple[float, ...] | None = None  # probability; of drawing each pair; None: uniform
    att_context_style: str = "regular"  # what limited attention sees, a window or chunks: regular, chunked_limited
    global_tokens: int = 0  # tokens that see all and are seen by all, for rel_pos_local_attn
    global_tokens_spacing: int = 1  # encoder frames; from one global token to the next
    global_attn_separate: bool = False  # True: global tokens have projections of their own
    xscaling: bool = True  # True: the input is scaled by sqrt(d_model)
    untie_biases: bool = True  # True: each layer has its own biases of relative attention
    pos_emb_max_len: int = 5000  # accepted without effect; positions are computed for any length
    conv_kernel_size: int = 9  # encoder frames; of the depthwise convolution
    conv_norm_type: str = "batch_norm"  # batch_norm, layer_norm, instance_norm, fused_batch_norm, group_normN
    conv_context_size: tuple[int, int] | str | None = None  # (left, right), causal, None: symmetric
    use_bias: bool = True  # True: linear layers and convolutions of the blocks have biases
    dropout: float = 0.1  # probability; in feed-forward layers, and of the residual branches
    dropout_pre_encoder: float = 0.1  # probability; of the first block's input
    dropout_emb: float = 0.0  # probability; of the position embeddings
    dropout_att: float = 0.1  # probability; of attention weights
    stochastic_depth_drop_prob: float = 0.0  # probability; that a block is skipped in training; linear: the last one
    stochastic_depth_mode: str = "linear"  # how the probability rises over the layers: linear, uniform
    stochastic_depth_start_layer: int = 1  # first layer that may be skipped, from 1
    use_pytorch_sdpa: bool = False  # True: PyTorch's fused attention; it has no forward-mode gradient
    masked_batch_norm: bool = False  # True: padded frames are excluded from batch statistics (Q27)
    aligned_local_positions: bool = False  # True: position scores at the right keys if left != right (Q47)
    detach_subsampling: bool = False  # True: post_conv as in the reference, where subsampling is not trained (Q18)
    compat: Compat = "current"  # that of Config, which replaces it


@dataclass(frozen=True, repr=False)
class DecoderConfig(ShortRepr):
    """Linear layer and softmax for each codebook (reference 5)."""

    feat_in: int | None = None  # width of the input; None: the encoder's output width
    num_classes: int | None = None  # classes of each codebook; None: Config.num_classes
    num_decoders: int | None = None  # linear layers, one a codebook; None: Config.num_books
    use_bias: bool = True  # True: the linear layers have biases
    squeeze_single: bool | None = None  # None: Config.squeeze_single
    init_mode: str = "xavier_uniform"  # initial weights: xavier_uniform, xavier_normal, kaiming_uniform, kaiming_normal


@dataclass(frozen=True, repr=False)
class LossConfig(ShortRepr):
    """Cross-entropy on masked tokens (reference 5)."""

    mask_threshold: float = 0.8  # fraction; a token enters the loss if more than this of its frames is masked
    combine_time_steps: int | None = None  # frames; in a token; None: as for the quantizer
    num_decoders: int | None = None  # codebooks; None: Config.num_books
    squeeze_single: bool | None = None  # None: Config.squeeze_single
    capacity: float = 1.0  # fraction; compiled runs: maximum of a batch's tokens that the decoder processes

"""Settings that do not fit each other are refused before anything is allocated; those of the reference are accepted."""

from __future__ import annotations

import pytest

from nest_fn.config import Config, ConfigError


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["num_classes=1"], "'num_classes' must be at least 2"),
        (["sample_rate=0"], "'sample_rate' must be at least 1"),
        (["mask_position=mid_conv"], "'mask_position' must be one of pre_conv, post_conv"),
        (["quantizer.num_classes=7"], "'quantizer.num_classes' is 7, the rest of the config makes it 8192"),
        (["loss.combine_time_steps=4"], "makes it 8"),
        (["decoder.num_decoders=2"], "'decoder.num_decoders' is 2"),
        (["quantizer.squeeze_single=true"], "makes it False"),
        (["encoder.feat_in=40"], "'encoder.feat_in' is 40, the rest of the config makes it 80"),
        (["preprocessor.window=hanning"], "'preprocessor.window' must be one of hann, hamming"),
        (["preprocessor.n_fft=256"], "is 256, shorter than the window of 400"),
        (["preprocessor.window_size=null"], "neither is given"),
        (["preprocessor.window_stride=1e-6"], "hop of 0 samples"),
        (["preprocessor.highfreq=9000"], r"must lie in \(lowfreq, sample_rate / 2\]"),
        (["preprocessor.lowfreq=8000"], "must lie in"),
        (["preprocessor.log_zero_guard_value=0"], "must be above 0, tiny or eps"),
        (["preprocessor.log_zero_guard_value=small"], "tiny or eps"),
        (["preprocessor.normalize=per_band"], "must be one of per_feature, all_features, fixed, null"),
        (["preprocessor.normalize=fixed"], "fixed_mean' has 0 values; normalize=fixed wants 80"),
        (["preprocessor.fixed_mean=[1.0]"], "has 1 values; normalize=per_feature wants 0"),
        (["preprocessor.mel_norm=htk"], "must be one of slaney, null"),
        (["preprocessor.pad_to=12"], "must be a multiple of the 8 frames of a token, or 0; got 12"),
        (["preprocessor.dither=-1"], "must be at least 0"),
        (["preprocessor.exact_pad=true", "preprocessor.n_window_stride=161"], "wants an even hop"),
        (["preprocessor.nb_augmentation_prob=1.5"], r"must lie in \[0, 1\]"),
        (["masking.block_size=4"], "less than the 8 of one token"),
        (["masking.block_size=4", "mask_position=post_conv"], "less than the 8"),
        (["masking.mask_prob=-0.1"], r"\[0, 1\]; got -0.1"),
        (["quantizer.dist_fn=dot"], "must be one of l2, cosine"),
        (["encoder.n_heads=7"], "must divide d_model"),
        (["encoder.n_heads=0"], "must be at least 1"),
        (["encoder.d_model=33", "encoder.n_heads=3"], "must be even"),
        (["encoder.subsampling=striding_conv1d"], r"fails in the reference \(Q25\)"),
        (["encoder.subsampling=dw_striding_conv1d"], r"fails in the reference \(Q25\)"),
        (["encoder.subsampling=conv"], "must be one of dw_striding, striding, vggnet, stacking"),
        (["encoder.subsampling_factor=6"], "must be a power of two for 'dw_striding'; got 6"),
        (["encoder.subsampling_factor=0"], "must be"),
        (["encoder.subsampling_conv_chunking_factor=-1"], "must be 1; splitting fails"),
        (["encoder.reduction=mean"], "must be one of null, pooling, striding"),
        (["encoder.reduction_factor=2"], "is 2 without 'reduction'"),
        (["encoder.reduction=pooling", "encoder.reduction_position=17"], r"must lie in -1\.\.16; got 17"),
        (["encoder.reduction=striding", "encoder.reduction_factor=3"], "must be a power of two; got 3"),
        (["encoder.self_attention_model=alibi"], "must be one of rel_pos"),
        (["encoder.self_attention_model=rel_pos_local_attn"], "must be above 0 for rel_pos_local_attn"),
        (["encoder.att_context_style=chunked_limited", "encoder.att_context_size=[9,3]"], "multiple of the chunk"),
        (["encoder.att_context_size=[-2,0]"], r"must hold -1 \(unlimited\)"),
        (["encoder.att_context_size=[]"], "at least one"),
        (["encoder.att_context_probs=[0.5,0.5]"], "one probability for each of 1 contexts"),
        (["encoder.att_context_size=[[1,1],[2,2]]", "encoder.att_context_probs=[0.5,0.6]"], "with sum 1"),
        (["encoder.global_tokens=1"], "works with rel_pos_local_attn only"),
        (["encoder.conv_kernel_size=8"], "must be odd"),
        (["encoder.conv_norm_type=groupnorm4"], r"group_normN \(N groups\); got 'groupnorm4'"),
        (["encoder.conv_norm_type=group_norm7"], "groups must divide d_model 512"),
        (["encoder.conv_context_size=[4,3]"], r"left \+ right \+ 1 must be conv_kernel_size 9"),
        (["encoder.conv_context_size=future"], "must be one of causal, null"),
        (["encoder.dropout=1.0"], r"must lie in \[0, 1\); got 1.0"),
        (["encoder.stochastic_depth_drop_prob=1"], r"must lie in \[0, 1\)"),
        (["encoder.stochastic_depth_start_layer=0"], "at least 1"),
        (["encoder.feat_out=0"], r"must be -1 \(off\) or above 0"),
        (["decoder.init_mode=zeros"], "must be one of xavier_uniform"),
        (["loss.mask_threshold=1"], r"\[0, 1\); got 1.0"),
        (["loss.capacity=0"], r"\(0, 1\]"),
        (["optim.name=lamb"], "must be one of adamw, adam, sgd"),
        (["optim.lr=-1"], "must be at least 0"),
        (["optim.betas=[0.9,1]"], r"must lie in \[0, 1\)"),
        (["optim.eps=0"], "must be above 0"),
        (["optim.lr=1e-7"], "'optim.sched.min_lr' is 1e-06, above optim.lr 1e-07"),
        (["optim.sched.name=cosine", "trainer.max_steps=100"], "is 100, but warm-up and constant part take 25000"),
        (["data.min_duration=61"], "above max_duration"),
        (["data.train=[a,b]", "data.weights=[1.0]"], "each of 2 training manifests"),
        (["data.channel=left"], "wants one of error, mix, first or a whole number, got 'left'"),
        (["data.channel=-1"], "must be at least 0; got -1"),
        (["data.on_error=skip"], "must be one of raise, zero_weight"),
        (["data.augment.prob=2"], r"'data.augment.prob' must lie in \[0, 1\]"),
        (["data.augment.min_r_noise=30"], "above max_r_noise"),
        (["data.augment.min_num_speakers=0"], "at least 1"),
        (["trainer.accumulate=0"], "at least 1"),
        (["trainer.precision=fp16"], "must be one of fp32, bf16"),
        (["trainer.compile=maybe"], "must be one of auto, on, off"),
        (["trainer.device=tpu"], "must be auto, cpu, cuda or cuda:N"),
        (["trainer.ema_decay=1"], r"\[0, 1\)"),
    ],
)
def test_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config().override(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["encoder.conv_norm_type=group_norm8"],
        ["encoder.conv_norm_type=fused_batch_norm"],
        ["encoder.conv_context_size=causal", "encoder.causal_downsampling=true"],
        ["encoder.att_context_style=chunked_limited", "encoder.att_context_size=[8,3]"],
        ["encoder.att_context_style=chunked_limited", "encoder.att_context_size=[[-1,3],[8,-1]]"],
        [
            "encoder.self_attention_model=rel_pos_local_attn",
            "encoder.att_context_size=[4,2]",
            "encoder.global_tokens=1",
        ],
        ["encoder.pos_emb_max_len=4"],
        ["encoder.subsampling=stacking", "encoder.subsampling_factor=6", "preprocessor.pad_to=12"],
        ["encoder.reduction=pooling", "encoder.reduction_position=5", "encoder.reduction_factor=2"],
        ["encoder.subsampling=vggnet", "encoder.subsampling_factor=4"],
        ["preprocessor.pad_to=0"],
        ["preprocessor.log_zero_guard_value=eps", "preprocessor.log_zero_guard_type=clamp"],
        ["optim.sched.name=cosine"],
        ["optim.sched=null"],
        ["trainer.device=cuda:1"],
        ["trainer.max_steps=1"],
    ],
)
def test_accepted(overrides: list[str]) -> None:
    assert Config().override(*overrides) != Config()


def test_reduction_makes_longer_tokens() -> None:
    reduced = ("encoder.reduction=striding", "encoder.reduction_factor=2")
    assert Config().override(*reduced).loss.combine_time_steps == 16
    post_conv = Config().override(*reduced, "mask_position=post_conv")
    assert (post_conv.quantizer.combine_time_steps, post_conv.frames_per_token) == (2, 16)

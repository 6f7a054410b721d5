"""Files as the reference and the original PureTorchSSLModel interface write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nest_fn.config import Config, ConfigError

SEED = """
model:
  sample_rate: 16000
  num_classes: 4096
  num_books: 1
  code_dim: 16
  squeeze_single: false
  mask_position: pre_conv
  preprocessor: {features: 80, window_size: 0.025, window_stride: 0.01, n_fft: 512, normalize: per_feature}
  encoder:
    n_layers: 3
    d_model: 128
    n_heads: 8
    subsampling: dw_striding
    subsampling_factor: 8
    subsampling_conv_channels: 64
    ff_expansion_factor: 4
    conv_kernel_size: 9
    dropout: 0.1
  masking: {block_size: 40, mask_prob: 0.01}
  loss: {mask_threshold: 0.8}
  optim:
    name: adamw
    lr: 1e-4
    betas: [0.9, 0.999]
    weight_decay: 1e-3
    sched: {name: noam, d_model: 512, warmup_steps: 25000, min_lr: 1e-6}
"""

REFERENCE = """
name: my-ssl-run
model:
  sample_rate: 16000
  num_classes: 512
  num_books: 2
  code_dim: 8
  squeeze_single: false
  mask_position: pre_conv

  train_ds:
    manifest_filepath: ???
    sample_rate: ${model.sample_rate}
    batch_size: 12
    shuffle: true
    num_workers: 6
    pin_memory: true
    use_start_end_token: false
    trim_silence: false
    max_duration: 32.0
    min_duration: 0.5
    is_concat: false
    concat_sampling_technique: temperature
    is_tarred: false
    tarred_audio_filepaths: null
    shuffle_n: 1000
    bucketing_strategy: synced_randomized
    bucketing_batch_size: null
    drop_last: true
    noise_manifest: noise_a.jsonl,noise_b.jsonl
    batch_augmentor:
      _target_: nemo.collections.asr.modules.ssl_modules.MultiSpeakerNoiseAugmentation
      prob: 0.25
      noise_ratio: 0.75
      min_r_noise: -3
      max_r_noise: 12
      max_num_segments: 3

  validation_ds:
    manifest_filepath: [valid_a.jsonl, valid_b.jsonl]
    noise_manifest: null
    sample_rate: ${model.sample_rate}
    batch_size: 4
    shuffle: false

  preprocessor:
    _target_: nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor
    sample_rate: ${model.sample_rate}
    normalize: per_feature
    features: 64
    frame_splicing: 1
    dither: 0.00001
    pad_to: 32
    log: true

  spec_augment:
    _target_: nemo.collections.asr.modules.SpectrogramAugmentation
    freq_masks: 0
    time_masks: 0
    freq_width: 16
    time_width: 0.05

  masking:
    _target_: nemo.collections.asr.modules.RandomBlockMasking
    block_size: 48
    mask_prob: 0.02
    feat_in: ${model.preprocessor.features}
    freeze: True
    allow_overlap: True

  quantizer:
    _target_: nemo.collections.asr.modules.RandomProjectionVectorQuantizer
    feat_in: ${model.preprocessor.features}
    code_dim: ${model.code_dim}
    num_books: ${model.num_books}
    num_classes: ${model.num_classes}
    dist_fn: l2
    freeze: True
    squeeze_single: ${model.squeeze_single}
    combine_time_steps: ${model.encoder.subsampling_factor}
    time_ahead: false

  encoder:
    _target_: nemo.collections.asr.modules.ConformerEncoder
    feat_in: ${model.preprocessor.features}
    feat_out: -1
    n_layers: 4
    d_model: 96
    subsampling: dw_striding
    subsampling_factor: 8
    subsampling_conv_channels: 32
    causal_downsampling: false
    n_heads: 4
    att_context_size: [-1, -1]
    conv_context_size: null
    sync_max_audio_length: true
    dropout_emb: 0.0

  decoder:
    _target_: nemo.collections.asr.modules.MultiSoftmaxDecoder
    feat_in: ${model.encoder.d_model}
    num_classes: ${model.num_classes}
    num_decoders: ${model.num_books}
    squeeze_single: ${model.squeeze_single}
    use_bias: true

  loss:
    _target_: nemo.collections.asr.losses.MultiMLMLoss
    combine_time_steps: ${model.encoder.subsampling_factor}
    mask_threshold: 0.8
    num_decoders: ${model.num_books}
    squeeze_single: ${model.squeeze_single}

  optim:
    name: adamw
    lr: 2.0
    betas: [0.9, 0.98]
    weight_decay: 1e-3
    sched:
      name: NoamAnnealing
      d_model: ${model.encoder.d_model}
      warmup_steps: 1000
      warmup_ratio: null
      min_lr: 1e-6

trainer:
  devices: -1
  num_nodes: 1
  max_epochs: 500
  max_steps: 7000
  val_check_interval: 1.0
  accelerator: auto
  strategy: ddp
  accumulate_grad_batches: 2
  gradient_clip_val: 1.5
  precision: bf16-mixed
  log_every_n_steps: 5
  sync_batchnorm: true
  enable_checkpointing: false
  logger: false

exp_manager:
  exp_dir: null
"""


def tree() -> dict[str, Any]:
    """The reference's file as a plain mapping, new each time."""
    return yaml.safe_load(REFERENCE)  # type: ignore[no-any-return]


def test_seed_example(tmp_path: Path) -> None:
    path = tmp_path / "seed.yaml"
    path.write_text(SEED)
    config = Config.from_yaml(path)
    assert (config.optim.lr, config.optim.weight_decay, config.optim.betas) == (1e-4, 1e-3, (0.9, 0.999))
    assert config.optim.sched is not None
    assert (config.optim.sched.name, config.optim.sched.d_model, config.optim.sched.min_lr) == ("noam", 512, 1e-6)
    assert (config.num_classes, config.decoder.num_classes, config.encoder.d_model) == (4096, 4096, 128)
    assert Config.from_dict(yaml.safe_load(SEED)["model"]) == config  # lr is text here, as PyYAML reads it


def test_reference_file(tmp_path: Path) -> None:
    path = tmp_path / "nemo.yaml"
    path.write_text(REFERENCE)
    config = Config.from_yaml(path, ["model.train_ds.manifest_filepath=train.jsonl"])
    assert (config.data.train, config.data.valid) == (("train.jsonl",), ("valid_a.jsonl", "valid_b.jsonl"))
    assert config.data.noise == ("noise_a.jsonl", "noise_b.jsonl")
    assert (config.data.max_batch_size, config.data.num_workers, config.data.shuffle) == (12, 6, True)
    assert (config.data.min_duration, config.data.max_duration) == (0.5, 32.0)
    augment = config.data.augment
    assert (augment.prob, augment.noise_ratio, augment.min_r_noise, augment.max_num_segments) == (0.25, 0.75, -3.0, 3)
    trainer = config.trainer
    assert (trainer.max_steps, trainer.accumulate, trainer.clip_norm, trainer.log_every) == (7000, 2, 1.5, 5)
    assert trainer.precision == "bf16"
    assert config.optim.sched is not None
    assert (config.optim.sched.name, config.optim.sched.d_model, config.optim.sched.max_steps) == ("noam", 96, 7000)
    assert (config.preprocessor.features, config.preprocessor.pad_to, config.masking.block_size) == (64, 32, 48)
    assert (config.encoder.d_model, config.decoder.num_decoders, config.quantizer.num_books) == (96, 2, 2)
    assert Config.from_dict(config.to_dict()) == config


def test_missing_marks_are_absent_keys() -> None:
    assert Config.from_dict(tree()).data.train == ()


def test_model_section_alone_reads_the_same() -> None:
    whole = Config.from_dict(tree(), ["trainer={}"])
    model = tree()["model"] | {
        "target": "nemo.collections.asr.models.EncDecDenoiseMaskedTokenPredModel",
        "nemo_version": "2.0",
    }
    assert Config.from_dict(model) == whole


def test_own_data_section_goes_before() -> None:
    config = Config.from_dict(tree() | {"data": {"train": ["mine.jsonl"], "max_duration": 16}})
    assert (config.data.train, config.data.max_duration, config.data.min_duration) == (("mine.jsonl",), 16.0, 0.5)


@pytest.mark.parametrize(
    "override, words",
    [
        ("encoder._target_=nemo.collections.asr.modules.ConvASREncoder", "only ConformerEncoder is read here"),
        ("decoder._target_=a.B", "'model.decoder._target_' names 'a.B'; only MultiSoftmaxDecoder"),
        ("loss._target_=a.ContrastiveLoss", "names 'a.ContrastiveLoss'; only MLMLoss or MultiMLMLoss"),
        ("optim._target_=a.Lion", "no class is read here"),
        ("train_ds.batch_augmentor._target_=a.B", "'model.train_ds.batch_augmentor._target_' names"),
        ("model.target=a.EncDecCTCModel", "names 'a.EncDecCTCModel'"),
        ("preprocessor.use_torchaudio=true", "'model.preprocessor.use_torchaudio' selects other conventions"),
        ("quantizer.time_ahead=true", "'model.quantizer.time_ahead' is not supported"),
        ("spec_augment.freq_masks=2", "'model.spec_augment.freq_masks' must be 0"),
        ("spec_augment.freq_mask=0", "unknown key 'model.spec_augment.freq_mask'; did you mean 'freq_masks'"),
        ("train_ds.is_tarred=true", "is_tarred' is not read here; name the archives in data.train_shards"),
        ("train_ds.is_concat=true", "'model.train_ds.is_concat' is not supported; give several manifests"),
        ("train_ds.trim_silence=true", "trim_silence' is not supported"),
        ("train_ds.max_durations=3", "unknown key 'model.train_ds.max_durations'; did you mean 'max_duration'"),
        ("train_ds.max_duration=long", "'model.train_ds.max_duration' wants a number"),
        ("train_ds.batch_augmentor.prop=1", "unknown key 'model.train_ds.batch_augmentor.prop'; did you mean 'prob'"),
        ("train_ds.sample_rate=8000", "'model.train_ds.sample_rate' is 8000, the model's is 16000"),
        ("validation_ds.manifest_filepath=3", "'model.validation_ds.manifest_filepath' wants a list"),
        ("train_ds=3", "'model.train_ds' wants a mapping"),
        ("trainer.precision=16-mixed", "'trainer.precision' must be one of fp32, bf16; got '16-mixed'"),
        ("trainer.gradient_clip_algorithm=value", "clip_algorithm' must be 'norm'"),
        ("trainer.gradient_clip_val=high", "'trainer.gradient_clip_val' wants a number"),
        ("trainer.clip_norm=1", "'trainer' gives 'clip_norm' twice"),
        ("trainer.max_step=1", "unknown key 'trainer.max_step'; did you mean 'max_steps'"),
        ("optim.sched.name=PolynomialDecayAnnealing", "sched.name' must be one of noam, cosine, constant"),
        ("skip_nan_grad=true", "'model.skip_nan_grad' is not supported"),
        ("init_from_nemo_model=x.nemo", "unknown key 'model.init_from_nemo_model'"),
    ],
)
def test_refused_by_name(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config.from_dict(tree(), [override])


@pytest.mark.parametrize(
    "override, path, wanted",
    [
        ("optim.sched.name=CosineAnnealing", "optim.sched.name", "cosine"),
        ("optim.sched.name=null", "optim.sched.name", "noam"),
        ("optim.sched.name=none", "optim.sched.name", "constant"),
        ("trainer.precision=32", "trainer.precision", "fp32"),
        ("trainer.precision=32-true", "trainer.precision", "fp32"),
        ("trainer.max_steps=-1", "trainer.max_steps", 100_000),
        ("train_ds.channel_selector=average", "data.channel", "mix"),
        ("train_ds.channel_selector=1", "data.channel", 1),
        ("train_ds.batch_duration=90", "data.batch_seconds", 90.0),
        ("spec_augment=null", "encoder.d_model", 96),
        ("train_ds=null", "data.max_batch_size", 256),
    ],
)
def test_translated(override: str, path: str, wanted: Any) -> None:
    value: Any = Config.from_dict(tree(), [override])
    for key in path.split("."):
        value = getattr(value, key)
    assert value == wanted


def test_fixed_statistics_given_as_a_mapping() -> None:
    fixed = {"fixed_mean": [0.0, 1.0], "fixed_std": [1.0, 2.0]}
    section = Config.from_dict({"preprocessor": {"features": 2, "normalize": fixed}}).preprocessor
    assert (section.normalize, section.fixed_mean, section.fixed_std) == ("fixed", (0.0, 1.0), (1.0, 2.0))


def test_a_section_stands_once() -> None:
    with pytest.raises(ConfigError, match="'optim' stands both at the top level and in 'model'"):
        Config.from_dict(tree() | {"optim": {"lr": 1}})
    assert Config.from_dict({"model": {"encoder": {"n_layers": 2}}, "optim": {"lr": 1}}).optim.lr == 1.0


def test_what_has_no_effect_is_said() -> None:
    """Not one key of a Lightning trainer, an experiment manager or a data section is dropped without a word."""
    tree = {
        "name": "said of nothing",
        "exp_manager": {"exp_dir": "x"},
        "model": {
            "train_ds": {"manifest_filepath": "a.jsonl", "batch_size": 8, "pin_memory": True, "is_tarred": False},
            "validation_ds": {"manifest_filepath": "b.jsonl", "batch_size": 4},
        },
        "trainer": {"devices": -1, "max_epochs": 100, "max_steps": -1, "accelerator": "gpu", "strategy": "ddp",
                    "logger": False, "log_every_n_steps": 5},
    }  # fmt: skip
    config = Config.from_dict(tree)
    told = "\n".join(config.advice)
    for said in (
        "exp_manager (--folder", "model.train_ds.pin_memory", "model.validation_ds.batch_size",
        "trainer.devices (torchrun", "trainer.max_epochs (trainer.max_steps)", "trainer.accelerator (trainer.device)",
        "trainer.strategy (trainer.shard)", "trainer.max_steps (-1",
    ):  # fmt: skip
        assert said in told
    assert "name" not in told and "is_tarred" not in told and "logger" not in told and "log_every" not in told
    assert config == Config.from_dict(config.to_dict()) and not Config.from_dict(config.to_dict()).unused

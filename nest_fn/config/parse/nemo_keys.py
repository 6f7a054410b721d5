"""The reference's keys: which have a counterpart here, which are ignored, which are refused."""

from __future__ import annotations

TOP_LEVEL_INERT = {"name", "exp_manager", "hydra", "defaults"}
MODEL_INERT = {"nemo_version", "log_prediction", "test_ds"}
SILENT = {"name", "nemo_version", "hydra"}  # ignored without a remark, as they do not change a run
ALTERNATIVES = {  # for a key that is ignored, the setting to use instead
    "exp_manager": "--folder, trainer.save_every, trainer.keep_last",
    "devices": "torchrun --nproc-per-node",
    "gpus": "torchrun --nproc-per-node",
    "num_nodes": "torchrun --nnodes",
    "max_epochs": "trainer.max_steps",
    "max_time": "trainer.max_steps",
    "accelerator": "trainer.device",
    "strategy": "trainer.shard",
    "val_check_interval": "trainer.valid_every",
    "check_val_every_n_epoch": "trainer.valid_every",
    "resume_from_checkpoint": "--resume",
    "default_root_dir": "--folder",
    "detect_anomaly": "trainer.skip_nonfinite",
    "use_bucketing": "data.num_buckets",
    "drop_last": "data.row_multiple",
    "seed": "trainer.seed",
    "test_ds": "nest-fn probe",
}
SECTIONS = {"preprocessor", "masking", "quantizer", "encoder", "decoder", "loss", "optim"}

TARGETS = {
    "model": {"EncDecDenoiseMaskedTokenPredModel", "EncDecMaskedTokenPredModel"},
    "preprocessor": {"AudioToMelSpectrogramPreprocessor"},
    "spec_augment": {"SpectrogramAugmentation"},
    "masking": {"RandomBlockMasking"},
    "quantizer": {"RandomProjectionVectorQuantizer"},
    "encoder": {"ConformerEncoder"},
    "decoder": {"MultiSoftmaxDecoder"},
    "loss": {"MultiMLMLoss", "MLMLoss"},
    "batch_augmentor": {"MultiSpeakerNoiseAugmentation"},
}

SECTION_INERT = {
    "preprocessor": {"stft_conv", "stft_exact_pad"},  # deprecated, without effect in the reference
    "encoder": {"sync_max_audio_length", "use_pytorch_sdpa_backends"},
    "sched": {"last_epoch", "monitor", "reduce_on_plateau"},
}

NO_TORCHAUDIO = "selects other conventions (docs/reference.md, 1.6); features come from torchaudio here anyway"
REFUSED_UNLESS_FALSE = {
    ("preprocessor", "use_torchaudio"): NO_TORCHAUDIO,
    ("preprocessor", "rng"): "cannot come from YAML; randomness comes from keys",
    ("quantizer", "time_ahead"): "is not supported; features are [B, F, M] throughout",
}

DATA_COUNTERPARTS = {
    "manifest_filepath": "train",
    "noise_manifest": "noise",
    "min_duration": "min_duration",
    "max_duration": "max_duration",
    "shuffle": "shuffle",
    "num_workers": "num_workers",
    "batch_size": "max_batch_size",
    "batch_duration": "batch_seconds",
    "num_buckets": "num_buckets",
    "channel_selector": "channel",
    "batch_augmentor": "augment",
}
DATA_INERT = set(
    "sample_rate pin_memory use_start_end_token shuffle_n drop_last use_lhotse use_bucketing bucketing_strategy "
    "bucketing_batch_size bucketing_weights bucket_duration_bins bucket_batch_size bucket_buffer_size "
    "shuffle_buffer_size quadratic_duration concurrent_bucketing shard_seed shard_manifests tarred_shard_strategy "
    "concat_sampling concat_sampling_technique concat_sampling_temperature concat_sampling_seed concat_shuffle "
    "concat_sampling_probabilities concat_sampling_scale return_sample_id text_field lang_field seed parser labels "
    "num_worker_per_concat_dataset prefetch_factor persistent_workers defer_setup".split()
)
DATA_REFUSED_UNLESS_FALSE = {
    "is_tarred": "is not read here; name the archives in data.train_shards or data.valid_shards",
    "tarred_audio_filepaths": "is not read here; name the archives in data.train_shards or data.valid_shards",
    "is_concat": "is not supported; give several manifests in data.train and data.weights",
    "trim_silence": "is not supported; trim before training",
    "augmentor": "is not supported; data.augment mixes noise and speakers",
}

TRAINER_COUNTERPARTS = {
    "accumulate_grad_batches": "accumulate",
    "gradient_clip_val": "clip_norm",
    "log_every_n_steps": "log_every",
}
TRAINER_INERT = set(
    "devices gpus num_nodes max_epochs min_epochs min_steps max_time accelerator strategy enable_checkpointing "
    "checkpoint_callback logger sync_batchnorm benchmark check_val_every_n_epoch num_sanity_val_steps plugins "
    "enable_progress_bar progress_bar_refresh_rate enable_model_summary use_distributed_sampler replace_sampler_ddp "
    "limit_train_batches limit_val_batches limit_test_batches val_check_interval resume_from_checkpoint profiler "
    "detect_anomaly fast_dev_run barebones inference_mode callbacks default_root_dir".split()
)
PRECISIONS = {
    "fp32": ("32", "32-true", "fp32"),
    "bf16": ("bf16", "bf16-mixed"),
}

SCHEDULES = {"noamannealing": "noam", "cosineannealing": "cosine", "none": "constant"}

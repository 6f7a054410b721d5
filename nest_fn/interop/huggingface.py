"""Export of the encoder to a folder that the package transformers loads as ``ParakeetEncoder``, its FastConformer.

    write_huggingface("encoder_hf", params, state, cfg)

    from transformers import AutoFeatureExtractor, ParakeetEncoder  # from version 5.0 on
    encoder = ParakeetEncoder.from_pretrained("encoder_hf")
    inputs = AutoFeatureExtractor.from_pretrained("encoder_hf")(audio, sampling_rate=16000, return_tensors="pt")
    hidden = encoder(**inputs).last_hidden_state  # [B, T, D]

Values do not change, only names and the trailing axes of 1x1 convolutions. ``transformers`` is not needed to write.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nest_fn.config import Config
from nest_fn.config.model import PreprocessorConfig
from nest_fn.encoder import conformer_spec
from nest_fn.errors import ExportError
from nest_fn.files.tensors import write_tensors
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Params, State, Tensor

ENCODER, WEIGHTS, EXTRACTOR = "config.json", "model.safetensors", "preprocessor_config.json"
_DIRECT = {  # names inside a block that differ, ours and theirs
    "norm_attention": "norm_self_att",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.position": "self_attn.relative_k_proj",
    "attention.content_bias": "self_attn.bias_u",
    "attention.position_bias": "self_attn.bias_v",
    "conv.pointwise1": "conv.pointwise_conv1",
    "conv.depthwise": "conv.depthwise_conv",
    "conv.pointwise2": "conv.pointwise_conv2",
}


def write_huggingface(folder: str | Path, params: Params, state: State, cfg: Config) -> str | None:
    """Write ``config.json``, ``model.safetensors`` and ``preprocessor_config.json`` to a folder, which is made.

    Returns None, or why ``preprocessor_config.json`` was left out: ``ParakeetFeatureExtractor`` computes one kind of
    features, and with others a user must compute them (``nest_fn.log_mel``). Raises ``ExportError`` naming a setting
    of the encoder that ``ParakeetEncoder`` does not have, ``CheckpointError`` if the package safetensors is missing.
    """
    check_huggingface(cfg)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = huggingface_weights(params, state, cfg)
    write_tensors(folder / WEIGHTS, weights, {"format": "pt"})
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    _write_json(folder / ENCODER, huggingface_config(cfg) | {"dtype": dtype})
    other = next(_other_features(cfg.preprocessor), None)
    if other is None:
        _write_json(folder / EXTRACTOR, _extractor_config(cfg.preprocessor))
    return other


def check_huggingface(cfg: Config) -> None:
    """Raise ``ExportError`` naming the settings of the encoder that ``ParakeetEncoder`` does not have."""
    found = list(_other_encoder(cfg))
    if found:
        raise ExportError(
            f"export: transformers' ParakeetEncoder has no {'; no '.join(found)}. Export .onnx or .pt2, which take any "
            "encoder."
        )


def huggingface_config(cfg: Config) -> dict[str, Any]:
    """The settings of ``ParakeetEncoderConfig``. Dropout is that of fine-tuning as ``transformers`` does it."""
    encoder = cfg.encoder
    return {
        "architectures": ["ParakeetEncoder"],
        "model_type": "parakeet_encoder",
        "hidden_size": encoder.d_model,
        "num_hidden_layers": encoder.n_layers,
        "num_attention_heads": encoder.n_heads,
        "intermediate_size": encoder.d_model * encoder.ff_expansion_factor,
        "hidden_act": "silu",
        "attention_bias": encoder.use_bias,
        "convolution_bias": encoder.use_bias,
        "conv_kernel_size": encoder.conv_kernel_size,
        "subsampling_factor": encoder.subsampling_factor,
        "subsampling_conv_channels": encoder.subsampling_conv_channels,
        "subsampling_conv_kernel_size": 3,
        "subsampling_conv_stride": 2,
        "num_mel_bins": encoder.feat_in,
        "max_position_embeddings": encoder.pos_emb_max_len,
        "scale_input": encoder.xscaling,
        "dropout": encoder.dropout_pre_encoder,
        "dropout_positions": encoder.dropout_emb,
        "activation_dropout": encoder.dropout,
        "attention_dropout": encoder.dropout_att,
        "layerdrop": 0.0,
    }


def huggingface_weights(params: Params, state: State, cfg: Config) -> dict[str, Tensor]:
    """The encoder's tensors by the names of ``ParakeetEncoder.state_dict()``, e.g. ``layers.0.conv.norm.weight [D]``.

    Biases that all layers share here are repeated for each layer. Tensors are not copied.
    """
    leaves = flatten(params["encoder"]) | flatten(state["encoder"])
    shared = {path.removeprefix("biases."): leaves.pop(path) for path in list(leaves) if path.startswith("biases.")}
    for layer in range(cfg.encoder.n_layers):
        leaves |= {f"layers.{layer}.attention.{name}": leaf for name, leaf in shared.items()}
    return {_name(path): _shaped(path, leaf) for path, leaf in leaves.items()}


def _name(path: str) -> str:
    """Their name of one of our leaves."""
    if path.startswith("subsampling.out."):
        return path.replace("out", "linear", 1)
    stage = re.fullmatch(r"subsampling\.stages\.(\d+)\.(\w+)\.(\w+)", path)
    if stage:  # they number convolutions and activations: one and its ReLU, then three a stage
        place = {"conv": 0, "depthwise": 3 * int(stage[1]) - 1, "pointwise": 3 * int(stage[1])}[stage[2]]
        return f"subsampling.layers.{place}.{stage[3]}"
    block, inner = ".".join(path.split(".")[:2]), ".".join(path.split(".")[2:])
    ours = next((name for name in _DIRECT if inner == name or inner.startswith(f"{name}.")), None)
    return path if ours is None else f"{block}.{_DIRECT[ours]}{inner.removeprefix(ours)}"


def _shaped(path: str, leaf: Tensor) -> Tensor:
    """Convolutions of kernel 1 are linear layers here."""
    if path.endswith(".pointwise.weight"):
        return leaf[:, :, None, None]
    return leaf[:, :, None] if re.search(r"\.pointwise[12]\.weight$", path) else leaf


def _other_encoder(cfg: Config) -> Iterator[str]:
    """Settings of the encoder that theirs cannot have."""
    encoder = cfg.encoder
    factor, half = encoder.subsampling_factor, (encoder.conv_kernel_size - 1) // 2
    wanted: dict[str, tuple[Any, bool]] = {
        "subsampling": (encoder.subsampling, encoder.subsampling == "dw_striding"),
        "subsampling_factor": (factor, factor > 1 and math.log2(factor).is_integer()),
        "causal_downsampling": (encoder.causal_downsampling, not encoder.causal_downsampling),
        "reduction": (encoder.reduction, not encoder.reduction),
        "feat_out": (encoder.feat_out, encoder.feat_out in (-1, 0, encoder.d_model)),
        "feat_in": (encoder.feat_in, (encoder.feat_in or 0) % factor == 0),  # they divide it, without rounding up
        "self_attention_model": (encoder.self_attention_model, encoder.self_attention_model == "rel_pos"),
        "att_context_size": (encoder.att_context_size, set(encoder.att_context_size) == {(-1, -1)}),
        "conv_kernel_size": (encoder.conv_kernel_size, encoder.conv_kernel_size % 2 == 1),
        "conv_context_size": (encoder.conv_context_size, conformer_spec(encoder).conv_context == (half, half)),
        "conv_norm_type": (encoder.conv_norm_type, encoder.conv_norm_type == "batch_norm"),
        "compat": (encoder.compat, encoder.compat == "current"),
    }
    yield from (f"encoder.{name}={value}" for name, (value, fits) in wanted.items() if not fits)


def _other_features(cfg: PreprocessorConfig) -> Iterator[str]:
    """Settings of the features that ``ParakeetFeatureExtractor`` cannot have."""
    wanted: dict[str, tuple[Any, ...]] = {
        "window": ("hann",),
        "mel_norm": ("slaney",),
        "lowfreq": (0.0,),
        "highfreq": (None, cfg.sample_rate / 2),
        "mag_power": (2.0,),
        "log": (True,),
        "log_zero_guard_type": ("add",),
        "log_zero_guard_value": (2.0**-24,),
        "normalize": ("per_feature",),
        "frame_splicing": (1,),
        "exact_pad": (False,),
        "pad_value": (0.0,),
        "compat": ("current",),
    }
    for name, values in wanted.items():
        if getattr(cfg, name) not in values:
            yield f"preprocessor.{name}={getattr(cfg, name)}"


def _extractor_config(cfg: PreprocessorConfig) -> dict[str, Any]:
    return {
        "feature_extractor_type": "ParakeetFeatureExtractor",
        "feature_size": cfg.features,
        "sampling_rate": cfg.sample_rate,
        "hop_length": cfg.hop_length,
        "n_fft": cfg.fft_length,
        "win_length": cfg.window_length,
        "preemphasis": cfg.preemph,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": True,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

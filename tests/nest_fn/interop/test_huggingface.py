"""The folder for transformers: names, shapes and settings here; features too where transformers is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn import Config, encode, init, key, log_mel, save
from nest_fn.checkpoint.model_files import load
from nest_fn.errors import ExportError
from nest_fn.files.tensors import read_tensors
from nest_fn.interop.huggingface import huggingface_config, huggingface_weights, write_huggingface
from nest_fn.layers import random
from nest_fn.layers.tree import tree_map
from nest_fn.train.cli.main import main

pytest.importorskip("safetensors", reason="the folder for transformers holds safetensors")

# ParakeetEncoder.state_dict() of transformers 5.24 with the settings of ``tiny`` and one layer; D is 32.
EXPECTED = """
subsampling.layers.0.weight 16 1 3 3 | subsampling.layers.0.bias 16
subsampling.layers.2.weight 16 1 3 3 | subsampling.layers.2.bias 16
subsampling.layers.3.weight 16 16 1 1 | subsampling.layers.3.bias 16
subsampling.layers.5.weight 16 1 3 3 | subsampling.layers.5.bias 16
subsampling.layers.6.weight 16 16 1 1 | subsampling.layers.6.bias 16
subsampling.linear.weight 32 160 | subsampling.linear.bias 32
layers.0.feed_forward1.linear1.weight 128 32 | layers.0.feed_forward1.linear1.bias 128
layers.0.feed_forward1.linear2.weight 32 128 | layers.0.feed_forward1.linear2.bias 32
layers.0.self_attn.bias_u 4 8 | layers.0.self_attn.bias_v 4 8
layers.0.self_attn.q_proj.weight 32 32 | layers.0.self_attn.q_proj.bias 32
layers.0.self_attn.k_proj.weight 32 32 | layers.0.self_attn.k_proj.bias 32
layers.0.self_attn.v_proj.weight 32 32 | layers.0.self_attn.v_proj.bias 32
layers.0.self_attn.o_proj.weight 32 32 | layers.0.self_attn.o_proj.bias 32
layers.0.self_attn.relative_k_proj.weight 32 32
layers.0.conv.pointwise_conv1.weight 64 32 1 | layers.0.conv.pointwise_conv1.bias 64
layers.0.conv.depthwise_conv.weight 32 1 9 | layers.0.conv.depthwise_conv.bias 32
layers.0.conv.norm.weight 32 | layers.0.conv.norm.bias 32
layers.0.conv.norm.running_mean 32 | layers.0.conv.norm.running_var 32 | layers.0.conv.norm.num_batches_tracked
layers.0.conv.pointwise_conv2.weight 32 32 1 | layers.0.conv.pointwise_conv2.bias 32
layers.0.feed_forward2.linear1.weight 128 32 | layers.0.feed_forward2.linear1.bias 128
layers.0.feed_forward2.linear2.weight 32 128 | layers.0.feed_forward2.linear2.bias 32
layers.0.norm_feed_forward1.weight 32 | layers.0.norm_feed_forward1.bias 32
layers.0.norm_self_att.weight 32 | layers.0.norm_self_att.bias 32
layers.0.norm_conv.weight 32 | layers.0.norm_conv.bias 32
layers.0.norm_feed_forward2.weight 32 | layers.0.norm_feed_forward2.bias 32
layers.0.norm_out.weight 32 | layers.0.norm_out.bias 32
"""
Model = tuple[dict[str, Any], dict[str, Any], Config]


def model(*overrides: str) -> Model:
    """A model none of whose tensors has its initial value, as after training."""
    cfg = Config.preset("tiny", overrides)
    params, state = init(key(0), cfg)

    def move(x: torch.Tensor) -> torch.Tensor:
        return x + 0.05 * random.uniform(random.key(x.numel()), x.shape) if x.is_floating_point() else x

    return tree_map(move, params), tree_map(move, state), cfg


def listed(text: str) -> dict[str, list[int]]:
    entries = [entry.split() for entry in text.replace("\n", "|").split("|") if entry.strip()]
    return {name: [int(size) for size in shape] for name, *shape in entries}


def test_names_and_shapes(tmp_path: Path) -> None:
    made = model("encoder.n_layers=1")
    assert write_huggingface(tmp_path / "hf", *made) is None
    weights, texts = read_tensors(tmp_path / "hf" / "model.safetensors")
    assert {name: list(leaf.shape) for name, leaf in weights.items()} == listed(EXPECTED)
    assert texts == {"format": "pt"}
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    wanted = {"model_type": "parakeet_encoder", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
              "intermediate_size": 128, "num_mel_bins": 80, "dtype": "float32"}  # fmt: skip
    assert {name: settings[name] for name in wanted} == wanted
    extractor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (extractor["hop_length"], extractor["win_length"], extractor["n_fft"]) == (160, 400, 512)


def test_values_go_where_the_names_say() -> None:
    params, state, cfg = model()
    weights = huggingface_weights(params, state, cfg)
    block, running = params["encoder"]["layers"][1], state["encoder"]["layers"][1]
    assert torch.equal(weights["layers.1.self_attn.k_proj.weight"], block["attention"]["key"]["weight"])
    assert torch.equal(weights["layers.1.conv.pointwise_conv1.weight"][..., 0], block["conv"]["pointwise1"]["weight"])
    assert torch.equal(weights["layers.1.conv.norm.running_var"], running["conv"]["norm"]["running_var"])
    tied = model("encoder.untie_biases=false")
    weights = huggingface_weights(*tied)
    assert torch.equal(weights["layers.1.self_attn.bias_v"], tied[0]["encoder"]["biases"]["position_bias"])


@pytest.mark.parametrize(
    "override, named",
    [
        ("encoder.subsampling=striding", "encoder.subsampling=striding"),
        ("encoder.self_attention_model=abs_pos", "encoder.self_attention_model=abs_pos"),
        ("encoder.att_context_size=[[8,8]]", "encoder.att_context_size=((8, 8),)"),
        ("encoder.conv_norm_type=layer_norm", "encoder.conv_norm_type=layer_norm"),
        ("encoder.conv_context_size=causal", "encoder.conv_context_size=causal"),
        ("preprocessor.features=76", "encoder.feat_in=76"),
        ("encoder.causal_downsampling=true", "encoder.causal_downsampling=True"),
        ("encoder.feat_out=24", "encoder.feat_out=24"),
    ],
)
def test_other_encoders_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, named: str
) -> None:
    made = model(override)
    with pytest.raises(ExportError) as error:
        write_huggingface(tmp_path / "hf", *made)
    assert f"has no {named}" in str(error.value) and not (tmp_path / "hf").exists()
    save(tmp_path / "model", *made)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "hf"), "--format", "hf"]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "hf").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "model", *model("preprocessor.normalize=all_features"))
    argv = ["export", str(tmp_path / "model"), str(tmp_path / "hf"), "--format", "hf"]
    assert main([*argv, "--static"]) == 2
    assert "--static has no effect with --format hf" in capsys.readouterr().err
    assert main(argv) == 0
    assert "ParakeetFeatureExtractor has no preprocessor.normalize=all_features" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "hf").iterdir()}
    assert files == {"config.json", "model.safetensors", "origin.json"}
    assert main(argv) == 0  # its work is found done
    params, state, cfg = load(tmp_path / "model")
    weights, _ = read_tensors(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(weights[name], leaf) for name, leaf in huggingface_weights(params, state, cfg).items())


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["encoder.xscaling=false", "encoder.use_bias=false", "encoder.untie_biases=false"],
        ["encoder.subsampling_factor=4", "encoder.conv_kernel_size=5", "preprocessor.preemph=null"],
        ["encoder.d_model=24", "encoder.n_heads=3", "preprocessor.features=64", "encoder.ff_expansion_factor=2"],
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_the_same(tmp_path: Path, overrides: list[str]) -> None:
    """From audio, rows of several lengths; float32, so that the bound is that of its roundoff."""
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
    params, state, cfg = made = model(*overrides)
    write_huggingface(tmp_path, *made)
    theirs, report = transformers.ParakeetEncoder.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert huggingface_config(cfg).items() <= theirs.config.to_dict().items()
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    audio = 0.1 * random.normal(key(1), (3, 40000))
    lengths = torch.tensor([40000, 31111, 2000])
    rows = [row[:length].numpy() for row, length in zip(audio, lengths.tolist(), strict=True)]
    inputs = extractor(rows, sampling_rate=16000, return_tensors="pt")
    mel, frames = log_mel(audio, lengths, cfg.preprocessor)
    encoded, short, _ = encode(params, state, mel, frames, cfg)
    with torch.no_grad():
        out = theirs.eval()(**inputs)
    assert torch.equal(out.attention_mask.sum(1), short)
    for row, (frame, length) in enumerate(zip(frames.tolist(), short.tolist(), strict=True)):
        torch.testing.assert_close(inputs.input_features[row, :frame].T, mel[row, :, :frame], atol=1e-4, rtol=0)
        torch.testing.assert_close(out.last_hidden_state[row, :length].T, encoded[row, :, :length], atol=1e-4, rtol=0)

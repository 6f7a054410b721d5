"""The table between the reference's names and ours, against its own lists of names, shapes, counts and values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn import Config, abstract, init, key
from nest_fn.interop import nemo
from nest_fn.layers.tree import check_same, count, flatten

FOLDER = Path(__file__).parents[2] / "reference"
SIZES = json.loads((FOLDER / "model_sizes.json").read_text())["sizes"]
LARGE = {entry["name"]: entry for entry in json.loads((FOLDER / "state_dict_large.json").read_text())["tensors"]}
INITIAL = json.loads((FOLDER / "init_stats_medium.json").read_text())["parameters"]


def tiny(*overrides: str) -> Config:
    return Config.preset("tiny", overrides)


@pytest.mark.parametrize("size", sorted(SIZES))
def test_parameter_counts(size: str) -> None:
    """In total, trainable, and by module: buffers are counted apart there, so the running statistics are too."""
    cfg, wanted = Config.preset(f"nest_{size}"), SIZES[size]
    params, state = abstract(cfg)
    assert count(params) == wanted["trainable"]
    assert count(params["encoder"]) == wanted["per_module"]["encoder"]
    assert count(params["decoder"]) == wanted["per_module"]["decoder"]
    assert count(state["quantizer"]) == wanted["per_module"]["quantizer"]
    assert count(state["masking"]) == wanted["per_module"]["mask_processor"]
    assert count(params) + count(state["quantizer"]) + count(state["masking"]) == wanted["total"]
    assert count(params["encoder"]["layers"][0]) == wanted["encoder_per_layer"]
    assert count(params["encoder"]["subsampling"]) == wanted["encoder_pre_encode"]
    assert count(state["encoder"]) == wanted["encoder_buffers"]
    assert (cfg.encoder.d_model, cfg.encoder.n_layers) == (wanted["d_model"], wanted["n_layers"])


def test_names_shapes_and_dtypes_of_large_both_ways() -> None:
    cfg = Config.preset("nest_large")
    params, state = abstract(cfg)
    ours = nemo.to_state_dict(params, state, cfg)
    assert set(ours) == set(LARGE)
    for name, leaf in ours.items():
        wanted = LARGE[name]
        assert (list(leaf.shape), str(leaf.dtype)) == (wanted["shape"], f"torch.{wanted['dtype']}"), name
    theirs = {
        name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]), device="meta")
        for name, entry in LARGE.items()
    }
    for tree, wanted in zip(nemo.from_state_dict(theirs, cfg), (params, state), strict=True):
        check_same("tree", tree, wanted)
        check_same("tree", wanted, tree)


def test_what_is_learned_is_what_the_reference_learns() -> None:
    cfg = Config.preset("nest_large")
    params, _ = abstract(cfg)
    ours = set(nemo.rename(flatten(params), cfg))
    assert ours == {name for name, entry in LARGE.items() if entry["requires_grad"]}


VARIANTS: list[tuple[str, ...]] = [
    (),
    ("num_books=2", "masking.freeze=false"),
    ("mask_position=post_conv",),
    ("encoder.untie_biases=false", "encoder.feat_out=24"),
    ("encoder.self_attention_model=abs_pos", "encoder.conv_norm_type=group_norm4"),
    ("encoder.subsampling=striding", "encoder.use_bias=false", "encoder.conv_norm_type=layer_norm"),
    ("encoder.subsampling=vggnet",),
    ("encoder.subsampling=stacking_norm",),
    ("encoder.subsampling=stacking", "encoder.conv_norm_type=instance_norm"),
    ("encoder.subsampling=null", "masking.block_size=8"),
    ("encoder.reduction=striding", "encoder.reduction_factor=2", "encoder.subsampling_factor=4"),
    ("encoder.self_attention_model=rel_pos_local_attn", "encoder.att_context_size=[4,2]", "encoder.global_tokens=1",
     "encoder.global_attn_separate=true"),
]  # fmt: skip


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_round_trip_is_bit_equal(overrides: tuple[str, ...]) -> None:
    cfg = tiny(*overrides)
    params, state = init(key(0), cfg)
    mapping = nemo.to_state_dict(params, state, cfg)
    again, again_state = nemo.from_state_dict(mapping, cfg)
    for tree, wanted in ((again, params), (again_state, state)):
        check_same("tree", tree, wanted)
        check_same("tree", wanted, tree)
        for path, leaf in flatten(wanted).items():
            assert torch.equal(flatten(tree)[path], leaf), path
    arrays = {name: leaf.numpy() for name, leaf in mapping.items()}
    from_arrays, _ = nemo.from_state_dict(arrays, cfg)
    assert torch.equal(from_arrays["decoder"]["weight"], params["decoder"]["weight"])


def test_values_are_copied() -> None:
    cfg = tiny()
    mapping = nemo.to_state_dict(*init(key(0), cfg), cfg)
    params, _ = nemo.from_state_dict(mapping, cfg)
    mapping["decoder.decoder_layers.0.bias"].zero_()
    assert params["decoder"]["bias"].abs().sum() > 0


def test_every_problem_is_listed() -> None:
    cfg = tiny()
    mapping: dict[str, Any] = dict(nemo.to_state_dict(*init(key(0), cfg), cfg))
    del mapping["encoder.layers.0.norm_out.bias"]
    mapping["decoder.decoder_layers.0.bias"] = torch.zeros(3)
    mapping["encoder.layers.7.norm_out.bias"] = torch.zeros(32)
    with pytest.raises(ValueError, match="state_dict: 3 names do not fit the config") as error:
        nemo.from_state_dict(mapping, cfg)
    text = str(error.value)
    assert "'encoder.layers.0.norm_out.bias' [32] is missing" in text
    assert "'decoder.decoder_layers.0.bias' is [3], the config wants [64]" in text
    assert "'encoder.layers.7.norm_out.bias' has no place in this config" in text


def test_a_long_list_of_problems_is_cut() -> None:
    with pytest.raises(ValueError, match=r"and \d+ more"):
        nemo.from_state_dict({}, tiny())


def test_a_part_alone() -> None:
    cfg = tiny()
    mapping = nemo.to_state_dict(*init(key(0), cfg), cfg)
    params, state = nemo.from_state_dict(mapping, cfg, parts=("encoder",))
    assert (list(params), list(state)) == (["encoder"], ["encoder"])
    with pytest.raises(ValueError, match="no part is called 'decodr'; the parts are encoder, decoder"):
        nemo.from_state_dict(mapping, cfg, parts=("decodr",))


def test_what_carries_nothing_is_passed_over() -> None:
    """A second decoder that the reference's parent class makes, its position table, its empty criteria."""
    cfg = tiny()
    mapping: dict[str, Any] = dict(nemo.to_state_dict(*init(key(0), cfg), cfg))
    mapping["decoder_ssl.decoder_layers.0.weight"] = torch.zeros(3)
    mapping["encoder.pos_enc.pe"] = torch.zeros(1, 9, 32)
    nemo.from_state_dict(mapping, cfg)


def test_a_missing_count_of_batches_is_zero() -> None:
    """Checkpoints of old PyTorch have none."""
    cfg = tiny()
    mapping = nemo.to_state_dict(*init(key(0), cfg), cfg)
    kept = {name: leaf for name, leaf in mapping.items() if not name.endswith("num_batches_tracked")}
    assert len(kept) < len(mapping)
    _, state = nemo.from_state_dict(kept, cfg)
    assert int(state["encoder"]["layers"][0]["conv"]["norm"]["num_batches_tracked"]) == 0


def test_post_conv_stores_shared_tensors_twice() -> None:
    cfg = tiny("mask_position=post_conv")
    params, state = init(key(0), cfg)
    mapping = nemo.to_state_dict(params, state, cfg)
    for inner in ("conv.0.weight", "out.bias"):
        first, second = mapping[f"pre_encoder.pre_encode.{inner}"], mapping[f"encoder.pre_encode.pre_encode.{inner}"]
        assert torch.equal(first, second)
    once = {name: leaf for name, leaf in mapping.items() if not name.startswith("pre_encoder.")}
    again, _ = nemo.from_state_dict(once, cfg)
    assert torch.equal(again["encoder"]["subsampling"]["out"]["bias"], params["encoder"]["subsampling"]["out"]["bias"])


def test_tied_biases_have_a_name_in_every_layer() -> None:
    cfg = tiny("encoder.untie_biases=false")
    params, state = init(key(0), cfg)
    mapping = nemo.to_state_dict(params, state, cfg)
    for layer in range(2):
        assert mapping[f"encoder.layers.{layer}.self_attn.pos_bias_u"].shape == (4, 8)
    assert len([name for name in nemo.rename(flatten(params), cfg) if name.endswith("pos_bias_u")]) == 1


@pytest.fixture(scope="module")
def medium() -> dict[str, torch.Tensor]:
    cfg = Config.preset("nest_medium")
    return nemo.to_state_dict(*init(key(0), cfg), cfg)


@pytest.mark.parametrize("name", sorted(INITIAL))
def test_initial_values_are_spread_as_the_reference_s(name: str, medium: dict[str, torch.Tensor]) -> None:
    """Mean and deviation within sampling error of both sides, extremes within the same bounds."""
    leaf, wanted = medium[name].double(), INITIAL[name]
    assert list(leaf.shape) == wanted["shape"]
    n, std = leaf.numel(), wanted["std"]
    if wanted["min"] == wanted["max"]:
        assert bool((leaf == wanted["min"]).all())
        return
    if n > 1:
        assert abs(float(leaf.mean()) - wanted["mean"]) < 5 * std * math.sqrt(2 / n)
        assert float(leaf.std()) == pytest.approx(std, rel=5 * math.sqrt(1 / n) + 1e-3)
    assert float(leaf.abs().max()) < 1.6 * max(abs(wanted["min"]), abs(wanted["max"]))

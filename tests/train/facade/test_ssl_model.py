"""The original PureTorchSSLModel interface, statement by statement.

Against the functional core, and inside torch's own machinery.
"""

from __future__ import annotations

import copy
import inspect
import io
import multiprocessing
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

import nest_fn
from nest_fn import Config, ConfigError, PureTorchSSLModel, abstract, forward, init, key, log_mel, loss
from nest_fn.interop import nemo
from nest_fn.interop.port_keywords import KEYWORDS, config_from_keywords
from nest_fn.layers import random
from nest_fn.layers.tree import check_same, fill, flatten
from nest_fn.train.keys import INIT, TRAIN, VALID
from tests.train.facade.facade_cases import SMALL, batch, config, equal, model, signals, snapshot

ROUNDING = 64 * 2.0**-24  # of the values: as many roundings as a path through the tiny model adds up to

B = batch()


def draw(seed: int, stream: int, n: int) -> torch.Tensor:
    """The key of draw ``n`` as the facade promises it."""
    return random.split(random.fold_in(random.fold_in(key(seed), stream), n), 2)[1]


# Creation


def test_the_face_hands_on_three_names_lazily() -> None:
    names = ("PureTorchSSLModel", "create_optimizer", "create_scheduler")
    assert set(names) <= set(nest_fn.__all__) <= set(dir(nest_fn))
    assert all(callable(getattr(nest_fn, name)) for name in nest_fn.__all__ if name in names)
    with pytest.raises(AttributeError, match="module 'nest_fn' has no attribute 'PureTorch'"):
        _ = nest_fn.PureTorch  # type: ignore[attr-defined]


def test_importing_the_core_does_not_import_the_trainer() -> None:
    code = "import sys, nest_fn; sys.exit(any(name.startswith('nest_fn.train') for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_explicit_parameters_reach_the_config() -> None:
    made = PureTorchSSLModel(
        sample_rate=8000, features=40, window_size=0.032, window_stride=0.016, n_fft=256, normalize="all_features",
        n_layers=1, d_model=8, n_heads=2, subsampling="striding", subsampling_factor=4, subsampling_conv_channels=2,
        ff_expansion_factor=2, conv_kernel_size=5, dropout=0.2, num_classes=8, num_books=2, code_dim=4,
        squeeze_single=True, block_size=16, mask_prob=0.05, mask_threshold=0.5, mask_position="post_conv",
        overrides=["encoder.xscaling=false", "preprocessor.pad_to=8", "encoder.dropout_att=0.3"],
    )  # fmt: skip
    cfg = made.cfg
    assert (cfg.sample_rate, cfg.num_classes, cfg.num_books, cfg.code_dim) == (8000, 8, 2, 4)
    assert (cfg.squeeze_single, cfg.mask_position) == (True, "post_conv")
    front = cfg.preprocessor
    assert (front.features, front.window_length, front.hop_length, front.n_fft) == (40, 256, 128, 256)
    assert (front.normalize, front.dither, front.pad_to) == ("all_features", 0.0, 8)
    encoder = cfg.encoder
    assert (encoder.n_layers, encoder.d_model, encoder.n_heads, encoder.xscaling) == (1, 8, 2, False)
    assert (encoder.subsampling, encoder.subsampling_factor, encoder.subsampling_conv_channels) == ("striding", 4, 2)
    assert (encoder.ff_expansion_factor, encoder.conv_kernel_size) == (2, 5)
    assert (encoder.dropout, encoder.dropout_pre_encoder, encoder.dropout_att, encoder.dropout_emb) == (
        0.2,
        0.2,
        0.3,
        0,
    )
    assert (cfg.masking.block_size, cfg.masking.mask_prob, cfg.loss.mask_threshold) == (16, 0.05, 0.5)
    check_same("params", made.params, abstract(cfg)[0])


def test_defaults_are_the_seeds() -> None:
    """NEST-Large without dither; not built here, since it is large."""
    signature = inspect.signature(PureTorchSSLModel).parameters
    assert signature.keys() - {"overrides", "seed"} == set(KEYWORDS)
    defaults = {name: signature[name].default for name in KEYWORDS}
    assert config_from_keywords(defaults) == Config().override("preprocessor.dither=0")


def test_any_key_of_the_config_is_reachable() -> None:
    made = PureTorchSSLModel(overrides=[*SMALL, "encoder.feat_out=6", "masking.freeze=false", "encoder.use_bias=false"])
    assert {"encoder.out.weight", "masking.embedding"} <= dict(made.named_parameters()).keys()
    with pytest.raises(ConfigError, match="unknown key 'encoder.n_layer'; did you mean 'n_layers'"):
        PureTorchSSLModel(overrides=["encoder.n_layer=2"])
    with pytest.raises(TypeError, match="n_layer"):
        PureTorchSSLModel(n_layer=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("root", ["model:\n", ""])
def test_creation_from_a_file(tmp_path: Path, root: str) -> None:
    text = "encoder: {n_layers: 1, d_model: 8, n_heads: 2, subsampling_conv_channels: '${num_classes}'}\nnum_classes: 4"
    indent = "  " if root else ""
    (tmp_path / "config.yaml").write_text(root + "".join(f"{indent}{line}\n" for line in text.splitlines()))
    made = PureTorchSSLModel.from_config_file(tmp_path / "config.yaml", overrides=["code_dim=2"], seed=3)
    assert made.cfg == Config.from_yaml(tmp_path / "config.yaml", ["code_dim=2"])
    assert (made.cfg.encoder.subsampling_conv_channels, made.seed) == (4, 3)
    assert made.training
    with pytest.raises(ConfigError, match="cannot be read"):
        PureTorchSSLModel.from_config_file(tmp_path / "none.yaml")


def test_it_begins_with_the_values_of_the_trainer() -> None:
    params, state = init(random.fold_in(key(7), INIT), config())
    assert equal(snapshot(model(seed=7).params), flatten(params))
    assert equal(snapshot(model(seed=7).state), flatten(state))
    assert PureTorchSSLModel.from_config(config("trainer.seed=7")).seed == 7


def test_functional_to_facade_to_functional() -> None:
    params, state = init(key(3), config())
    made = PureTorchSSLModel.from_params(params, state, config())
    assert equal(snapshot(made.params), flatten(params))
    assert equal(snapshot(made.state), flatten(state))
    check_same("params", made.params, params)
    with torch.no_grad():
        made.decoder.weight.zero_()  # type: ignore[union-attr, operator]
    assert bool(params["decoder"]["weight"].any())  # the caller's tree is not touched
    with pytest.raises(ValueError, match="from_params: .* its config wants"):
        PureTorchSSLModel.from_params(params, state, config("num_classes=32"))


@pytest.mark.parametrize("overrides", [[], ["encoder.conv_norm_type=layer_norm", "masking.freeze=false"]], ids=str)
def test_names_are_dotted_paths(overrides: list[str]) -> None:
    made = model(*overrides)
    params, state = abstract(made.cfg)
    assert dict(made.named_parameters()).keys() == flatten(params).keys()
    assert dict(made.named_buffers()).keys() == flatten(state).keys() | {"counter"}
    assert made.state_dict().keys() == flatten(params).keys() | flatten(state).keys()
    assert "encoder.layers.0.attention.query.weight" in made.state_dict()
    check_same("state", made.state, init(key(0), made.cfg)[1])


# Steps


def test_training_step_is_the_cores_loss() -> None:
    made = model("preprocessor.dither=1e-3", seed=11)
    before = snapshot(made.state)
    values = [made.training_step(B) for _ in range(2)]
    state: Any = fill(made.state, before)
    for n, value in enumerate(values):
        assert value.shape == ()
        wanted, (_, state) = loss(made.params, state, B, made.cfg, key=draw(11, TRAIN, n), train=True)
        assert torch.equal(value, wanted)
    assert equal(snapshot(made.state), snapshot(state))  # batch statistics were written back
    assert not equal(snapshot(made.state), before)
    values[0].backward()
    assert all(leaf.grad is not None for leaf in made.parameters())
    assert made.counter.tolist() == [2, 0]


def test_training_step_in_evaluation_mode_writes_nothing() -> None:
    made = model().eval()
    before = snapshot(made.state)
    value = made.training_step(B)
    assert torch.equal(value, loss(made.params, made.state, B, made.cfg, key=draw(0, VALID, 0), train=False)[0])
    assert equal(snapshot(made.state), before)


def test_validation_step_is_in_evaluation_whatever_the_mode() -> None:
    made = model(seed=2)
    before = snapshot(made.state)
    values = [made.validation_step(B), made.eval().validation_step(B)]
    for n, value in enumerate(values):
        wanted, _ = loss(made.params, made.state, B, made.cfg, key=draw(2, VALID, n), train=False)
        assert torch.equal(value, wanted)
        assert not value.requires_grad
    assert equal(snapshot(made.state), before)
    assert made.counter.tolist() == [0, 2]  # training draws the same however often one validates


def test_draws_follow_seed_and_count() -> None:
    one, again, other = model(seed=1), model(seed=1), model(seed=1)
    other.seed = 2
    first = [one.training_step(B) for _ in range(2)]
    second = [again.training_step(B) for _ in range(2)]
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert not torch.equal(first[0], other.training_step(B))


def test_formats_and_names_of_rows() -> None:
    tuple_batch = (B["audio"], B["audio_len"], None, None, B["noisy_audio"], B["noisy_audio_len"])
    values = [model().training_step(one) for one in (B, tuple_batch, {**B, "row": torch.arange(4)})]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert not torch.equal(values[0], model().training_step({**B, "row": torch.arange(4) + 4}))
    with pytest.raises(ValueError, match="batch: a tuple of 2"):
        model().training_step((B["audio"], B["audio_len"]))


def test_compute_loss_of_forward_is_the_training_loss() -> None:
    for overrides in ([], ["num_books=2"], ["squeeze_single=true"], ["mask_position=post_conv"]):
        one, other = model(*overrides), model(*overrides)
        value = one.compute_loss(*one(**signals(B), apply_mask=True))
        torch.testing.assert_close(value, other.training_step(B), atol=1e-5, rtol=1e-5)
        value.backward()
        assert all(leaf.grad is not None and bool(leaf.grad.isfinite().all()) for leaf in one.parameters())


def test_compute_loss_without_masks_is_0() -> None:
    made = model().eval()
    assert made.compute_loss(*made(**signals(B))) == 0


# Forward


def test_forward_is_the_cores_and_has_the_seeds_shapes() -> None:
    made = model().eval()
    with torch.no_grad():
        log_probs, encoded_len, masks, tokens = made.forward(**signals(B), apply_mask=False)
        wanted, _ = forward(made.params, made.state, B, made.cfg, apply_mask=False)
    for got, one in zip((log_probs, encoded_len, masks, tokens), wanted, strict=True):
        assert torch.equal(got, one)
    assert log_probs.shape == (4, 14, 64, 1)
    assert encoded_len.tolist() == [13, 12, 10, 9]
    assert masks.shape == (4, 80, 112) and not masks.any()
    assert tokens.shape == (4, 14, 1) and tokens.dtype == torch.int64
    assert made.counter.tolist() == [0, 0]  # nothing was drawn
    assert torch.equal(made(**signals(B)).log_probs, log_probs)  # apply_mask is off by default


def test_forward_with_masks() -> None:
    made = model().eval()
    one, other = made(**signals(B), apply_mask=True), made(**signals(B), apply_mask=True)
    wanted, _ = forward(made.params, made.state, B, made.cfg, key=draw(0, VALID, 0))
    assert torch.equal(one.masks, wanted.masks) and bool(one.masks.any())
    assert not torch.equal(one.masks, other.masks)


def test_processed_signals() -> None:
    made = model().eval()
    clean, clean_len = log_mel(B["audio"], B["audio_len"], made.cfg.preprocessor)
    noisy, noisy_len = log_mel(B["noisy_audio"], B["noisy_audio_len"], made.cfg.preprocessor)
    raw = signals(B)
    wanted = made(**raw)
    processed = {"processed_signal": clean, "processed_signal_length": clean_len}
    processed_noisy = {"processed_noisy_signal": noisy, "processed_noisy_signal_length": noisy_len}
    half_raw = {name: raw[name] for name in ("input_signal", "input_signal_length")}
    half_noisy = {name: raw[name] for name in ("noisy_input_signal", "noisy_input_signal_length")}
    for given in (processed | processed_noisy, half_raw | processed_noisy, processed | half_noisy):
        for got, one in zip(made(**given), wanted, strict=True):
            assert torch.equal(got, one)
    masked, other = made(**raw, apply_mask=True), copy.deepcopy(made)
    other.counter.zero_()
    assert torch.equal(other(**processed, **processed_noisy, apply_mask=True).masks, masked.masks)  # the same draw


@pytest.mark.parametrize(
    "change,message",
    [
        ({"input_signal": None, "input_signal_length": None}, "the signal is wanted either .* got nothing"),
        ({"input_signal_length": None}, "the signal is .* with its lengths; got raw. For"),
        ({"noisy_input_signal": None}, "the noisy signal .* got the raw one's lengths"),
        ({"processed_signal": torch.zeros(4, 80, 112)}, "got raw, the raw one's lengths, processed. For"),
        (
            {"processed_noisy_signal": torch.zeros(4, 80, 112), "processed_noisy_signal_length": torch.full((4,), 100)},
            "the noisy signal .* raw, the raw one's lengths, processed, the processed one's lengths",
        ),
        ({"noisy_input_signal": B["audio"][:, :8000]}, "pad both to one width"),
        (
            {"noisy_input_signal": None, "noisy_input_signal_length": None,
             "processed_noisy_signal": torch.zeros(4, 80, 64), "processed_noisy_signal_length": torch.full((4,), 60)},
            r"clean features are \[4, 80, 112\], noisy \[4, 80, 64\]",
        ),
    ],
    ids=range(7),
)  # fmt: skip
def test_either_raw_or_processed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model().eval()(**(signals(B) | change))


def test_the_core_takes_features_in_place_of_a_signal() -> None:
    made = model().eval()
    clean, clean_len = log_mel(B["audio"], B["audio_len"], made.cfg.preprocessor)
    given = {"features": clean, "features_len": clean_len, "noisy_features": clean, "noisy_features_len": clean_len}
    same = {**B, "noisy_audio": B["audio"]}
    values = [loss(made.params, made.state, one, made.cfg, key=key(1), train=False)[0] for one in (given, same)]
    assert torch.equal(values[0], values[1])
    for wrong, message in (
        ({**B, "features": clean}, "batch: has both audio and features; keep one"),
        ({"features": clean, "noisy_features": clean}, "batch: features_len, noisy_features_len missing"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(made.params, made.state, wrong, made.cfg, apply_mask=False)


# Inside torch


def test_modes_parameters_and_precision() -> None:
    made = model()
    assert made.train() is made and made.training
    assert made.eval() is made and not made.encoder.training  # type: ignore[union-attr]
    assert sum(leaf.numel() for leaf in made.parameters()) == sum(
        leaf.numel() for leaf in flatten(made.params).values()
    )
    wanted = made(**signals(B))
    half = copy.deepcopy(made).half()
    got = half(**signals(B))
    assert half.decoder.weight.dtype == torch.float16  # type: ignore[union-attr]
    assert half.quantizer.codebooks.dtype == torch.float64  # type: ignore[union-attr]
    assert torch.equal(got.tokens, wanted.tokens)  # targets do not depend on the model's precision
    torch.testing.assert_close(got.log_probs, wanted.log_probs, atol=0.02, rtol=0.02)
    assert copy.deepcopy(made).to(torch.bfloat16)(**signals(B)).log_probs.isfinite().all()
    assert all(leaf.is_meta for leaf in copy.deepcopy(made).to("meta").buffers())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_stand_alone_and_go_on_alike(how: str) -> None:
    made = model(*SMALL)
    made.training_step(B)
    if how == "deepcopy":
        other = copy.deepcopy(made)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(made))
    else:
        file = io.BytesIO()
        torch.save(made, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert equal(dict(made.state_dict()), dict(other.state_dict()))
    assert torch.equal(made.training_step(B), other.training_step(B))
    assert (other.cfg, other.seed, other.counter.tolist()) == (made.cfg, made.seed, [2, 0])
    with torch.no_grad():
        other.decoder.weight.zero_()
    assert bool(made.decoder.weight.any())  # type: ignore[union-attr, operator]


def _tokens(made: PureTorchSSLModel) -> torch.Tensor:
    torch.set_num_threads(1)
    return made.eval()(**signals(B)).tokens


def test_a_model_reaches_a_spawned_worker() -> None:
    made = model(*SMALL)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        tokens = pool.apply(_tokens, (made,))
    assert torch.equal(tokens, _tokens(made))


def parameters(made: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: leaf.detach().clone() for name, leaf in made.named_parameters()}


def test_functional_call_runs_on_the_given_parameters() -> None:
    made, other = model(), model(seed=9)
    other.seed = made.seed
    buffers = {name: leaf.clone() for name, leaf in other.named_buffers()}
    value = functional_call(made, parameters(other) | buffers, (B,))
    assert made.counter.tolist() == [0, 0]  # the given buffers took the place of its own
    assert buffers["counter"].tolist() == [1, 0]
    # With and without a graph of gradients, libraries may choose other kernels, and round otherwise.
    torch.testing.assert_close(value, other.training_step(B), rtol=ROUNDING, atol=0)
    out = functional_call(made.eval(), parameters(other), (), signals(B))
    with torch.no_grad():
        wanted = copy.deepcopy(made)
        wanted.load_state_dict(parameters(other), strict=False)
        torch.testing.assert_close(out.log_probs, wanted(**signals(B)).log_probs, rtol=0, atol=ROUNDING * 10)


def test_func_grad_is_the_gradient_and_leaves_the_model_alone() -> None:
    made = model()
    before = snapshot(dict(made.named_buffers()))
    grads = torch.func.grad(lambda params: functional_call(made, params, (B,)))(parameters(made))
    assert equal(snapshot(dict(made.named_buffers())), before)
    made.training_step(B).backward()
    for name, leaf in made.named_parameters():
        assert leaf.grad is not None
        torch.testing.assert_close(grads[name], leaf.grad, atol=1e-5, rtol=1e-4)


def test_vmap_over_an_ensemble() -> None:
    # Dither, drawn from counts that are batched here, would send torch's stft into a slow fallback that warns.
    models = [model(*SMALL, "preprocessor.dither=0", seed=seed) for seed in (1, 2, 3)]
    for one in models:
        one.seed = 0
    params, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
    base = copy.deepcopy(models[0]).to("meta")
    values = torch.vmap(lambda p, b: functional_call(base, (p, b), (B,)))(params, buffers)
    wanted = torch.stack([one.training_step(B) for one in models])
    torch.testing.assert_close(values, wanted, atol=1e-5, rtol=1e-5)
    assert len(set(values.tolist())) == 3


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    made, eager = model(*SMALL), model(*SMALL)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for n in range(3):
        data = batch(seed=n)
        value, wanted = compiled(data), eager(data)
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-5)
    value.backward()
    wanted.backward()
    for got, one in zip(made.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, one.grad, atol=1e-5, rtol=1e-3)
    for got, one in zip(made.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(got, one)
    assert made.counter.tolist() == [3, 0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # the counter's value is no part of the graph


@pytest.fixture
def _one_rank(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")  # of filters with one channel
@pytest.mark.usefixtures("_one_rank")
def test_distributed_data_parallel_around_it() -> None:
    made, alone = model(), model()
    wrapped = torch.nn.parallel.DistributedDataParallel(made)
    optimizer, other = (nest_fn.create_optimizer(one, made.cfg) for one in (wrapped, alone))
    for _ in range(2):
        for one, descent in ((wrapped, optimizer), (alone, other)):
            descent.zero_grad()
            one(B).backward()
            descent.step()
    assert equal(dict(made.state_dict()), dict(alone.state_dict()))
    value = made.compute_loss(*wrapped(**signals(B), apply_mask=True))  # the original keywords go through it too
    assert torch.equal(value, alone.compute_loss(*alone(**signals(B), apply_mask=True)))


# Names


def test_the_references_state_dict_loads() -> None:
    made, other = model(seed=4), model(seed=5)
    theirs = nemo.to_state_dict(other.params, other.state, other.cfg)
    result = made.load_state_dict(theirs)
    assert not result.missing_keys and not result.unexpected_keys
    assert equal(dict(made.state_dict()), dict(other.state_dict()))
    ours = model(seed=4)
    ours.load_state_dict(other.state_dict())
    assert equal(dict(ours.state_dict()), dict(other.state_dict()))


def test_a_part_of_the_references_state_dict() -> None:
    made, other = model(seed=4), model(seed=5)
    theirs = nemo.to_state_dict(other.params, other.state, other.cfg)
    encoder = {name: leaf for name, leaf in theirs.items() if name.startswith("encoder.")} | {"x": torch.zeros(1)}
    with pytest.raises(ValueError, match="'decoder.decoder_layers.0.weight' .* is missing"):
        made.load_state_dict(encoder)
    before = made.decoder.weight.clone()  # type: ignore[union-attr, operator]
    result = made.load_state_dict(encoder, strict=False)
    assert result.unexpected_keys == ["x"]
    assert "decoder.decoder_layers.0.weight" in result.missing_keys
    assert torch.equal(made.decoder.weight, before)  # type: ignore[arg-type, union-attr]
    assert equal(snapshot(made.params["encoder"]), snapshot(other.params["encoder"]))

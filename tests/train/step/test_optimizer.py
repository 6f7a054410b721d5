"""Optimizers against torch.optim, over several steps; nothing that is given changes unless it is donated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn.config import Config, OptimConfig
from nest_fn.layers import random
from nest_fn.layers.tree import flatten, global_norm
from nest_fn.layers.types import Tensor
from nest_fn.train.step.optimizer import Optimizer, adamw, make_optimizer, scale, sgd
from nest_fn.train.step.step import init_train_state, make_step, training_loss, value_and_grad

SHAPES = {"a.weight": (7, 5), "a.bias": (5,), "b.0.weight": (3, 4, 2), "b.1.scale": ()}


def _leaves(seed: int, size: float = 1.0) -> dict[str, Tensor]:
    keys = random.split(random.key(seed), len(SHAPES))
    return {path: size * random.normal(key, shape) for (path, shape), key in zip(SHAPES.items(), keys, strict=True)}


def _rates() -> list[float]:
    return [1e-2, 1e-2, 3e-3, 5e-2, 1e-4, 2e-3]


def _ours(optimizer: Optimizer, donate: bool) -> dict[str, Tensor]:
    params = _leaves(0)
    state = optimizer.init(params)
    for step, rate in enumerate(_rates()):
        params, state = optimizer.update(params, _leaves(step + 1, 0.3), state, rate, donate=donate)
    return params


def _theirs(make: Any, **options: Any) -> dict[str, Tensor]:
    params = {path: torch.nn.Parameter(leaf) for path, leaf in _leaves(0).items()}
    optimizer = make(list(params.values()), lr=1.0, **options)
    for step, rate in enumerate(_rates()):
        optimizer.param_groups[0]["lr"] = rate
        for leaf, grad in zip(params.values(), _leaves(step + 1, 0.3).values(), strict=True):
            leaf.grad = grad
        optimizer.step()
    return {path: leaf.detach() for path, leaf in params.items()}


CASES = {
    "adamw": (adamw((0.9, 0.98), 1e-8, 1e-3), torch.optim.AdamW, {"betas": (0.9, 0.98), "weight_decay": 1e-3}),
    "adam": (adamw((0.8, 0.95), 1e-6, 0.1, decoupled=False), torch.optim.Adam,
             {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "sgd": (sgd(0.9, 0.01), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "plain sgd": (sgd(0.0), torch.optim.SGD, {}),
}  # fmt: skip


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name: str, donate: bool) -> None:
    optimizer, theirs, options = CASES[name]
    got, start = _ours(optimizer, donate), _leaves(0)
    fused = {} if "sgd" in name else {"fused": True}
    for wanted, close in ((_theirs(theirs, **options), 1e-7), (_theirs(theirs, **options, **fused), 0.0)):
        for path, leaf in wanted.items():
            torch.testing.assert_close(got[path], leaf, rtol=close, atol=close)
            assert not torch.equal(got[path], start[path])


@pytest.mark.parametrize("name", CASES)
def test_update_is_pure_unless_it_is_given_its_arguments(name: str) -> None:
    optimizer = CASES[name][0]
    params, grads = _leaves(0), _leaves(1)
    state = optimizer.init(params)
    once, after = optimizer.update(params, grads, state, 0.1)
    again, _ = optimizer.update(params, grads, state, 0.1)
    for path, leaf in _leaves(0).items():
        assert torch.equal(params[path], leaf) and torch.equal(once[path], again[path])
        assert torch.equal(grads[path], _leaves(1)[path])
    assert all(float(leaf.abs().sum()) == 0 for part in state[1:] for leaf in part.values())
    assert float(state[0]) == 0 and float(after[0]) == 1
    given, _ = optimizer.update(params, grads, state, 0.1, donate=True)
    for path, leaf in given.items():
        assert leaf.data_ptr() == params[path].data_ptr() and torch.equal(leaf, once[path])


def test_what_the_config_says() -> None:
    params, grads = _leaves(0), _leaves(1)
    for config, other in (
        (OptimConfig(), adamw()),
        (OptimConfig(name="adam", betas=(0.5, 0.6), eps=1e-3), adamw((0.5, 0.6), 1e-3, 1e-3, decoupled=False)),
        (OptimConfig(name="sgd", momentum=0.3, weight_decay=0.2), sgd(0.3, 0.2)),
    ):
        got, wanted = (one.update(params, grads, one.init(params), 0.1)[0] for one in (make_optimizer(config), other))
        assert all(torch.equal(got[path], wanted[path]) for path in params)


def test_norm_and_scale() -> None:
    leaves = _leaves(3)
    whole = torch.cat([leaf.flatten() for leaf in leaves.values()])
    torch.testing.assert_close(global_norm(leaves), whole.norm())
    halved = scale(leaves, torch.tensor(0.5))
    assert all(torch.equal(halved[path], leaf / 2) for path, leaf in leaves.items())


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("optimizer", [adamw(), adamw(decoupled=False), sgd()], ids=["adamw", "adam", "sgd"])
def test_the_order_of_memory_changes_nothing(optimizer: Optimizer, donate: bool) -> None:
    """Gradients and parameters as a convolution in channels-last format, or a transposed product, leave them."""

    def strided(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.T.contiguous().T

    shapes = {"conv": (6, 5, 3, 3), "matrix": (7, 4)}
    draws = {name: random.normal(random.key(n), (3, *shape)) for n, (name, shape) in enumerate(shapes.items())}

    def two_updates(order: Any) -> tuple[dict[str, Tensor], Any]:
        params = {name: order(draw[0].clone()) for name, draw in draws.items()}
        state = optimizer.init(params)
        for step in (1, 2):
            grads = {name: order(draw[step]) for name, draw in draws.items()}
            params, state = optimizer.update(params, grads, state, 0.1, donate=donate)
        return params, state

    wanted, wanted_state = two_updates(torch.Tensor.contiguous)
    found, found_state = two_updates(strided)
    assert all(torch.equal(found[name], wanted[name]) for name in shapes)
    for got, want in zip(found_state, wanted_state, strict=True):
        leaves = got if isinstance(got, dict) else {"": got}
        assert all(torch.equal(leaf, want[name] if name else want) for name, leaf in leaves.items())


def test_gradients_of_a_strided_subsampling_are_applied_where_they_belong() -> None:
    """Its convolutions leave gradients in channels-last format: an update is that of dense gradients."""
    cfg = Config.preset("tiny", ["encoder.subsampling=striding", "optim.weight_decay=0"])
    ts = init_train_state(random.key(0), cfg)
    length = torch.tensor([16000, 12000])
    audio = (random.normal(random.key(1), (2, 16000)) * 2000).to(torch.int16)
    raw = {"audio": audio, "audio_len": length, "noise": audio, "noise_len": length, "row": torch.arange(2),
           "utterance": torch.arange(2), "weight": torch.ones(2)}  # fmt: skip
    paths = list(flatten(ts.params))
    _, grads = value_and_grad(training_loss(cfg))(ts.params, paths, ts.state, raw, random.key(2))
    moved, _ = make_step(cfg)(ts, [raw], random.key(2))
    name = "encoder.subsampling.stages.1.conv.weight"
    change = flatten(moved.params)[name] - flatten(ts.params)[name]
    # The first update of Adam is the sign of the gradient times the rate, where the gradient is not tiny.
    large = grads[name].abs() > 1e-3 * grads[name].abs().max()
    assert torch.equal(change.sign()[large], -grads[name].sign()[large])

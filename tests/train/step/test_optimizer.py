"""Optimizers against torch.optim, over several steps; nothing that is given changes unless it is donated."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn.config import OptimConfig
from nest_fn.layers import random
from nest_fn.layers.tree import global_norm
from nest_fn.layers.types import Tensor
from nest_fn.train.step.optimizer import Optimizer, adamw, make_optimizer, scale, sgd

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

"""The whole model under ``torch.compile`` and ``torch.func``: from waveform to loss it is one pure function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap

from nest_fn import init, loss
from nest_fn.layers import random
from nest_fn.layers.tree import fill, flatten, tree_map
from nest_fn.layers.types import Params

from .registry import batch, key, tiny
from .test_gradients import double

# PyTorch has no batching rule for the Fourier transform of a signal on CPU: it loops, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop.*aten..stft:UserWarning")

SMALL = tiny("encoder.n_layers=1")


def gradients(f: Any, params: Params, *rest: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], Any]:
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in flatten(params).items()}
    value, aux = f(fill(params, leaves), *rest)
    grads = torch.autograd.grad(value, list(leaves.values()))
    return value.detach(), dict(zip(leaves, grads, strict=True)), aux


def test_loss_is_one_graph() -> None:
    """Compiled once, from waveform to loss and gradients; new data, lengths and keys need no new graph."""
    torch._dynamo.reset()
    params, state = init(key(0), SMALL)

    def f(p: Any, s: Any, data: Any, k: torch.Tensor) -> Any:
        return loss(p, s, data, SMALL, key=k, train=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for seed in range(3):
        data = batch(seed=20 + seed)
        data["audio_len"] = data["noisy_audio_len"] = data["audio_len"] - 800 * seed
        value, grads, (metrics, new_state) = gradients(compiled, params, state, data, key(seed))
        wanted, wanted_grads, (wanted_metrics, wanted_state) = gradients(f, params, state, data, key(seed))
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
        assert metrics.keys() == wanted_metrics.keys()
        for name, one in wanted_metrics.items():
            torch.testing.assert_close(metrics[name], one, atol=1e-3, rtol=1e-5)
        for path, one in wanted_grads.items():
            torch.testing.assert_close(grads[path], one, atol=1e-4, rtol=1e-3)
        for path, one in flatten(wanted_state).items():
            torch.testing.assert_close(flatten(new_state)[path], one, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def stacked(*trees: Any) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def test_gradients_of_each_example() -> None:
    """``vmap(grad(loss))`` over examples, each with its key, is a loop over batches of one."""
    params, state = init(key(0), SMALL)
    rows = {name: value[:, None] for name, value in batch().items()}
    keys = random.split(key(4), 3)

    def one(p: Params, row: Any, k: torch.Tensor) -> torch.Tensor:
        return loss(p, state, row, SMALL, key=k)[0]

    many = flatten(vmap(grad(one), in_dims=(None, 0, 0))(params, rows, keys))
    for row in range(3):
        _, alone, _ = gradients(
            lambda p, r=row: (one(p, {name: value[r] for name, value in rows.items()}, keys[r]), None), params
        )
        for path, wanted in alone.items():
            torch.testing.assert_close(many[path][row], wanted, atol=1e-4, rtol=1e-3, msg=path)


def test_an_ensemble() -> None:
    """``vmap`` over stacked parameters, states and keys is a loop over models."""
    models = [init(key(seed), SMALL) for seed in (0, 1)]
    keys, data = random.split(key(4), 2), batch()

    def one(p: Params, s: Any, k: torch.Tensor) -> tuple[torch.Tensor, Any]:
        value, (_, new_state) = loss(p, s, data, SMALL, key=k)
        return value, new_state

    values, states = vmap(one)(stacked(*(p for p, _ in models)), stacked(*(s for _, s in models)), keys)
    for index, (params, state) in enumerate(models):
        value, new_state = one(params, state, keys[index])
        torch.testing.assert_close(values[index], value, atol=1e-5, rtol=1e-5)
        for path, leaf in flatten(new_state).items():
            torch.testing.assert_close(flatten(states)[path][index], leaf, atol=1e-5, rtol=1e-5, msg=path)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_slope_along_a_direction() -> None:
    """``jvp`` in float64 is the finite difference along the same direction."""
    params, state = (double(tree) for tree in init(key(0), SMALL))
    data = double(batch())
    towards = {
        path: random.normal(random.fold_in(key(5), index), leaf.shape, torch.float64)
        for index, (path, leaf) in enumerate(flatten(params).items())
    }
    direction = fill(params, towards)

    def value(p: Params) -> torch.Tensor:
        return loss(p, state, data, SMALL, key=key(6))[0]

    def moved(step: float) -> torch.Tensor:
        return value(tree_map(lambda leaf, way: leaf + step * way, params, direction))

    _, slope = jvp(value, (params,), (direction,))
    torch.testing.assert_close((moved(1e-6) - moved(-1e-6)) / 2e-6, slope, atol=1e-6, rtol=1e-6)


def test_the_hessian_of_a_slice() -> None:
    """Forward over reverse: a Hessian-vector product by ``jvp(grad)`` equals the difference of gradients."""
    params, state = (double(tree) for tree in init(key(0), SMALL))
    data = double(batch(rows=1))
    bias = params["decoder"]["bias"]
    way = random.normal(key(5), bias.shape, torch.float64)

    def slope(b: torch.Tensor) -> torch.Tensor:
        def value(inner: torch.Tensor) -> torch.Tensor:
            changed = {**params, "decoder": {**params["decoder"], "bias": inner}}
            return loss(changed, state, data, SMALL, key=key(6))[0]

        return grad(value)(b)

    _, product = jvp(slope, (bias,), (way,))
    difference = (slope(bias + 1e-5 * way) - slope(bias - 1e-5 * way)) / 2e-5
    torch.testing.assert_close(product, difference, atol=1e-7, rtol=1e-6)
    assert product.abs().max() > 1e-4

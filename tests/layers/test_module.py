"""``torch.func.functional_call``: templates without numbers, foreign modules as pure functions, and its trap."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from nest_fn.layers.linear import linear
from nest_fn.layers.module import call, from_module, template
from nest_fn.layers.norm import layer_norm


def foreign() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.ReLU())


def test_a_template_holds_no_numbers() -> None:
    layer = template(nn.Linear(3, 2))
    assert all(leaf.is_meta and not leaf.requires_grad for leaf in layer.parameters())
    assert not layer.training


@pytest.mark.parametrize(
    "params,message",
    [({"weight": torch.ones(2, 3)}, r"Missing key\(s\): 'bias'"),
     ({"weight": torch.ones(2, 3), "bias": torch.ones(2), "scale": torch.ones(1)}, r"Unexpected key\(s\): 'scale'")],
)  # fmt: skip
def test_names_are_checked(params: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(template(nn.Linear(3, 2)), params, torch.ones(3))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\): 'bias'"):
        layer_norm({"weight": torch.ones(3)}, torch.ones(2, 3))  # type: ignore[typeddict-item]
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\): 'scale'"):
        linear({"weight": torch.ones(2, 3), "scale": torch.ones(1)}, torch.ones(3))  # type: ignore[typeddict-unknown-key]


def test_functional_call_writes_into_buffers() -> None:
    """The trap for which batch norm is written out by hand and ``from_module`` clones: PyTorch mutates its argument."""
    layer = nn.BatchNorm1d(3)
    mean = torch.zeros(3)
    buffers = {"running_mean": mean, "running_var": torch.ones(3), "num_batches_tracked": torch.tensor(0)}
    functional_call(layer, {**dict(layer.named_parameters()), **buffers}, (torch.randn(4, 3, 5) + 1,))
    assert not torch.equal(mean, torch.zeros(3))


def test_from_module_is_pure() -> None:
    module = foreign()
    params, state, apply = from_module(module)
    before = {name: leaf.clone() for name, leaf in {**params, **state}.items()}
    x = torch.linspace(-1, 1, 40).reshape(2, 2, 10)
    y, new = apply(params, state, x)
    assert all(torch.equal(leaf, before[name]) for name, leaf in {**params, **state}.items())
    assert not torch.equal(new["1.running_mean"], state["1.running_mean"])
    assert torch.equal(y, module(x))  # which moves the module's own buffers
    assert torch.equal(new["1.running_mean"], dict(module.named_buffers())["1.running_mean"])


def test_from_module_copies_the_numbers() -> None:
    module = foreign()
    params, _, _ = from_module(module)
    params["0.weight"].zero_()
    assert dict(module.named_parameters())["0.weight"].abs().sum() > 0


def test_from_module_under_transforms() -> None:
    """Gradients, and a batch of models."""
    module = nn.Linear(4, 2)
    params, state, apply = from_module(module)
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    grads = torch.func.grad(lambda p: apply(p, state, x)[0].square().sum())(params)
    module(x).square().sum().backward()
    torch.testing.assert_close(grads["weight"], module.weight.grad)
    many = {name: torch.stack((leaf, 2 * leaf)) for name, leaf in params.items()}
    y = torch.func.vmap(lambda p: apply(p, state, x)[0])(many)
    torch.testing.assert_close(y[1], 2 * module(x))

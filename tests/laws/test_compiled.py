"""``torch.compile(fullgraph=True)`` gives what eager mode gives, without a graph break.

Tracing takes seconds a case, most of it for the draws, so that most encoders are compiled in eval here; the whole
model is compiled in training in ``test_whole_model.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn.layers.tree import fill, flatten

from .registry import COMPOSITES, ENCODERS, LEAVES, Example, key, scalar

TRAINED = ("encode, stochastic depth", "encode, drawn context", "conformer_layer, batch norm")
CASES = [
    *[(example, True) for example in LEAVES],
    *[(example, example.name in TRAINED or "conformer" not in example.name) for example in COMPOSITES],
    *[(example, example.name in TRAINED) for example in ENCODERS],
]


@pytest.fixture(autouse=True)
def _from_scratch() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("example,train", CASES, ids=[f"{one}-{'train' if t else 'eval'}" for one, t in CASES])
def test_compiled_equals_eager(example: Example, train: bool) -> None:
    def call(p: Any, s: Any, i: Any, k: torch.Tensor) -> tuple[Any, ...]:
        return tuple(example.run(p, s, i, k, train))

    arguments = (example.params, example.state, dict(example.inputs), key(1))
    with torch.no_grad():
        y, lengths, state = torch.compile(call, fullgraph=True, backend="aot_eager")(*arguments)
        wanted = example.run(*arguments, train)
    torch.testing.assert_close(y, wanted.y, atol=1e-6, rtol=1e-6)
    assert wanted.lengths is None or torch.equal(lengths, wanted.lengths)
    for path, leaf in flatten(wanted.state).items():
        torch.testing.assert_close(flatten(state)[path], leaf)


def value_and_gradients(example: Example, call: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in flatten(example.params).items()}
    value = call(fill(example.params, leaves), example.state, dict(example.inputs), key(1))
    return value.detach(), list(torch.autograd.grad(value, list(leaves.values())))


@pytest.mark.slow
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="Inductor of PyTorch 2.11 writes C++ that does not compile under ATEN_CPU_CAPABILITY=default",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own making
def test_inductor_equals_eager() -> None:
    """The default backend, with gradients: affine maps, and draws, whose 64-bit products become C++ here."""
    example = next(one for one in COMPOSITES if one.name == "feed_forward")

    def call(p: Any, s: Any, i: Any, k: torch.Tensor) -> torch.Tensor:
        return scalar(example, example.run(p, s, i, k, True))

    value, grads = value_and_gradients(example, torch.compile(call, fullgraph=True))
    wanted, wanted_grads = value_and_gradients(example, call)
    torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
    for got, one in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, one, atol=1e-4, rtol=1e-4)

"""Activation recomputation: the same bits, fewer saved activations, eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Tensor
from nest_fn.train.step.compiled import EAGER, StepParts, compile_parts
from nest_fn.train.step.recompute import recompute_blocks
from nest_fn.train.step.step import init_train_state, training_loss, value_and_grad
from tests.train.step.test_pure import batch

CFG = Config.preset("tiny", ["encoder.n_layers=4", "data.augment.prob=0"])


def loss_and_gradients(parts: StepParts) -> tuple[Tensor, dict[str, Tensor], Any, int]:
    """Loss, gradients, new state, and bytes of distinct tensors that autograd saves."""
    ts = init_train_state(random.key(0), CFG)
    saved: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        found = value_and_grad(training_loss(CFG, parts=parts))(
            ts.params, list(flatten(ts.params)), ts.state, batch(3), random.key(1)
        )
    (loss, (_, state)), grads = found
    return loss, grads, state, sum(saved.values())


def test_the_same_bits_with_fewer_saved_activations() -> None:
    loss, grads, state, saved = loss_and_gradients(EAGER)
    again, others, other_state, fewer = loss_and_gradients(recompute_blocks(EAGER))
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[path], others[path]) for path in grads)
    leaves = flatten(other_state)
    assert all(torch.equal(leaf, leaves[path]) for path, leaf in flatten(state).items())
    assert fewer < 0.6 * saved


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_are_recomputed_as_well() -> None:
    parts = compile_parts(lambda name: "aot_eager")
    loss, grads, _, _ = loss_and_gradients(parts)
    again, others, _, _ = loss_and_gradients(recompute_blocks(parts))
    torch.testing.assert_close(again, loss)
    for path in grads:
        torch.testing.assert_close(others[path], grads[path])

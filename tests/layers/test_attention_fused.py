"""The operator for relative attention beside the layer it stands for, in Triton's interpreter: no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from nest_fn.layers import attention as module
from nest_fn.layers import random
from nest_fn.layers.attention import attention, init_attention
from nest_fn.layers.positions import relative_positions

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with PyTorch for Linux alone"
)

PREPARED = """
import torch
import triton.language as tl
from triton.runtime import interpreter
from nest_fn.layers import attention as module, attention_fused, attention_triton, attention_triton_backward
from nest_fn.layers import mixer, mixer_triton, random
from nest_fn.layers.attention import attention, init_attention
from nest_fn.layers.positions import relative_positions
from nest_fn.layers.tree import fill, flatten, tree_map

before = interpreter._patch_lang_tensor
def patch(tensor, scope):  # as it is, numpy 2.4 refuses bounds of loops
    before(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())
interpreter._patch_lang_tensor = patch
attention_fused._forward.register_kernel("cpu")(attention_triton.forward)
attention_fused._backward.register_kernel("cpu")(attention_triton_backward.backward)
constants = (mixer._GAMMA, mixer._M1, mixer._M2)
mixer._packed.register_kernel("cpu")(
    lambda key, bound, count: mixer_triton.packed_lanes_above(key, bound, count, constants)
)
settings = attention_triton.settings  # the interpreter multiplies bfloat16 as if it were whole numbers
attention_triton.settings = lambda *given: settings(*given) | {"KIND": tl.float32}
"""

EQUAL = """
attention_triton_backward.PROGRAMS = 20  # a program of positions then owns several rows of the batch

def run(params, x, lengths, heads, rate, key, one_operator):
    module._is_one_operator = lambda x, heads: one_operator
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in flatten({"x": x, **params}).items()}
    given = fill({"x": x, **params}, leaves)
    frames, width = x.shape[1:]
    positions = relative_positions(frames - 1, frames - 1, width, x)
    valid = torch.arange(frames) < lengths[:, None]
    settings = dict(heads=heads, rate=rate, key=key, train=True)
    y = attention({n: p for n, p in given.items() if n != "x"}, given["x"], positions, valid, None, **settings)
    loss = (y.float() * random.normal(random.key(9), y.shape)).sum()
    return y, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))

def close(a, b, eps):
    return float((a.float() - b.float()).abs().max()) <= eps * float(b.float().abs().max())

for number, (block, heads, width, lengths, rate, rows, dtype) in enumerate((
    (16, 2, 24, (33, 20, 0), 0.3, True, torch.float32),  # an empty row; d_k that fills no tile
    (16, 1, 44, (40, 1), 0.0, False, torch.float32),  # d_k of NEST-Small
    (32, 2, 16, (33, 9), 0.3, False, torch.float32),  # one key for the batch
    (64, 1, 12, (75,), 0.5, True, torch.float32),  # decisions of a row lie in three numbers
    (16, 2, 16, (5,), 0.2, True, torch.float32),  # one block
    (16, 1, 12, (20, 11), 0.3, True, torch.bfloat16),
)):
    attention_triton.BLOCK = block
    keys = random.split(random.key(number), 4)
    params = init_attention(keys[0], width, heads)
    for name, key in (("content_bias", keys[1]), ("position_bias", keys[2])):
        params[name] = random.normal(key, params[name].shape)
    params = tree_map(lambda leaf: leaf.to(dtype), params)
    x = random.normal(keys[3], (len(lengths), max(lengths), width)).to(dtype)
    key = random.split(random.key(5), len(lengths)) if rows else random.key(5)
    given = (params, x, torch.tensor(lengths), heads, rate, key)
    (y, grads), (z, wanted) = (run(*given, one_operator) for one_operator in (True, False))
    # Sums of some hundred terms; in bfloat16 the layer rounds scores and weights, the operator does not.
    eps = (64 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
    assert y.dtype == z.dtype == dtype and close(y, z, eps), number
    for path in wanted:
        if path != "key.bias":  # its gradient is 0 but for rounding: it adds the same to all scores of a query
            assert grads[path].dtype == dtype and close(grads[path], wanted[path], eps), (number, path)
        else:
            assert float(grads[path].abs().max()) <= eps * float(wanted["query.bias"].abs().max()), number
print("equal")
"""

RULES = """
attention_triton.BLOCK = 16
heads, width, frames = 2, 8, 5
tensors = [random.normal(random.key(n), (2, frames, width)).requires_grad_() for n in range(3)]
tensors += [random.normal(random.key(3), (2 * frames - 1, width)).requires_grad_()]
tensors += [random.normal(random.key(n), (heads, width // heads)).requires_grad_() for n in (4, 5)]
valid = torch.arange(frames) < torch.tensor([[5], [3]])
kept = random.dropout_bits(random.split(random.key(6), 2), 0.25, (2, heads, frames, frames))
torch.library.opcheck(attention_fused._forward, (*tensors, valid, kept, 0.25, -10000.0))
torch.library.opcheck(mixer._packed, (random.split(random.key(7), 3), 11, 37))
first, second = (
    torch.autograd.grad(attention_fused.relative_attention(*tensors, valid, kept, 0.25, -10000.0).sum(), tensors)
    for _ in range(2)
)
assert all(torch.equal(a, b) for a, b in zip(first, second))
print("kept")
"""


def interpreted(code: str) -> str:
    """What a process prints in which kernels are interpreted."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PREPARED + code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_outputs_and_gradients_are_those_of_the_layer() -> None:
    """Several blocks and one, widths and lengths that fill none, padding, empty rows, the same decisions of dropout."""
    assert interpreted(EQUAL) == "equal"


def test_the_operators_keep_pytorchs_rules() -> None:
    """Schema, fake tensors, autograd, compilation with sizes fixed and free; twice the same bits."""
    assert interpreted(RULES) == "kept"


def test_where_the_operator_applies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, on CUDA, in half precision, heads of at most 128: else the layers do it."""
    x = torch.empty(2, 5, 256, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not module._is_one_operator(x, 4)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert module._is_one_operator(x, 4) and not module._is_one_operator(x, 1)
    assert not module._is_one_operator(x.float(), 4)
    chosen = []
    torch.vmap(lambda row: chosen.append(module._is_one_operator(row, 4)) or row)(x)
    assert chosen == [False]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert not module._is_one_operator(x, 4)


def test_all_or_nothing_dropped_needs_no_draw() -> None:
    """Rates that round to none or all of 65536 lanes: no kernel is asked for."""
    key = random.split(random.key(0), 2)
    assert random.dropout_bits(key, 1e-9, (2, 40)).tolist() == [[-1, -1]] * 2
    assert random.dropout_bits(random.key(0), 1.0, (40,)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="rate must lie in"):
        random.dropout_bits(key, 1.5, (2, 40))


def test_what_the_operator_cannot_do_stays_with_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of contexts, no positions: the operator, which has no kernel for CPUs, is not asked."""
    monkeypatch.setattr(module, "_is_one_operator", lambda x, heads: True)
    params, x, valid = init_attention(random.key(0), 8, 2), torch.ones(1, 4, 8), torch.ones(1, 4, dtype=torch.bool)
    attention(params, x, relative_positions(3, 3, 8, x), valid, torch.ones(4, 4, dtype=torch.bool), heads=2)
    attention(params, x, None, valid, None, heads=2)
    with pytest.raises(NotImplementedError, match="relative_attention"):
        attention(params, x, relative_positions(3, 3, 8, x), valid, None, heads=2)

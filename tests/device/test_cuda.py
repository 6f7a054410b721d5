"""What only a real device shows: equal numbers, one wait a step, batches sent ahead. Skipped where there is none."""

from __future__ import annotations

import warnings
from itertools import islice
from typing import Any

import pytest
import torch

from nest_fn import Config, init
from nest_fn.encoder import subsample_features
from nest_fn.layers import random
from nest_fn.layers.attention import attention, init_attention
from nest_fn.layers.positions import relative_positions
from nest_fn.layers.tree import fill, flatten, tree_map
from nest_fn.train.data.dataset import batches, open_dataset
from nest_fn.train.data.transfer import send, to_device
from nest_fn.train.step import metrics
from nest_fn.train.step.step import init_train_state, make_step
from tests.train.conftest import Corpus

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda:0")


def config(corpus: Corpus, *overrides: str) -> Config:
    data = [f"data.train={corpus.train}", f"data.noise={corpus.noise}", "data.batch_seconds=8"]
    return Config.preset("tiny", [*data, "trainer.precision=fp32", *overrides])


def train(cfg: Config, device: torch.device, steps: int) -> tuple[Any, list[float]]:
    """Some steps from the same initial values, drawn on the CPU."""
    ts = init_train_state(random.key(0), cfg)
    state = ts._asdict() | {name: tree_map(lambda x: x.to(device), getattr(ts, name)) for name in ("params", "state")}
    opt = {k: tree_map(lambda x: x.to(device), v) if isinstance(v, dict) else v.to(device)
           for k, v in ts.opt_state._asdict().items()}  # fmt: skip
    ts = type(ts)(**state | {"opt_state": type(ts.opt_state)(**opt)})
    step, root = make_step(cfg), random.key(1, device=device)
    losses = []
    stream = batches(open_dataset(cfg.data, 0), send=lambda raw: send(raw, device))
    for number, raw in enumerate(islice(stream, steps)):
        ts, values = step(ts, [to_device(raw, device)], random.fold_in(root, number))
        losses.append(float(values["loss_sum"]) / float(values["masked_tokens"]))
    return ts, losses


def test_steps_are_those_of_the_cpu(corpus: Corpus) -> None:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        cfg = config(corpus)
        _, there = train(cfg, CUDA, 3)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert there == pytest.approx(train(cfg, torch.device("cpu"), 3)[1], rel=1e-4)


def test_the_same_again_is_equal(corpus: Corpus) -> None:
    cfg = config(corpus)
    first, second = (train(cfg, CUDA, 3)[0] for _ in range(2))
    for path, leaf in flatten(first.params).items():
        torch.testing.assert_close(leaf, flatten(second.params)[path], rtol=1e-5, atol=1e-6)


def test_random_bits() -> None:
    key = random.fold_in(random.key(3), torch.arange(5))
    assert torch.equal(random.bits(key.to(CUDA), (5, 1001)).cpu(), random.bits(key, (5, 1001)))
    assert torch.equal(random.dropout_mask(key.to(CUDA), 0.1, (5, 77)).cpu(), random.dropout_mask(key, 0.1, (5, 77)))


def test_a_step_waits_once(corpus: Corpus) -> None:
    cfg = config(corpus)
    root = random.key(1, device=CUDA)
    ts, step = init_train_state(random.key(0, device=CUDA), cfg), make_step(cfg, donate=True)
    stream = batches(open_dataset(cfg.data, 0), send=lambda raw: send(raw, CUDA))
    window: metrics.Sums = {}
    found: list[str] = []
    for number, raw in enumerate(islice(stream, 3)):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                ts, values = step(ts, [to_device(raw, CUDA)], random.fold_in(root, number))
                window = metrics.add(window, values)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [str(one.filename) for one in told if "synchroniz" in str(one.message)]
    assert len(found) == 1, found


def test_a_batch_that_was_sent_is_the_batch(corpus: Corpus) -> None:
    dataset = open_dataset(config(corpus).data, 0)
    plain = list(islice(batches(dataset), 4))
    ahead = list(islice(batches(dataset, send=lambda raw: send(raw, CUDA)), 4))
    for one, other in zip(plain, ahead, strict=True):
        there = to_device(other, CUDA)
        assert all(torch.equal(leaf.cpu(), one[name]) for name, leaf in there.items())  # type: ignore[literal-required]


def test_fused_convolutions_are_those_of_eager_mode(corpus: Corpus) -> None:
    """The subsampling, compiled on CUDA, where one operator makes its first two convolutions."""
    cfg = config(corpus)
    params, _ = init(random.key(0, device=CUDA), cfg)
    features = random.normal(random.key(1, device=CUDA), (3, 80, 208))
    lengths = torch.tensor([208, 150, 16], device=CUDA)
    leaves = {path: leaf.requires_grad_() for path, leaf in flatten(params["encoder"]).items() if "subsampling" in path}

    def run(subsample: Any) -> tuple[torch.Tensor, ...]:
        y, _ = subsample(params["encoder"], features, lengths, cfg.encoder)
        return y, *torch.autograd.grad(y.square().sum(), list(leaves.values()))

    made = run(torch.compile(subsample_features, fullgraph=True))
    for one, other in zip(made, run(subsample_features), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize(("heads", "width"), [(8, 512), (4, 176)])
def test_fused_attention_is_that_of_float64(heads: int, width: int) -> None:
    """Compiled in bfloat16 with dropout and padding, where one operator mixes, beside eager mode in float64."""
    keys = random.split(random.key(0, device=CUDA), 5)
    params = init_attention(keys[0], width, heads)
    params |= {
        name: random.normal(keys[n], params[name].shape) for n, name in ((1, "content_bias"), (2, "position_bias"))
    }
    x, valid = (
        random.normal(keys[3], (3, 150, width)),
        torch.arange(150, device=CUDA) < torch.tensor([[150], [70], [1]], device=CUDA),
    )
    weights = random.normal(random.key(9, device=CUDA), x.shape)

    def run(attend: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        leaves = {
            path: leaf.bfloat16().to(dtype).requires_grad_() for path, leaf in flatten({"x": x, **params}).items()
        }
        given = fill({"x": x, **params}, leaves)
        positions = relative_positions(149, 149, width, given["x"])
        y = attend(
            {n: p for n, p in given.items() if n != "x"}, given["x"], positions, valid, None,
            heads=heads, rate=0.1, key=random.split(keys[4], 3), train=True,
        )  # fmt: skip
        return y, *torch.autograd.grad((y * weights.to(dtype)).sum(), [leaves[n] for n in leaves if n != "key.bias"])

    made = run(torch.compile(attention, fullgraph=True), torch.bfloat16)
    for one, other in zip(made, run(attention, torch.float64), strict=True):
        torch.testing.assert_close(
            one.double(), other, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps * float(other.abs().max())
        )

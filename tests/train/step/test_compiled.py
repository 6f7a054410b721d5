"""The step compiled by parts: what it compiles does not grow with layers or shapes, and it computes what eager does.

Graphs are traced, differentiated and run; Inductor's code, which takes minutes on a CPU, is made for one part alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from nest_fn.config import Config
from nest_fn.encoder import subsample_features
from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.model import init
from nest_fn.train.run.inductor import inductor
from nest_fn.train.step.compiled import StepParts, compile_parts
from nest_fn.train.step.step import init_train_state, training_loss, value_and_grad

# PyTorch's compiler looks at the gradient of every tensor that it is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# Rows and seconds as buckets of one size have them, in the order in which an epoch might bring them.
SHAPES = [
    (4, 1.3), (2, 3.1), (8, 0.7), (3, 1.9), (5, 1.1), (2, 2.6), (6, 0.9), (3, 1.7), (7, 0.8), (2, 2.2),
    (4, 1.4), (9, 0.6),
]  # fmt: skip
# One dropout in the block, for its bits are most of what is traced.
FULL = ("loss.capacity=1.0", "data.augment.prob=0.7", "encoder.dropout=0", "encoder.dropout_att=0.1")


def raw(rows: int, seconds: float, seed: int) -> dict[str, Any]:
    """A batch of noise, rows of several lengths."""
    width = int(seconds * 16000) // 160 * 160
    signal = (random.normal(random.key(seed), (2, rows, width)) * 2000).to(torch.int16)
    length = width - torch.arange(rows) * (width // 3 // rows)
    return {
        "audio": signal[0] * (torch.arange(width) < length[:, None]), "audio_len": length,
        "noise": signal[1], "noise_len": torch.full((rows,), width),
        "row": torch.arange(rows), "utterance": torch.arange(rows) + 10 * seed, "weight": torch.ones(rows),
    }  # fmt: skip


def counted() -> tuple[StepParts, dict[str, CompileCounterWithBackend]]:
    """The parts compiled, and how often each was."""
    counters: dict[str, CompileCounterWithBackend] = {}

    def backend(name: str) -> CompileCounterWithBackend:
        counters[name] = CompileCounterWithBackend("aot_eager")
        return counters[name]

    return compile_parts(backend), counters


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own making
def test_inductor_ties_no_graph_to_a_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With code: the layout that Inductor chooses for a convolution's output must not fix the shape of its gradient."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # what is found there is not compiled, nor told
    torch._dynamo.reset()
    cfg, told = Config.preset("tiny"), list[str]()
    part = compile_parts(inductor(told.append)).model.subsample
    params = init(random.key(0), cfg)[0]["encoder"]
    weight = params["subsampling"]["out"]["weight"].requires_grad_()
    for rows, frames in ((4, 160), (2, 304), (8, 96), (3, 224)):
        x, length = random.normal(random.key(rows), (rows, 80, frames)), torch.full((rows,), frames)
        found = [f(params, x, length, cfg.encoder)[0].square().sum() for f in (part, subsample_features)]
        gradients = [torch.autograd.grad(value, [weight])[0] for value in found]
        torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)
    ways = [line for line in told if line.startswith("compiling")]
    assert ways == 2 * ["compiling subsampling, forward ...", "compiling subsampling, backward ..."]


def epoch(cfg: Config, shapes: list[tuple[int, float]], parts: StepParts) -> None:
    """Loss, metrics, state and gradient of every shape as eager gives them."""
    ts = init_train_state(random.key(0), cfg)
    paths = list(flatten(ts.params))
    eager, compiled = (value_and_grad(training_loss(cfg, parts=one)) for one in (StepParts(), parts))
    for number, (rows, seconds) in enumerate(shapes):
        given = (ts.params, paths, ts.state, raw(rows, seconds, number), random.key(number))
        (value, (metrics, state)), grads = compiled(*given)
        (wanted, (wanted_metrics, wanted_state)), wanted_grads = eager(*given)
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-5)
        for name in wanted_metrics.keys() - {"loss_sum"}:
            assert torch.equal(metrics[name], wanted_metrics[name]), name
        for path, one in wanted_grads.items():
            torch.testing.assert_close(grads[path], one, atol=2e-5 * float(wanted), rtol=1e-3, msg=path)
        for path, one in flatten(wanted_state).items():
            torch.testing.assert_close(flatten(state)[path], one, atol=1e-5, rtol=1e-5)


def test_a_mixed_epoch_compiles_each_part_a_few_times() -> None:
    """Twelve shapes and two layers; then eight, for which the block is the same graph again."""
    torch._dynamo.reset()
    parts, counters = counted()
    epoch(Config.preset("tiny", [*FULL, "encoder.n_layers=2"]), SHAPES, parts)
    counts = {name: counter.frame_count for name, counter in counters.items()}
    assert max(counts.values()) <= 3 and min(counts.values()) >= 1, counts
    epoch(Config.preset("tiny", [*FULL, "encoder.n_layers=8"]), SHAPES[:4], parts)
    again = {name: counter.frame_count for name, counter in counters.items()}
    # The encoder's input makes a key for each layer, and so is compiled for their number.
    assert again == {**counts, "encoder input": again["encoder input"]} and again["encoder input"] <= 3

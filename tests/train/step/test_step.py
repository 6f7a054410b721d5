"""The training step as a function: pure, deterministic, indifferent to how a batch is cut, safe from NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import flatten, tree_map
from nest_fn.layers.types import Tensor
from nest_fn.train.data.clips import load_rirs
from nest_fn.train.data.dataset import batches, open_dataset
from nest_fn.train.data.transfer import to_device
from nest_fn.train.errors import NonFiniteError
from nest_fn.train.run.batch import micro_batches
from nest_fn.train.step.step import TrainState, init_train_state, make_step, training_loss, value_and_grad
from tests.train.conftest import Corpus

KEY = random.key(3)
CPU = torch.device("cpu")


def _config(corpus: Corpus, *overrides: str) -> Config:
    data = [f"data.train={corpus.train}", f"data.noise={corpus.noise}", f"data.rir={corpus.rir}"]
    small = ["data.batch_seconds=8", "masking.mask_prob=0.03", "encoder.subsampling_conv_channels=8"]
    return Config.preset("tiny", [*data, *small, *overrides])


def _batch(cfg: Config, number: int = 0) -> dict[str, Tensor]:
    dataset = open_dataset(cfg.data, 0, sample_rate=cfg.sample_rate)
    return to_device(next(batches(dataset, batch=number)), CPU)


def _leaves(ts: TrainState) -> dict[str, Tensor]:
    """All tensors of a train state by path."""
    trees: dict[str, Any] = {"params": ts.params, "state": ts.state, "optimizer": list(ts.opt_state), "ema": ts.ema}
    return flatten(trees)


def _same(a: TrainState, b: TrainState) -> bool:
    ours, theirs = _leaves(a), _leaves(b)
    return a.step == b.step and ours.keys() == theirs.keys() and all(torch.equal(ours[p], theirs[p]) for p in ours)


def _copy(ts: TrainState) -> TrainState:
    return TrainState(*(tree_map(torch.clone, part) if not isinstance(part, int | tuple) else part for part in ts))


def _run(cfg: Config, steps: int = 3, **options: Any) -> tuple[TrainState, list[dict[str, Tensor]]]:
    step, ts, told = make_step(cfg, **options), init_train_state(random.key(0), cfg), []
    for number in range(steps):
        parts = micro_batches(_batch(cfg, number), cfg.trainer.accumulate)
        ts, metrics = step(ts, parts, random.fold_in(KEY, number))
        told.append(metrics)
    return ts, told


def test_pure_and_deterministic(corpus: Corpus) -> None:
    cfg = _config(corpus, "trainer.ema_decay=0.5", "trainer.clip_norm=1.0")
    step, ts, batch = make_step(cfg), init_train_state(random.key(0), cfg), _batch(cfg)
    before, batch_before = {path: leaf.clone() for path, leaf in _leaves(ts).items()}, tree_map(torch.clone, batch)
    first, told = step(ts, [batch], KEY)
    second, again = step(ts, [batch], KEY)
    assert all(torch.equal(leaf, before[path]) and not leaf.requires_grad for path, leaf in _leaves(ts).items())
    assert all(torch.equal(leaf, batch_before[name]) for name, leaf in batch.items())
    assert _same(first, second) and all(torch.equal(told[name], again[name]) for name in told)
    assert first.step == 1 and not any(leaf.requires_grad for leaf in _leaves(first).values())
    other, _ = step(ts, [batch], random.key(4))
    assert not _same(first, other)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_donating_changes_no_number(corpus: Corpus, optimizer: str) -> None:
    cfg = _config(corpus, f"optim.name={optimizer}", "trainer.ema_decay=0.9")
    assert _same(_run(cfg)[0], _run(cfg, donate=True)[0])


def test_every_parameter_moves_and_the_loss_falls(corpus: Corpus) -> None:
    cfg = _config(corpus, "optim.sched.name=constant", "optim.lr=3e-3", "data.augment.prob=0")
    step, ts, batch = make_step(cfg, donate=True), init_train_state(random.key(0), cfg), _batch(cfg)
    start, means = init_train_state(random.key(0), cfg), []
    for _ in range(25):
        ts, metrics = step(ts, [batch], KEY)
        means.append(float(metrics["loss_sum"] / metrics["masked_tokens"]))
    moved = {path for path, leaf in flatten(ts.params).items() if not torch.equal(leaf, flatten(start.params)[path])}
    assert moved == flatten(start.params).keys()
    assert means[-1] < means[0] - 1.0  # one batch with one key: it is learnt by heart
    assert torch.equal(ts.state["quantizer"]["codebooks"], start.state["quantizer"]["codebooks"])


def _gradients(cfg: Config, params: Any, state: Any, parts: Sequence[Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the mean over all parts, and that mean."""
    total, grads, masked = torch.zeros((), dtype=torch.float64), {}, 0
    for part in parts:
        paths = list(flatten(params))
        (value, (metrics, _)), one = value_and_grad(training_loss(cfg))(params, paths, state, part, KEY)
        grads = {path: one[path] + grads.get(path, 0) for path in paths}
        total, masked = total + value, masked + int(metrics["masked_tokens"])
    return {path: grad / masked for path, grad in grads.items()}, total / masked


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(corpus: Corpus, parts: int) -> None:
    mixing = ["data.augment.prob=1", "data.augment.noise_ratio=0.3"]  # mostly other speakers of the batch
    cfg = _config(corpus, "encoder.conv_norm_type=layer_norm", "preprocessor.dither=0.01", *mixing)
    ts = init_train_state(random.key(0), cfg)
    params = tree_map(torch.Tensor.double, ts.params)
    batch = _batch(cfg)
    whole, loss = _gradients(cfg, params, ts.state, [batch])
    cut, cut_loss = _gradients(cfg, params, ts.state, micro_batches(batch, parts))
    torch.testing.assert_close(cut_loss, loss, rtol=0, atol=1e-10)
    for path, grad in whole.items():
        torch.testing.assert_close(cut[path], grad, rtol=0, atol=1e-10)


def test_accumulating_is_one_update_with_the_whole_batch(corpus: Corpus) -> None:
    overrides = ["encoder.conv_norm_type=layer_norm", "optim.name=sgd", "optim.sched.name=constant", "optim.lr=0.1"]
    whole, one = _run(_config(corpus, *overrides))
    cut, two = _run(_config(corpus, *overrides, "trainer.accumulate=2"))
    for path, leaf in _leaves(whole).items():
        torch.testing.assert_close(_leaves(cut)[path], leaf, rtol=1e-4, atol=1e-5)
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("masked_tokens", "valid_tokens", "token_counts"))
        torch.testing.assert_close(b["grad_norm"], a["grad_norm"], rtol=1e-4, atol=0)


def test_draws_of_an_utterance_do_not_depend_on_its_neighbours(corpus: Corpus) -> None:
    cfg = _config(corpus, "data.augment.noise_ratio=1", "data.augment.prob=1")
    batch, ts = _batch(cfg), init_train_state(random.key(0), cfg)
    rows = batch["audio"].shape[0]
    loss = training_loss(cfg)
    _, (whole, _) = loss(ts.params, ts.state, batch, KEY)
    alone = []
    for row in reversed(range(rows)):
        one = {name: leaf[row : row + 1] for name, leaf in batch.items()} | {"row": torch.zeros(1, dtype=torch.int64)}
        alone.append(loss(ts.params, ts.state, one, KEY)[1][0])
    for name in ("masked_tokens", "token_counts", "masked_token_counts"):
        assert torch.equal(sum(one[name] for one in alone), whole[name])


def test_micro_batches_hold_every_row_once(corpus: Corpus) -> None:
    batch = _batch(_config(corpus))
    parts = micro_batches(batch, 3)
    assert len({part["audio"].shape for part in parts}) == 1
    rows = torch.cat([part["utterance"] for part in parts])
    assert rows[rows != 0].sort().values.equal(batch["utterance"][batch["utterance"] != 0].sort().values)
    assert micro_batches(batch, 1) == [batch]


def test_nothing_changes_when_a_gradient_is_not_finite(corpus: Corpus) -> None:
    cfg = _config(corpus)
    ts = init_train_state(random.key(0), cfg)
    ts.params["decoder"] = tree_map(lambda leaf: leaf * float("nan"), ts.params["decoder"])
    before = {path: leaf.clone() for path, leaf in _leaves(ts).items()}
    with pytest.raises(NonFiniteError, match="step 0: loss nan.*nothing was updated"):
        make_step(cfg, donate=True)(ts, [_batch(cfg)], KEY)
    for path, leaf in _leaves(ts).items():
        torch.testing.assert_close(leaf, before[path], rtol=0, atol=0, equal_nan=True)


def test_mean_of_parameters(corpus: Corpus) -> None:
    cfg = _config(corpus, "trainer.ema_decay=0.75")
    step, ts = make_step(cfg), init_train_state(random.key(0), cfg)
    wanted = flatten(ts.params)
    for number in range(3):
        ts, _ = step(ts, [_batch(cfg, number)], random.fold_in(KEY, number))
        wanted = {path: 0.75 * wanted[path] + 0.25 * leaf for path, leaf in flatten(ts.params).items()}
    for path, leaf in flatten(ts.ema).items():
        torch.testing.assert_close(leaf, wanted[path], rtol=1e-6, atol=1e-7)
    assert _same(_run(_config(corpus), 2)[0], _run(cfg, 2)[0]._replace(ema={}))


def test_clipping(corpus: Corpus) -> None:
    plain = ["optim.name=sgd", "optim.momentum=0", "optim.weight_decay=0", "optim.sched=null", "optim.lr=1"]
    start = flatten(init_train_state(random.key(0), _config(corpus)).params)

    def moved(*overrides: str) -> tuple[float, float]:
        ts, (metrics,) = _run(_config(corpus, *plain, *overrides), 1)
        leaves = [leaf - start[path] for path, leaf in flatten(ts.params).items()]
        return float(torch.cat([leaf.flatten() for leaf in leaves]).norm()), float(metrics["grad_norm"])

    far, norm = moved()
    assert far == pytest.approx(norm, rel=1e-4) and norm > 0.2
    assert moved("trainer.clip_norm=0.1") == pytest.approx((0.1, norm), rel=1e-3)
    assert moved("trainer.clip_norm=1e6") == pytest.approx((far, norm), rel=1e-5)


def test_half_precision_follows_full_precision(corpus: Corpus) -> None:
    full, (a, *_) = _run(_config(corpus, "encoder.dropout=0"), 2)
    half, (b, *_) = _run(_config(corpus, "encoder.dropout=0", "trainer.precision=bf16"), 2)
    assert all(leaf.dtype == flatten(full.params)[path].dtype for path, leaf in flatten(half.params).items())
    assert torch.equal(a["token_counts"], b["token_counts"])  # targets are never computed in half precision
    assert b["loss_sum"].dtype == torch.float32 and not torch.equal(a["loss_sum"], b["loss_sum"])
    torch.testing.assert_close(b["loss_sum"], a["loss_sum"], rtol=0.02, atol=0)
    torch.testing.assert_close(b["grad_norm"], a["grad_norm"], rtol=0.1, atol=0)


def test_a_detached_subsampling_is_neither_moved_nor_decayed(corpus: Corpus) -> None:
    overrides = ["mask_position=post_conv", "optim.weight_decay=0.5", "optim.sched=null", "optim.lr=0.01"]
    start = init_train_state(random.key(0), _config(corpus, *overrides))
    for detached in (True, False):
        ts, _ = _run(_config(corpus, *overrides, f"encoder.detach_subsampling={str(detached).lower()}"), 2)
        for path, leaf in flatten(ts.params).items():
            frozen = detached and path.startswith("encoder.subsampling.")
            assert torch.equal(leaf, flatten(start.params)[path]) == frozen, path


def test_rooms_are_heard_and_rate_is_the_schedules(corpus: Corpus) -> None:
    cfg = _config(corpus, "data.augment.rir_prob=1", "data.augment.prob=0")
    rirs = load_rirs(cfg.data)
    assert rirs is not None and rirs.shape == (2, 800) and float(rirs.abs().max()) <= 1
    _, (dry,) = _run(_config(corpus, "data.augment.prob=0"), 1)
    _, (wet,) = _run(cfg, 1, loss=training_loss(cfg, rirs))
    assert torch.equal(dry["token_counts"], wet["token_counts"]) and not torch.equal(dry["loss_sum"], wet["loss_sum"])
    assert float(dry["lr"]) == pytest.approx(0.05 * 32**-0.5 * 20**-1.5)


@pytest.mark.slow
def test_compiled_equals_eager(corpus: Corpus) -> None:
    cfg = _config(corpus, "encoder.n_layers=1", "data.augment.prob=0")  # test_augment.py compiles the mixing
    ts, batch = init_train_state(random.key(0), cfg), _batch(cfg)
    paths = list(flatten(ts.params))
    eager, compiled = training_loss(cfg), torch.compile(training_loss(cfg), backend="aot_eager", fullgraph=True)
    (a, (told, _)), grads = value_and_grad(eager)(ts.params, paths, ts.state, batch, KEY)
    (b, (same, _)), others = value_and_grad(compiled)(ts.params, paths, ts.state, batch, KEY)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=0)
    assert all(torch.equal(told[name], same[name]) for name in ("masked_tokens", "correct", "token_counts"))
    for path in paths:
        torch.testing.assert_close(others[path], grads[path], rtol=1e-3, atol=1e-4 * float(grads[path].abs().max()))

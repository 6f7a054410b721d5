"""``create_optimizer`` and ``create_scheduler``: a loop of torch objects makes the functional trainer's updates."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import yaml

from nest_fn import Config, ConfigError, create_optimizer, create_scheduler, key, loss
from nest_fn.layers import random
from nest_fn.layers.tree import fill, flatten
from nest_fn.train.keys import TRAIN
from nest_fn.train.step.optimizer import make_optimizer
from nest_fn.train.step.schedule import make_schedule
from nest_fn.train.step.step import make_step, start_from
from tests.train.facade.facade_cases import batch, config, equal, model, snapshot

RULES = {
    "adamw, noam": ["optim.name=adamw", "optim.lr=0.5", "optim.sched={name: noam, warmup_steps: 2, min_lr: 1e-6}"],
    "adam, cosine": ["optim.name=adam", "optim.lr=0.01", "optim.sched={name: cosine, warmup_steps: 1, max_steps: 9}"],
    "sgd, constant": ["optim.name=sgd", "optim.lr=0.1", "optim.weight_decay=0.01", "optim.sched=null"],
    "post_conv, no gradient": ["mask_position=post_conv", "encoder.detach_subsampling=true"],
}


def linear(width: int = 3) -> torch.nn.Module:
    return torch.nn.Linear(width, 1)


def torch_trace(made: Any, cfg: Any, batches: list[Any]) -> list[torch.Tensor]:
    """The loop of the original README."""
    optimizer = create_optimizer(made, cfg)
    scheduler = create_scheduler(optimizer, cfg)
    losses = []
    for one in batches:
        optimizer.zero_grad()
        value = made.training_step(one)
        value.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(value.detach())
    return losses


@pytest.mark.parametrize("name", RULES)
def test_three_steps_equal_the_functional_ones_bit_for_bit(name: str) -> None:
    """Same values, same keys, same kernels: losses, parameters and batch statistics."""
    made = model(*RULES[name], seed=3)
    cfg = made.cfg
    params, state = fill(made.params, snapshot(made.params)), fill(made.state, snapshot(made.state))
    batches = [batch(seed=n) for n in range(3)]
    losses = torch_trace(made, cfg, batches)

    optimizer, schedule = make_optimizer(cfg.optim), make_schedule(cfg)
    trained = [path for path in flatten(params) if "no gradient" not in name or ".subsampling." not in path]
    opt_state = optimizer.init({path: flatten(params)[path] for path in trained})
    root = random.fold_in(key(3), TRAIN)
    for step, one in enumerate(batches):
        flat = {path: leaf.detach() for path, leaf in flatten(params).items()}
        leaves = {path: flat[path].requires_grad_() for path in trained}
        model_key = random.split(random.fold_in(root, step), 2)[1]
        value, (_, state) = loss(fill(params, flat), state, one, cfg, key=model_key)
        grads = dict(zip(trained, torch.autograd.grad(value, list(leaves.values())), strict=True))
        detached = {path: leaf.detach() for path, leaf in leaves.items()}
        moved, opt_state = optimizer.update(detached, grads, opt_state, schedule(step))
        params = fill(params, flat | moved)
        assert torch.equal(losses[step], value.detach()), step
    assert equal(snapshot(made.params), snapshot(params))
    assert equal(snapshot(made.state), snapshot(state))


def raw(one: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The clean half of a batch as the trainer reads it from files."""
    audio = (one["audio"] * 2**15).round().to(torch.int16)
    audio = torch.where(torch.arange(audio.shape[1]) < one["audio_len"][:, None], audio, 0)
    rows = torch.arange(audio.shape[0])
    names = {"row": rows, "utterance": rows, "weight": torch.ones(audio.shape[0])}
    lengths = one["audio_len"]
    return {"audio": audio, "audio_len": lengths, "noise": torch.zeros_like(audio), "noise_len": lengths, **names}


def test_three_steps_equal_the_trainers_step_bit_for_bit() -> None:
    """``make_step`` divides gradients where autograd divides the loss: by a power of two both are exact.

    Everything is masked here, so that 4 x 16 tokens count.
    """
    cfg = Config.preset("tiny", ["masking.mask_prob=1", "data.augment.prob=0", "preprocessor.dither=1e-3"])
    made = type(model()).from_config(cfg, seed=3)
    ts = start_from(fill(made.params, snapshot(made.params)), fill(made.state, snapshot(made.state)), cfg)
    step, root = make_step(cfg), random.fold_in(key(3), TRAIN)
    batches, losses = [], []
    for n in range(3):
        one = raw({**batch(samples=128 * 160, seed=n), "audio_len": torch.full((4,), 128 * 160)})
        ts, metrics = step(ts, [one], random.fold_in(root, n))
        assert metrics["masked_tokens"] == 64
        losses.append(metrics["loss_sum"] / 64)
        audio = one["audio"].to(torch.float32) / 2**15
        batches.append((audio, one["audio_len"], None, None, audio, one["audio_len"]))
    assert torch.equal(torch.stack(torch_trace(made, cfg, batches)), torch.stack(losses))
    assert equal(snapshot(made.params), snapshot(ts.params))
    assert equal(snapshot(made.state), snapshot(ts.state))


TEXT = """
model:
  encoder: {d_model: 512}
  optim:
    name: %s
    lr: 1e-2
    betas: [0.9, 0.999]
    weight_decay: 1e-3
    sched: {name: CosineAnnealing, warmup_steps: 2, min_lr: 1e-6, max_steps: 20}
"""


@pytest.mark.parametrize(
    "name,kind", [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_a_raw_mapping_whole_or_its_part(name: str, kind: type[torch.optim.Optimizer]) -> None:
    """PyYAML reads ``1e-2`` as text."""
    whole = yaml.safe_load(TEXT % name)
    assert whole["model"]["optim"]["lr"] == "1e-2"
    for cfg in (whole, whole["model"], Config.from_dict(whole)):
        optimizer = create_optimizer(linear(), cfg)
        assert type(optimizer) is kind
        assert len(optimizer.param_groups) == 1  # biases and norms decay too, as in NEST
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.01, 0.001)
        if name == "sgd":
            assert group["momentum"] == 0.9
        else:
            assert (tuple(group["betas"]), group["eps"]) == ((0.9, 0.999), 1e-8)
        assert create_scheduler(optimizer, cfg) is not None
    with pytest.raises(ConfigError, match="must be one of adamw, adam, sgd"):
        create_optimizer(linear(), {"optim": {"name": "lamb"}})


@pytest.mark.parametrize("name", ["adamw, noam", "adam, cosine"])
def test_rates_are_exactly_the_schedules(name: str) -> None:
    cfg = config(*RULES[name])
    optimizer = create_optimizer(linear(), cfg)
    scheduler = create_scheduler(optimizer, cfg)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
    rates = []
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [make_schedule(cfg)(k) for k in range(12)]
    assert len(set(rates)) > 5


def test_rates_of_spec_6_4() -> None:
    optimizer = create_optimizer(linear(), Config())
    scheduler = create_scheduler(optimizer, Config())
    assert scheduler is not None
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(rates, [5.590170e-8, 5.590170e-8, 1.118034e-7, 1.677051e-7], rtol=1e-6, atol=0)


def test_num_training_steps_is_the_horizon() -> None:
    cfg = config("optim.lr=1e-3", "optim.sched={name: cosine, warmup_steps: 0, min_lr: 0.0, max_steps: 1000}")
    optimizer = create_optimizer(linear(), cfg)
    scheduler = create_scheduler(optimizer, cfg, 4)
    assert scheduler is not None
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(rates, [1e-3, 8.535534e-4, 5e-4, 1.464466e-4, 0.0, 0.0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("sched", ["null", "{name: constant}", "{name: none}"])
def test_no_scheduler_where_the_rate_is_constant(sched: str) -> None:
    cfg = config("optim.lr=0.1", f"optim.sched={sched}")
    assert create_scheduler(create_optimizer(linear(), cfg), cfg) is None


@pytest.mark.parametrize("name", ["NoamAnnealing", "noam", "noamannealing"])
def test_a_peak_under_min_lr_warns(name: str) -> None:
    """The original README's example: 1e-4 is Noam's factor there, and the rate ends at ``min_lr``."""
    sched = {"name": name, "d_model": 512, "warmup_steps": 3, "min_lr": "1e-6"}
    cfg = {"optim": {"lr": "1e-5", "sched": sched}}
    optimizer = create_optimizer(linear(), cfg)
    with pytest.warns(UserWarning, match="noam peaks at 2.55e-07, below min_lr 1e-06|noam peaks at 2.6e-07"):
        create_scheduler(optimizer, cfg)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_scheduler(optimizer, {"optim": {"lr": 5.0, "sched": sched}})


def test_groups_keep_their_ratio() -> None:
    cfg = config("optim.lr=0.01", "optim.sched={name: cosine, warmup_steps: 1, max_steps: 9}")
    slow, fast = linear(), linear()
    groups: list[Any] = [{"params": list(slow.parameters()), "lr": 0.001}, {"params": list(fast.parameters())}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scheduler = create_scheduler(optimizer, cfg)
    assert scheduler is not None
    for k in range(3):
        rate = make_schedule(cfg)(k)
        assert optimizer.param_groups[1]["lr"] == rate
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate / 10)
        optimizer.step()
        scheduler.step()


def test_a_run_goes_on_where_it_was() -> None:
    """With the step of the checkpoint, or with the scheduler's own state."""
    cfg = config(*RULES["adam, cosine"])
    one = linear()
    optimizer = create_optimizer(one, cfg)
    scheduler = create_scheduler(optimizer, cfg)
    assert scheduler is not None
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    saved, saved_schedule = copy.deepcopy(optimizer.state_dict()), scheduler.state_dict()
    wanted = make_schedule(cfg)
    fresh = create_optimizer(one, cfg)
    fresh.load_state_dict(saved)
    assert create_scheduler(fresh, cfg, step=5) is not None
    assert fresh.param_groups[0]["lr"] == wanted(5)
    late = create_optimizer(one, cfg)
    again = create_scheduler(late, cfg)
    assert again is not None
    again.load_state_dict(saved_schedule)
    late.step()
    again.step()
    assert late.param_groups[0]["lr"] == wanted(6)

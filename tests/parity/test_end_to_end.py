"""Whole training steps against the reference's float64 runs: log-probs, tokens, loss, gradients, statistics, AdamW."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from nest_fn import Config, forward, log_mel, loss
from nest_fn.interop import nemo
from nest_fn.layers.tree import fill, flatten
from nest_fn.train.step.optimizer import make_optimizer
from nest_fn.train.step.schedule import make_schedule
from tests.parity.rounding import EPS64, Leaves, beyond, sensitivity
from tests.parity.test_encoder import scale_of
from tests.reference_cases import Case, exact, exact_names

CASES = exact_names("e2e_")
TOLERANCE = 1e-12  # relative, see ``scale_of``
STEPS = 5
ZERO = "depthwise_conv.bias"  # before batch norm


class Setup(NamedTuple):
    """A stored run, ready to be computed."""

    case: Case
    cfg: Config
    params: Any
    state: Any
    batch: dict[str, torch.Tensor]

    def mask(self, step: int = 0) -> torch.Tensor:
        return self.case.tensors["in/masks"][step]


def setup(name: str) -> Setup:
    case = exact(name)
    settings = {key: value for key, value in case.config["model"].items() if key != "spec_augment"}
    cfg = Config.from_dict(settings)
    if cfg.mask_position == "post_conv":  # the reference never trains the subsampling there
        cfg = Config.from_dict(settings, overrides=["encoder.detach_subsampling=true"])
    params, state = nemo.from_state_dict(case.group("weights"), cfg)
    clean, length = case.tensors["in/audio"], case.tensors["in/length"]
    noisy = case.tensors.get("in/noisy_audio", clean)
    batch = {"audio": clean, "audio_len": length, "noisy_audio": noisy, "noisy_audio_len": length}
    return Setup(case, cfg, params, state, batch)


def gradients(params: Any, state: Any, batch: Any, cfg: Config, mask: torch.Tensor) -> tuple[torch.Tensor, Any, Any]:
    """Loss, gradients by path (None: has none), new state."""
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in flatten(params).items()}
    value, (_, state) = loss(fill(params, leaves), state, batch, cfg, mask=mask)
    grads = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return value.detach(), dict(zip(leaves, grads, strict=True)), state


def relative(ours: torch.Tensor, wanted: torch.Tensor, gradients: float = 0.0) -> float:
    assert ours.shape == wanted.shape and ours.dtype == wanted.dtype
    return float((ours - wanted).abs().max()) / scale_of(wanted, gradients)


def first_step(run: Setup) -> dict[str, float]:
    """Every stored tensor of the first step: its largest difference from ours, relative."""
    case, cfg, params, state, batch = run
    output, _ = forward(params, state, batch, cfg, train=True, mask=run.mask())
    value, grads, new_state = gradients(params, state, batch, cfg, run.mask())
    ours = nemo.rename({path: grad for path, grad in grads.items() if grad is not None}, cfg)
    wanted, statistics = case.group("grads"), nemo.rename(flatten(new_state), cfg)
    assert ours.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    return {
        "log_probs": relative(output.log_probs, case.tensors["out/log_probs"]),
        "loss": relative(value, case.tensors["out/loss"].reshape(value.shape)),
        "tokens": float((output.tokens != case.tensors["out/tokens"]).sum()),
        "lengths": float((output.encoded_len != case.tensors["out/encoded_len"]).sum()),
        **{f"grads/{key}": relative(ours[key], grad, largest) for key, grad in wanted.items()},
        **{f"after/{key}": relative(statistics[key], x) for key, x in case.group("after_forward1").items()},
    }


@pytest.mark.parametrize("name", CASES)
def test_first_step(name: str) -> None:
    assert {key: error for key, error in first_step(setup(name)).items() if error > TOLERANCE} == {}


class Trained(NamedTuple):
    """After five AdamW steps on the stored masks."""

    losses: torch.Tensor  # [5]
    params: Leaves  # and statistics, under the reference's names


def five_steps(run: Setup, params: Any, state: Any, batch: Any) -> Trained:
    optimizer, schedule = make_optimizer(run.cfg.optim), make_schedule(run.cfg)
    trained, losses = None, []
    for step in range(STEPS):
        value, grads, state = gradients(params, state, batch, run.cfg, run.mask(step))
        losses.append(value)
        # Parameters without gradient are neither moved nor decayed.
        leaves = {path: leaf for path, leaf in flatten(params).items() if grads[path] is not None}
        trained = optimizer.init(leaves) if trained is None else trained
        moved, trained = optimizer.update(leaves, {path: grads[path] for path in leaves}, trained, schedule(step))
        params = fill(params, flatten(params) | moved)
    return Trained(torch.stack(losses), nemo.rename(flatten(params) | flatten(state), run.cfg))


def after_five_steps(run: Setup) -> dict[str, float]:
    """Losses, relative; parameters and statistics, as shares of their bound."""
    case, cfg, params, state, batch = run
    assert case.config["steps"] == STEPS
    losses, after = five_steps(run, params, state, batch)
    found = {"losses": float(((losses / case.tensors["out/losses"].flatten()) - 1).abs().max()) / TOLERANCE}
    rates = [make_schedule(cfg)(step) for step in range(STEPS)]
    found["learning_rates"] = (
        float((torch.tensor(rates, dtype=torch.float64) - case.tensors["out/learning_rates"]).abs().max()) / 1e-15
    )
    grads = case.group("grads")
    noise = 64 * EPS64 * max(float(grad.abs().max()) for grad in grads.values())
    for key, wanted in case.group("after").items():
        follows_zero = key.endswith("running_mean") and key.replace("batch_norm.running_mean", ZERO) in case.zero
        if key in case.zero or follows_zero or not wanted.is_floating_point():
            continue  # Adam makes whole steps of the rounding in a gradient of zero, and the mean follows that bias
        # Adam divides by the gradient's own size: rounding of the gradient moves a parameter by rate x noise / size.
        size = grads[key].abs() if key in grads else torch.tensor(1.0)
        bound = TOLERANCE + sum(rates) * noise / (size + cfg.optim.eps)
        found[key] = float(((after[key] - wanted).abs() / bound).max())
    return found


@pytest.mark.parametrize("name", CASES)
def test_five_steps(name: str) -> None:
    run = setup(name)
    found = after_five_steps(run)
    assert len(found) > 70
    assert {key: share for key, share in found.items() if share > 1} == {}


@pytest.mark.parametrize("name", CASES)
def test_parameters_without_gradient_never_move(name: str) -> None:
    run = setup(name)
    after = five_steps(run, run.params, run.state, run.batch).params
    for key in run.case.config["parameters_without_gradient"]:
        if key in after:
            assert torch.equal(after[key], run.case.tensors[f"weights/{key}"])


def with_features(run: Setup) -> tuple[Leaves, Leaves]:
    """Inputs that round (noisy features, weights) and those that do not: clean features, so that targets stay."""
    case, cfg, _, _, batch = run
    clean, length = log_mel(batch["audio"], batch["audio_len"], cfg.preprocessor)
    noisy, _ = log_mel(batch["noisy_audio"], batch["noisy_audio_len"], cfg.preprocessor)
    given = {f"weights/{key}": x for key, x in case.group("weights").items()}
    return given | {"noisy_features": noisy.float().double()}, {
        "features": clean, "features_len": length, "noisy_features_len": length,
    }  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CASES if "post" not in name])  # targets follow the weights there
def test_first_step_in_float32(name: str) -> None:
    """No further from our float64 than rounding of the noisy features and the weights moves that."""
    run = setup(name)
    given, fixed = with_features(run)

    def ours(leaves: Leaves) -> Leaves:
        weights = {key.removeprefix("weights/"): x for key, x in leaves.items() if key.startswith("weights/")}
        params, state = nemo.from_state_dict(weights, run.cfg)
        noisy = leaves["noisy_features"]
        batch = {key: x.to(noisy.dtype) if x.is_floating_point() else x for key, x in fixed.items()}
        value, grads, _ = gradients(params, state, batch | {"noisy_features": noisy}, run.cfg, run.mask())
        return {"loss": value} | {f"grads/{path}": grad for path, grad in grads.items() if grad is not None}

    wanted, worst = sensitivity(ours, given)
    single = ours({key: x.float() if x.is_floating_point() else x for key, x in given.items()})
    assert single["loss"].dtype == torch.float32
    positions = int(run.case.tensors["out/log_probs"].shape[:2].numel())
    assert {key: share for key, share in beyond(single, wanted, worst, positions).items() if share > 1} == {}

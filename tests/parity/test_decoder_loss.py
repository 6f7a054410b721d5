"""Log-probabilities, loss and gradients against the reference's stored runs, for both forms of the loss.

The stored runs are float32: they, and our own float32, lie within what rounding does to our float64 (``rounding``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn.config.model import DecoderConfig, LossConfig
from nest_fn.decoder import log_probs
from nest_fn.losses import masked_cross_entropy, masked_token_loss, token_mask
from tests.parity.rounding import Leaves, beyond, sensitivity
from tests.reference_cases import Case, load, names

UNEQUAL = "decloss_targets_shorter"  # the reference pads the targets with class 0; here an error (Q45)
CASES = [name for name in names("decloss_") if name != UNEQUAL]


def parts(case: Case) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor, DecoderConfig]:
    """Params and encoder output as leaves, the token mask, the decoder's settings."""
    leaves = {"encoded": case.tensors["in/encoder_output"].transpose(1, 2)}
    leaves["weight"] = case.tensors["weights/decoder_layers.0.weight"][..., 0]
    if "weights/decoder_layers.0.bias" in case.tensors:
        leaves["bias"] = case.tensors["weights/decoder_layers.0.bias"]
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    mask = token_mask(case.tensors["in/mask"], LossConfig(**case.config["loss"]))
    return leaves, case.tensors["in/targets"], mask, DecoderConfig(**case.config["decoder"])


def split(leaves: dict[str, Any]) -> tuple[Any, torch.Tensor]:
    return {name: leaf for name, leaf in leaves.items() if name != "encoded"}, leaves["encoded"]


def loss_of(form: str, leaves: Any, targets: torch.Tensor, mask: torch.Tensor, cfg: DecoderConfig) -> torch.Tensor:
    params, encoded = split(leaves)
    if form == "reference":
        return masked_cross_entropy(log_probs(params, encoded, cfg), targets, mask)
    masked = masked_token_loss(params, encoded, targets, mask, cfg)
    return masked.loss_sum / masked.count.clamp(min=1)


def scores(leaves: Leaves, cfg: DecoderConfig) -> Leaves:
    return {"log_probs": log_probs(*split(leaves), cfg).detach()}


def loss_and_gradients(form: str, case: Case, leaves: Leaves) -> Leaves:
    _, targets, mask, cfg = parts(case)
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    loss = loss_of(form, leaves, targets, mask, cfg)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach()} | {f"grads/{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def stored(case: Case) -> Leaves:
    """The reference's loss and gradients; a loss of NaN, where nothing is masked, is 0 here (docs/parity.md)."""
    found = {"loss": torch.zeros(()) if case.config["loss_is_nan"] else case.tensors["out/loss"].reshape(())}
    found["grads/encoded"] = case.tensors["grads/@encoder_output"].transpose(1, 2)
    found["grads/weight"] = case.tensors["grads/decoder_layers.0.weight"][..., 0]
    if "grads/decoder_layers.0.bias" in case.tensors:
        found["grads/bias"] = case.tensors["grads/decoder_layers.0.bias"]
    return found


@pytest.mark.parametrize("name", [*CASES, UNEQUAL])
def test_log_probs(name: str) -> None:
    case = load(name)
    leaves, _, _, cfg = parts(case)
    wanted, worst = sensitivity(lambda given: scores(given, cfg), leaves)
    for found in ({"log_probs": case.tensors["out/log_probs"]}, scores(leaves, cfg)):
        assert beyond(found, wanted, worst)["log_probs"] <= 1


@pytest.mark.parametrize("form", ["reference", "fast"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name: str, form: str) -> None:
    case = load(name)
    leaves, *_ = parts(case)
    wanted, worst = sensitivity(lambda given: loss_and_gradients(form, case, given), leaves)
    for found in (stored(case), loss_and_gradients(form, case, leaves)):
        if case.config["loss_is_nan"]:
            assert all((value == 0).all() for value in (*found.values(), *wanted.values()))
        else:
            assert {key: share for key, share in beyond(found, wanted, worst).items() if share > 1} == {}


@pytest.mark.parametrize("form", ["reference", "fast"])
def test_unequal_lengths_are_an_error(form: str) -> None:
    leaves, targets, mask, cfg = parts(load(UNEQUAL))
    with pytest.raises(ValueError, match="equally long"):
        loss_of(form, leaves, targets, mask, cfg)


def test_threshold_is_strict() -> None:
    """Token t of the stored case has t mod 9 of its 8 frames masked."""
    case = load("decloss_threshold_edges")
    mask = token_mask(case.tensors["in/mask"], LossConfig(**case.config["loss"]))
    share = case.tensors["in/mask"].unflatten(-1, (-1, 8)).sum(-1)
    assert torch.equal(mask, share >= 7)
    assert torch.equal(token_mask(case.tensors["in/mask"], LossConfig(0.5, 8)), share > 4)

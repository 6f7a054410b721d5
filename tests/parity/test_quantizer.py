"""Tokens and code vectors against the reference's stored runs."""

from __future__ import annotations

import pytest
import torch

from nest_fn.config.model import QuantizerConfig
from nest_fn.quantizer import QuantizerState, code_vectors, quantize_features
from tests.parity.rounding import EPS32
from tests.reference_cases import Case, load, names

CASES = [name for name in names("quant_") if name != "quant_errors"]


def setup(case: Case, precision: str = "float64") -> tuple[QuantizerState, QuantizerConfig]:
    settings = {name: value for name, value in case.config["quantizer"].items() if name != "time_ahead"}
    state: QuantizerState = {
        "projection": {"weight": case.tensors["weights/proj.weight"]},
        "codebooks": case.tensors["weights/codebooks"].to(torch.float64),
    }
    return state, QuantizerConfig(**settings, precision=precision)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_tokens(name: str, precision: str) -> None:
    case = load(name)
    state, cfg = setup(case, precision)
    got, wanted = quantize_features(state, case.tensors["in/input_signal"], cfg), case.tensors["out/xid"]
    clear = case.tensors["out/margin"].reshape(wanted.shape) > least_margin(case)
    assert got.shape == wanted.shape and got.dtype == torch.int64 and clear.double().mean() > 0.5
    assert torch.equal(got[clear], wanted[clear])


def least_margin(case: Case) -> float:
    """By how much the best code must lead, so that rounding in float32 decides nothing.

    A projection sums n products, a distance d of them; n roundings add up to sqrt(n) of their size, which is that of
    the products: their norm over that of the sum is the worst factor by which cancellation magnifies it.
    """
    weight, features = case.tensors["weights/proj.weight"].double(), case.tensors["in/input_signal"].double()
    stacked = features.transpose(1, 2).reshape(-1, weight.shape[1])
    stacked = stacked[stacked.abs().sum(1) > 0]
    size = ((weight.abs() @ stacked.abs().T).norm(dim=0) / (weight @ stacked.T).norm(dim=0)).quantile(0.9)
    return float(EPS32 * (weight.shape[1] ** 0.5 * size + 8 * weight.shape[0] ** 0.5))


@pytest.mark.parametrize("name", [name for name in CASES if "_l2_" in name])
def test_padding_is_quantized_as_the_reference_rounds(name: str) -> None:
    case = load(name)
    state, cfg = setup(case)
    features, wanted = case.tensors["in/input_signal"], case.tensors["out/xid"]
    got = quantize_features(state, features, cfg)
    combine = cfg.combine_time_steps or 1
    padding = (features.unflatten(-1, (-1, combine)) == 0).all(-1).all(1)
    assert padding.any() and torch.equal(got[padding], wanted[padding])


@pytest.mark.parametrize("name", CASES)
def test_code_vectors(name: str) -> None:
    case = load(name)
    state, cfg = setup(case)
    tokens, wanted = case.tensors["out/xid"], case.tensors["out/xq"]
    got = code_vectors(state, tokens, cfg)
    assert got.shape == wanted.shape
    if cfg.num_books == 1:
        assert torch.equal(got, wanted.to(torch.float64))
        return
    for k in range(cfg.num_books or 0):  # the reference's axes are mixed up here (Q12): compare with the definition
        assert torch.equal(got[0, :, 3, k], state["codebooks"][k, tokens[0, 3, k]])

"""Features against the reference's float64 runs, and float32 against our own float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nest_fn.config.model import PreprocessorConfig
from nest_fn.frontend import frames, log_mel
from nest_fn.mel import make_tables
from tests.parity.rounding import EPS32, EPS64, features_bound
from tests.reference_cases import Case, exact, exact_names, load

CASES = exact_names("preproc_")
TOLERANCE = 1e-11  # of the largest value, above 1


def config_of(case: Case) -> PreprocessorConfig:
    settings = dict(case.config["preprocessor"])
    if settings["normalize"] == "NA":  # the reference's "none of these"
        settings["normalize"] = None
    return PreprocessorConfig(**settings)


def bound(case: Case, eps: float) -> torch.Tensor:
    """What rounding may do, as wide as the stored features."""
    found = features_bound(case.tensors["in/audio"], case.tensors["in/length"], config_of(case), eps)
    return F.pad(found, (0, case.tensors["out/features"].shape[2] - found.shape[2]))


@pytest.mark.parametrize("name", CASES)
def test_features(name: str) -> None:
    """1e-11; more only where float64 does not determine them better, as in a bin that holds nothing but rounding."""
    case = exact(name)
    cfg, wanted = config_of(case), case.tensors["out/features"]
    got, lengths = log_mel(case.tensors["in/audio"], case.tensors["in/length"], cfg)
    assert got.shape == wanted.shape and got.dtype == torch.float64
    assert torch.equal(lengths, case.tensors["out/length"])
    assert torch.equal(frames(case.tensors["in/length"], cfg), lengths)
    error, rounding = (got - wanted).abs(), bound(case, EPS64)
    assert (error <= torch.maximum(rounding, torch.tensor(TOLERANCE * max(1.0, float(wanted.abs().max()))))).all()
    assert (rounding <= TOLERANCE).double().mean() > 0.75  # the exception does not swallow the rule


@pytest.mark.parametrize("name", CASES)
def test_features_in_float32(name: str) -> None:
    case = exact(name)
    cfg, audio, length = config_of(case), case.tensors["in/audio"], case.tensors["in/length"]
    wanted, got = log_mel(audio, length, cfg)[0], log_mel(audio.float(), length, cfg)[0]
    assert got.dtype == torch.float32
    assert ((got.double() - wanted).abs() <= bound(case, EPS32)).all()


@pytest.mark.parametrize("name", CASES)
def test_the_bound_is_no_licence(name: str) -> None:
    """Another window, filter bank or pre-emphasis, each changed by little, leaves the float32 bound."""
    case = exact(name)
    cfg, audio, length = config_of(case), case.tensors["in/audio"], case.tensors["in/length"]
    tables = make_tables(cfg)
    changed = tables._replace(filters=tables.filters * torch.linspace(1, 1.02, tables.filters.shape[1]))
    wanted, got = log_mel(audio, length, cfg)[0], log_mel(audio, length, cfg, tables=changed)[0]
    assert ((got - wanted).abs() > bound(case, EPS32)).any()


@pytest.mark.parametrize("name", CASES)
def test_tables_are_bit_equal(name: str) -> None:
    case = load(name)
    tables = make_tables(config_of(case))
    assert torch.equal(tables.window, case.tensors["weights/featurizer.window"])
    assert torch.equal(tables.filters, case.tensors["weights/featurizer.fb"][0])


def test_garbage_after_the_length_does_not_matter() -> None:
    case = load("preproc_garbage_after_length")
    audio, length = case.tensors["in/audio"], case.tensors["in/length"]
    clean = torch.where(torch.arange(audio.shape[1]) < length[:, None], audio, 0.0)
    assert not torch.equal(clean, audio)
    cfg = config_of(case)
    assert torch.equal(log_mel(clean, length, cfg)[0], log_mel(audio, length, cfg)[0])

"""Features against the reference's stored runs."""

from __future__ import annotations

import pytest
import torch

from nest_fn.config.model import PreprocessorConfig
from nest_fn.frontend import frames, log_mel
from nest_fn.mel import make_tables
from tests.reference_cases import Case, load, names

CASES = names("preproc_")
NEAR_SILENT = 2  # rows 2, 6, ... hold one int16 step: normalisation magnifies float32 rounding there


def config_of(case: Case) -> PreprocessorConfig:
    settings = dict(case.config["preprocessor"])
    if settings["normalize"] == "NA":  # the reference's "none of these"
        settings["normalize"] = None
    return PreprocessorConfig(**settings)


@pytest.mark.parametrize("name", CASES)
def test_features(name: str) -> None:
    case = load(name)
    cfg = config_of(case)
    got, lengths = log_mel(case.tensors["in/audio"], case.tensors["in/length"], cfg)
    wanted = case.tensors["out/features"]
    assert got.shape == wanted.shape and got.dtype == torch.float32
    assert torch.equal(lengths, case.tensors["out/length"])
    assert torch.equal(frames(case.tensors["in/length"], cfg), lengths)
    scale = max(1.0, float(wanted.abs().max()))
    for row, error in enumerate((got - wanted).abs().amax((1, 2)).tolist()):
        assert error <= (0.03 if row % 4 == NEAR_SILENT else 5e-5 * scale), (row, error)
    assert (got - wanted).abs().mean() <= 1e-4


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

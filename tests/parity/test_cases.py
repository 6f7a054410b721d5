"""Which of the reference's cases run here, and whether the stored ones are what the reference made."""

from __future__ import annotations

import pytest
import torch

from tests.reference_cases import FOLDER, FOLDER64, SHARED, SHARED64, all_names, exact_names, load, names

KINDS = sorted(set(all_names().values()))
IN_FLOAT64 = ("preproc_", "encoder_", "e2e_")  # only inputs and weights of their float32 runs are stored


@pytest.mark.parametrize("kind", KINDS)
def test_cases_are_at_hand(kind: str) -> None:
    """Visible in the summary: how many cases of a kind are not stored here and so did not run."""
    wanted = [name for name, of in all_names().items() if of == kind]
    absent = sorted(set(wanted) - set(names("")))
    if absent:
        pytest.skip(
            f"{len(absent)} of {len(wanted)} {kind} cases are not stored in tests/reference: {', '.join(absent)}"
        )


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared set is not beside this repository")
def test_stored_cases_are_copies() -> None:
    for name in sorted(path.stem for path in FOLDER.glob("*.npz")):
        stored, whole = load(name, FOLDER), load(name, SHARED)
        assert stored.config == whole.config
        missing = [key for key in whole.tensors if key not in stored.tensors]
        if missing:
            assert name in exact_names(IN_FLOAT64[0]) + exact_names(IN_FLOAT64[1]) + exact_names(IN_FLOAT64[2])
            assert not [key for key in missing if key.startswith(("in/", "weights/"))]
        for key, value in stored.tensors.items():
            assert value.dtype == whole.tensors[key].dtype
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(whole.tensors[key])), (name, key)


@pytest.mark.skipif(not SHARED64.is_dir(), reason="the shared set is not beside this repository")
def test_stored_float64_runs_are_copies() -> None:
    stored = sorted(FOLDER64.glob("*.npz"))
    assert len(stored) > 25
    assert not [path.name for path in stored if path.read_bytes() != (SHARED64 / path.name).read_bytes()]


def test_every_case_in_float64_has_a_float64_run() -> None:
    for prefix in IN_FLOAT64:
        assert set(exact_names(prefix)) == {name for name in names(prefix) if not name.endswith("_errors")}


def test_the_folders_stay_small() -> None:
    assert sum(path.stat().st_size for folder in (FOLDER, FOLDER64) for path in folder.iterdir()) < 22_000_000

"""Which of the reference's cases run here, and whether the stored ones are what the reference made."""

from __future__ import annotations

import pytest
import torch

from tests.reference_cases import FOLDER, SHARED, all_names, load, names

KINDS = sorted(set(all_names().values()))
LEFT_OUT = "grads_eval/"  # of stored encoder cases; the gradients of training are there


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
        assert all(key.startswith(LEFT_OUT) for key in missing)
        for key, value in stored.tensors.items():
            assert value.dtype == whole.tensors[key].dtype
            assert torch.equal(torch.nan_to_num(value), torch.nan_to_num(whole.tensors[key])), (name, key)


def test_the_folder_stays_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 12_000_000

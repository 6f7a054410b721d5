"""Files of tensors are for whom the user's umask says, whichever package writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nest_fn.files.tensors import write_tensors


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_the_mode_is_that_of_any_new_file(umask: int, suffix: str, tmp_path: Path) -> None:
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / f"x{suffix}", {"a": torch.ones(3)})
    finally:
        os.umask(before)
    assert (tmp_path / f"x{suffix}").stat().st_mode & 0o777 == 0o666 & ~umask

"""Where a run may compute, and in which precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn.train.cli.main import main
from nest_fn.train.errors import UsageError
from nest_fn.train.run.device import check_precision
from tests.train.conftest import Corpus
from tests.train.run.test_pretrain import words

OLD = {"architecture": "x86_64", "cpu_name": "Old", "avx2": True, "avx512_bf16": False}


@pytest.mark.parametrize(
    "able, allowed",
    [
        (OLD, False),
        (OLD | {"avx512_bf16": True}, True),
        (OLD | {"amx_bf16": True}, True),
        ({"architecture": "aarch64"}, True),
        ({}, True),
    ],
)
def test_bfloat16_wants_its_instructions(able: dict[str, Any], allowed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    check_precision("fp32", torch.device("cpu"))
    check_precision("bf16", torch.device("cuda"))
    if allowed:
        check_precision("bf16", torch.device("cpu"))
    else:
        with pytest.raises(UsageError, match="bf16 on Old, which has no instructions"):
            check_precision("bf16", torch.device("cpu"))


def test_a_run_in_bfloat16_is_refused_before_it_begins(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: OLD)
    for extra in ([], ["--dry-run"]):
        assert main([*words(corpus, tmp_path / "run", "trainer.precision=bf16"), *extra]) == 2
        assert "set trainer.precision=fp32" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_frames_without_tokens_are_refused_before_a_run_begins(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra in ([], ["--dry-run"]):
        assert main([*words(corpus, tmp_path / "run", "encoder.causal_downsampling=true"), *extra]) == 2
        assert "makes an encoder frame more than there are tokens" in capsys.readouterr().err

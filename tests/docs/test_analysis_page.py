"""The code of docs/analysis.md runs as it stands, and prints what it promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "analysis.md"
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's own jvp


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    told = capsys.readouterr().out
    assert len(blocks) == 7
    assert 0 <= min(names["kept"].tolist()) <= 1 and len(names["layers"]) == 2
    for word in (
        "norm per masked token",
        "sharpness",
        "tokens that stay",
        "variance by cause",
        "on a trained curve",
        "CKA",
        "tr(HS)",
    ):
        assert word in told

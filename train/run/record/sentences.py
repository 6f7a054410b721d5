"""Lines of metrics as text for people; the command line prints them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sentence(line: Mapping[str, Any], total: int, eta: float | None) -> str:
    """A line of ``metrics.jsonl`` in words, with the seconds still to go."""
    if "valid" in line:
        found = line["valid"]
        return (
            f"step {line['step']}/{total}  validation: loss {found['loss']:.4f}  "
            f"accuracy {found['accuracy']:.4f} masked, {found['unmasked_accuracy']:.4f} unmasked "
            f"(always the commonest: {found['unigram_accuracy']:.4f})  "
            f"codes used {found['coverage']:.1%}, perplexity {found['perplexity']:.1f}"
        )
    text = (
        f"step {line['step']}/{total}  loss {line['loss']:.4f}  accuracy {line['accuracy']:.4f} "
        f"(commonest {line['unigram_accuracy']:.4f})  masked {line['masked_share']:.0%}  lr {line['lr']:.2e}  "
        f"grad {line['grad_norm']:.2f}  {line['time']['audio_seconds_per_second']:.0f} audio-s/s"
    )
    return text if eta is None else f"{text}  {clock(eta)} to go"


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def bar(step: int, total: int, width: int = 24) -> str:
    """``[########----------------]``."""
    filled = round(width * step / max(total, 1))
    return "[" + "#" * filled + "-" * (width - filled) + "]"

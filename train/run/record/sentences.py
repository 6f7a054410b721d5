"""Lines of metrics as text for people; the command line prints them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def sentence(line: Mapping[str, Any], total: int, eta: float | None) -> str:
    """A line of ``metrics.jsonl`` in words, with the seconds still to go."""
    if "of" in line or "of_seconds" in line:
        return _of_an_application(line, eta)
    if "cer" in line.get("valid", {}) or ("valid" not in line and "accuracy" not in line):
        return _of_a_recogniser(line, total, eta)
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


def _of_an_application(line: Mapping[str, Any], eta: float | None) -> str:
    """A trained model applied to audio: to many utterances, or to a long one."""
    if "of_seconds" in line:
        text = f"{line['seconds']:,} of {line['of_seconds']:,} s of a recording"
        return text if eta is None else f"{text}  {clock(eta)} to go"
    text = f"{line['utterances']:,} of {line['of']:,} utterances  {line['audio_seconds_per_second']:.0f} audio-s/s"
    return text if eta is None else f"{text}  {clock(eta)} to go"


def _of_a_recogniser(line: Mapping[str, Any], total: int, eta: float | None) -> str:
    """Fine-tuning: nats per token, and error rates of validation."""
    if "valid" in line:
        found = line["valid"]
        rates = f"{_loss(found)}CER {found['cer']:.4f}  WER {found['wer']:.4f}"
        return f"step {line['step']}/{total}  validation: {rates}"
    text = (
        f"step {line['step']}/{total}  {_loss(line)}lr {line['lr']:.2e}  grad {line['grad_norm']:.2f}  "
        f"{line['time']['audio_seconds_per_second']:.0f} audio-s/s"
    )
    return text if eta is None else f"{text}  {clock(eta)} to go"


def _loss(found: Mapping[str, Any]) -> str:
    return f"loss {found['loss']:.4f}  " if "loss" in found else "no text that can be aligned  "


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def bar(step: int, total: int, width: int = 24) -> str:
    """``[########----------------]``."""
    filled = round(width * step / max(total, 1))
    return "[" + "#" * filled + "-" * (width - filled) + "]"

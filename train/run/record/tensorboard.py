"""Curves for TensorBoard where the extra ``log`` is installed, nothing without it. Training never reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


class Board:
    """Scalars of the lines of ``metrics.jsonl``, as event files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._writer_type = _writer_type() if _utf8(folder) else None

    def add(self, line: Mapping[str, Any]) -> None:
        """One line. The first one hides what an interrupted run wrote from its step on."""
        if self._writer_type is None:
            return
        step = int(line["step"])
        if self._writer is None:
            self._writer = self._writer_type(str(self.folder), purge_step=step)
        for name, value in scalars(line):
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            with suppress(OSError):  # whatever could not be drawn is in metrics.jsonl
                self._writer.close()


def scalars(line: Mapping[str, Any], group: str = "train") -> Iterator[tuple[str, float]]:
    """Numbers of a line by curve: ``train/loss``, ``valid/accuracy``, ``time/seconds``."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from scalars(value, name)
        elif name != "step":
            yield f"{group}/{name}", float(value)


def _utf8(path: Path) -> bool:
    """Whether a name is text; TensorBoard writes to no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _writer_type() -> Any:
    """TensorBoard's writer, None where it is not installed or does not load; ``nest-fn doctor`` says which."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except Exception:  # a version for another protobuf raises TypeError
        return None
    return SummaryWriter

"""One utterance of a corpus in another form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Record(NamedTuple):
    """Where an utterance's audio is, and the keys of its line; ``duration`` may be missing."""

    where: str  # file and line or row, for messages
    path: str | None  # the audio's file, absolute or a URL; with ``content``, the name that the content had
    content: bytes | None  # the audio file itself, where the corpus holds it
    fields: Mapping[str, Any]


class LeftOut(NamedTuple):
    """An utterance that cannot be imported, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.where}: {self.why}"

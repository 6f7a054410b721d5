"""Access to fields that may be ``None`` in a section but must be set where they are used."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def required(value: T | None, name: str) -> T:
    """Return ``value``. Raises ``ValueError`` if it is ``None``, as fields may be in a section without a ``Config``."""
    if value is None:
        raise ValueError(f"config: {name} is None here; take the section from a resolved Config, or state it.")
    return value

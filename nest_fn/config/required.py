"""Fields that may be left open in a section and must be known where they are used."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def required(value: T | None, name: str) -> T:
    """``value``, or ``ValueError`` if it was left open: ``Config`` fills such fields, a lone section states them."""
    if value is None:
        raise ValueError(f"config: {name} is None here; take the section from a resolved Config, or state it.")
    return value

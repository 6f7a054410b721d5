"""The corpus of the trainer's tests."""

from tests.train.conftest import corpus

__all__ = ["corpus"]

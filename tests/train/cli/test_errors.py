"""Every error ends the command with its own code."""

from __future__ import annotations

import pickle

import pytest

from nest_fn.config.parse.problems import ConfigError
from nest_fn.train import errors


@pytest.mark.parametrize(
    "error, code",
    [
        (errors.UsageError("x"), 2),
        (ConfigError(["x"]), 2),
        (errors.DataError("x"), 3),
        (errors.CheckpointError("x"), 4),
        (errors.NonFiniteError("x"), 5),
        (errors.DistributedError("x"), 6),
        (errors.NestError("x"), 1),
        (ValueError("x"), 1),
        (KeyboardInterrupt(), 130),
        (SystemExit(7), 7),
        (SystemExit(None), 0),
        (SystemExit("text"), 1),
    ],
)
def test_exit_code(error: BaseException, code: int) -> None:
    assert errors.exit_code(error) == code


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(errors.DataError("a file")))
    assert type(error) is errors.DataError and str(error) == "a file"

"""Where the lines of ``metrics.jsonl`` are drawn as curves: ``trainer.loggers``. Training never reads them.

A logger is anything with ``add(line)`` and ``close()``; another one needs a class and an entry in ``open_loggers``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from nest_fn.config import Config
from nest_fn.extras import load_extra
from nest_fn.train.errors import UsageError
from nest_fn.train.reporter import Reporter

from .run_folder import RunFolder
from .tensorboard import Board
from .weights_and_biases import WandbRun


class Logger(Protocol):
    """Takes lines of metrics in the order of their steps; after a resumption steps may come again."""

    def add(self, line: Mapping[str, Any]) -> None:
        """One line, as in ``metrics.jsonl``. Raises nothing but ``OSError``, which costs this line alone."""

    def close(self) -> None:
        """Finish; nothing is added afterwards."""


class Loggers:
    """Several loggers as one."""

    def __init__(self, loggers: Iterable[Logger]) -> None:
        self._loggers = tuple(loggers)

    def add(self, line: Mapping[str, Any]) -> None:
        """Give the line to all of them. Raises the first ``OSError``, after all had the line."""
        failed: OSError | None = None
        for logger in self._loggers:
            try:
                logger.add(line)
            except OSError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Close all of them."""
        for logger in self._loggers:
            logger.close()


def open_loggers(cfg: Config, folder: RunFolder, reporter: Reporter) -> Loggers:
    """The loggers that ``trainer.loggers`` names; they begin with the first line, so that only rank 0 writes.

    TensorBoard is left out where it is not installed, since it is the default. Raises ``UsageError`` if another one's
    package is missing.
    """
    made: list[Logger] = []
    for name in dict.fromkeys(cfg.trainer.loggers):
        if name == "tensorboard":
            made.append(Board(folder.path / "tensorboard"))
            continue
        try:
            package = load_extra("wandb")
        except ImportError as error:
            raise UsageError(f"trainer.loggers={name}: {error}, or leave it out") from error
        made.append(WandbRun(package, folder.path, cfg.to_dict(), reporter))
    return Loggers(made)

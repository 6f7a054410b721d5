"""Curves for Weights & Biases (extra ``wandb``), asked for by ``trainer.loggers=wandb``.

Its own environment variables say where they go: ``WANDB_PROJECT``, ``WANDB_ENTITY``, ``WANDB_MODE=offline`` and so on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nest_fn.train.reporter import Reporter

from .tensorboard import scalars

ID = "wandb_id.txt"  # in the run folder: which of its runs a resumption goes on with


class WandbRun:
    """Scalars of the lines of metrics in one run of Weights & Biases, which a resumed run goes on with.

    What its package raises is told once and ends the curves, never the training.
    """

    def __init__(self, package: Any, folder: Path, settings: Mapping[str, Any], reporter: Reporter) -> None:
        self._package, self._folder, self._settings, self._reporter = package, folder, settings, reporter
        self._run: Any = None
        self._failed = False

    def add(self, line: Mapping[str, Any]) -> None:
        """One line. The first one begins the run, or goes on with it."""
        if self._failed:
            return
        try:
            if self._run is None:
                self._run = self._begin()
            self._run.log({"step": int(line["step"]), **dict(scalars(line))})
        except Exception as error:  # no network, no key, a full disk: its errors have no common base class
            self._failed = True
            reason = (str(error).splitlines() or [""])[0][:200]
            self._reporter.warn(
                f"Weights & Biases gets no more curves ({type(error).__name__}: {reason}); metrics.jsonl has them all"
            )

    def close(self) -> None:
        """Send what is left and finish the run."""
        if self._run is not None:
            with suppress(Exception):  # whatever could not be sent is in metrics.jsonl
                self._run.finish()

    def _begin(self) -> Any:
        kept = self._folder / ID
        run = self._package.init(
            dir=str(self._folder), config=dict(self._settings), id=kept.read_text().strip() if kept.exists() else None,
            name=None if "WANDB_NAME" in os.environ else self._folder.resolve().name, resume="allow",
            settings=self._package.Settings(silent=True, console="off"),
        )  # fmt: skip
        kept.write_text(f"{run.id}\n")
        # Curves over our steps: the package's own counter cannot go back to the checkpoint that a run resumes from.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        self._reporter.say(f"Weights & Biases: {run.url or run.dir}")
        return run

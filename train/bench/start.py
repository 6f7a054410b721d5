"""Seconds to the first step: of the command line, and of a compiled step with an empty and a filled cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nest_fn.train.data.synth.corpus import CorpusSpec, write_corpus
from nest_fn.train.errors import UsageError

from .sides import Machine, closing, ours
from .workload import Case, Shape

_SMALL = CorpusSpec(
    train_minutes=1.0, valid_minutes=0.2, noise_minutes=0.2, probe_train_minutes=0.2, probe_test_minutes=0.2
)
_POLL = 0.02  # seconds
_LIMIT = 600.0  # seconds
MIXED = tuple(Shape(rows, seconds) for rows, seconds in ((16, 2.0), (8, 4.0), (4, 8.0), (2, 16.0), (5, 6.5), (3, 11.0)))
"""Batches of an epoch with buckets of lengths, of about 32 seconds each."""


def first_step_of_pretrain(preset: str, machine: Machine) -> float:
    """Wall-clock seconds from the start of ``nest-fn pretrain`` to its first line of metrics, on a made-up corpus.

    Raises ``UsageError`` with its last words if it ends without one.
    """
    with tempfile.TemporaryDirectory(prefix="nest_fn_bench_") as home:
        manifests = write_corpus(Path(home) / "corpus", _SMALL)
        words = [
            "pretrain", "-c", preset, f"data.train={manifests['train']}", "trainer.max_steps=1", "trainer.log_every=1",
            f"trainer.device={machine.device}", "--folder", f"{home}/run",
        ]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(machine.threads)}
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "nest_fn.train", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        metrics = Path(home) / "run" / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            if time.monotonic() - begun > _LIMIT:
                break
            time.sleep(_POLL)
        taken = time.monotonic() - begun
        made = metrics.exists() and metrics.stat().st_size > 0
        process.kill()
        _, said = process.communicate()
        if not made:
            last = said.strip().splitlines()[-1:] or ["no word"]
            raise UsageError(f"bench: pretrain made no step in {taken:.0f} s: {last[0][:400]}")
    return taken


def compilation(preset: str, machine: Machine) -> dict[str, Any]:
    """Seconds to the first compiled step, cold and warm; graphs compiled for one shape and for a mixed epoch."""
    case = Case(preset, MIXED[0])
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="nest_fn_bench_") as cache:
        for name in ("cold", "warm"):
            with closing({"it": ours(case, machine, compiled=True, cache=cache)}) as sides:
                first = sides["it"].steps(case.shape, 1)
                found[name] = first["first_wall"]
                if name == "warm":
                    mixed = [sides["it"].steps(shape, 1) for shape in MIXED]
                    found |= {"graphs": first["graphs"], "graphs_of_a_mixed_epoch": mixed[-1]["graphs"]}
    return found


def told(found: dict[str, Any]) -> Iterator[str]:
    """Lines of a report."""
    yield f"first step of the command line after {found['command_line']:.1f} s"
    if "compiled" in found:
        of = found["compiled"]
        yield (
            f"first compiled step after {of['cold']:.0f} s with an empty cache, {of['warm']:.0f} s with a filled one; "
            f"{of['graphs']} graphs, {of['graphs_of_a_mixed_epoch']} over batches of {len(MIXED)} shapes"
        )

"""``make bench``, ``nest-fn bench``: one report, as lines and as JSON.

Sections are measured one after another; within one, what is compared is measured in turns. On a CPU seconds are those
of all threads of a process, on a GPU the clock's. Only ratios mean anything on another machine: to the rates of the
matrix product and of the copy, which are measured in the same run, or of one side to another.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nest_fn.errors import OutputError
from nest_fn.files.outputs import claim, written
from nest_fn.train.run.device import keep_freed_memory
from nest_fn.train.run.record.run_folder import environment
from nest_fn.version import versions

from . import laws, sides, start
from .loader import end_to_end_told, files_beside_tensors, loader_rates
from .parts import functional_call_cost, step_parts
from .rates import copy_rate, gemm_rate
from .sides import Machine
from .workload import Case, Shape

CASES = (
    Case("nest_small", Shape(4, 10.0)),
    Case("nest_small", Shape(1, 60.0)),
    Case("nest_large", Shape(2, 10.0)),
)  # of a CPU
GPU_CASES = tuple(Case(preset, Shape(60, 20.0), ("trainer.precision=bf16",)) for preset in ("nest_small", "nest_large"))
Figures = dict[str, Any]
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Options(NamedTuple):
    """What to measure, where, and how often."""

    sections: Sequence[str] = ("step", "parts", "loader")
    cases: Sequence[Case] = CASES
    machine: Machine = Machine()
    rounds: int = 5
    compiled: bool = False
    peer_python: str | None = None


def run_benchmark(out: Path, options: Options, *, overwrite: bool = False) -> Iterator[str]:
    """Measure, report line by line, and write ``out`` as JSON. Raises ``OutputError`` if it holds figures already."""
    place = claim(out, {"command": "bench", **versions()}, folder=False, overwrite=overwrite)
    if place.begun:
        raise OutputError(f"{out}: holds the figures of an earlier run; give --out another name, or --overwrite it.")
    torch.set_num_threads(options.machine.threads)
    keep_freed_memory()
    device = torch.device(options.machine.device)
    wanted = {"fp32"} | {case.config().trainer.precision for case in options.cases}
    gemm = {name: gemm_rate(device, dtype) for name, dtype in _PRECISIONS.items() if name in wanted}
    figures: Figures = {
        "environment": environment(), "machine": options.machine._asdict(), "rounds": options.rounds,
        "load_before": os.getloadavg(), "gemm_flops_a_second": gemm,
        "copy_bytes_a_second": copy_rate(device),
    }  # fmt: skip
    yield f"{options.machine.device}, {options.machine.threads} threads, load {figures['load_before'][0]:.1f}"
    for name, rate in gemm.items():
        yield f"matrix product, {name}: {rate / 1e9:,.0f} GFLOP/s"
    yield f"copy: {figures['copy_bytes_a_second'] / 1e9:,.0f} GB/s read and written"
    for name in options.sections:
        yield from SECTIONS[name](options, figures)
    with written(place) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
    yield f"written to {out}"


def _steps(options: Options, figures: Figures) -> Iterator[str]:
    for case in options.cases:
        found = sides.compare(
            case, options.machine, options.rounds, compiled=options.compiled, peer_python=options.peer_python
        )
        cfg = case.config()
        flops, gemm = laws.step_flops(cfg, case.shape), figures["gemm_flops_a_second"][cfg.trainer.precision]
        figures.setdefault("step", {})[str(case)] = {"flops": flops, "sides": found}
        yield from sides.told(case, found, flops, gemm)


def _parts(options: Options, figures: Figures) -> Iterator[str]:
    case = options.cases[0]
    found = step_parts(case.config(), case.shape, torch.device(options.machine.device), options.rounds)
    figures["parts"] = {str(case): found}
    yield f"parts of an eager step, {case}; some hold others"
    whole = found["whole step"][0]
    for name, (least, median) in found.items():
        yield f"  {name:<28}{least * 1e3:9.1f} ms  (median {median * 1e3:.1f}) {least / whole:7.1%}"
    figures["functional_call_microseconds"] = functional_call_cost()
    yield f"  functional_call costs {figures['functional_call_microseconds']:.0f} us a leaf in eager mode"


def _start(options: Options, figures: Figures) -> Iterator[str]:
    preset = options.cases[0].preset
    found: Figures = {"command_line": start.first_step_of_pretrain(preset, options.machine)}
    if options.compiled:
        found["compiled"] = start.compilation(preset, options.machine)
    figures["start"] = {preset: found}
    yield from start.told(found)


def _loader(options: Options, figures: Figures) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="nest_fn_bench_") as folder:
        figures["loader"] = loader_rates(Path(folder), repeats=options.rounds)
    for name, rate in figures["loader"].items():
        kind, _, noise = name.partition("_")
        yield f"loader, {kind.upper()}, {'noise on' if noise else 'no noise'}: {rate:,.0f} audio-s a core-s"


def _end_to_end(options: Options, figures: Figures) -> Iterator[str]:
    figures["end_to_end"] = files_beside_tensors(options.cases[0].preset, options.machine, options.rounds)
    yield from end_to_end_told(figures["end_to_end"])


def _laws(options: Options, figures: Figures) -> Iterator[str]:
    for law in laws.laws():
        figures.setdefault("laws", {})[law.name] = found = laws.measure(law, options.machine, options.rounds)
        yield from laws.told(law, found)


SECTIONS: dict[str, Callable[[Options, Figures], Iterator[str]]] = {
    "step": _steps, "parts": _parts, "start": _start, "loader": _loader, "end-to-end": _end_to_end, "laws": _laws,
}  # fmt: skip

"""From generated kernels to machine code: Triton and ptxas, which ship with PyTorch, for every configuration."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import multiprocessing.connection
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.triton_compat import OutOfResources, PTXASError, triton_key

from nest_fn.layers.mixer import _GAMMA, _M1, _M2

from .generate import Kernel
from .pretend import PROPERTIES, TARGET

KERNEL_LIMIT = 300.0  # seconds for one kernel


class Told(NamedTuple):
    """What became of one configuration of a kernel."""

    configuration: str
    error: str | None = None
    left_out: bool = False  # it needs more than a device has, which only matters if none is left


@dataclass
class Made:
    """A kernel, its configurations, and what the compilers said."""

    kernel: Kernel
    told: list[Told]
    said: str

    @property
    def refusal(self) -> str | None:
        """Why no device could run it, with the project's lines; None if it compiles.

        A configuration that needs too much is left out on a device too; any other error ends the kernel there.
        """
        wrong = [one for one in self.told if one.error is not None]
        if all(one.left_out for one in wrong) and len(wrong) < len(self.told):
            return None
        errors = re.findall(r"\.py:\d+:\d+: (error: (?!Failures have).*)", self.said)[:2] or [str(wrong[0].error)[:300]]
        places = ", ".join(f"{place} ({n})" for place, n in self.kernel.places.most_common(12))
        return (
            f"kernel {self.kernel.name[:70]}, {self.kernel.graph}, {self.kernel.rows} rows: {len(wrong)} of "
            f"{len(self.told)} configurations: {'; '.join(errors)}\n    from {places or 'no line of the project'}"
        )


def different(kernels: list[Kernel]) -> list[Kernel]:
    """One of each, by source."""
    return list({kernel.source.replace(kernel.name, "kernel"): kernel for kernel in kernels}.values())


def compile_kernels(kernels: list[Kernel], folder: Path, jobs: int) -> list[Made]:
    """Every kernel in a process of its own, ``jobs`` at a time."""
    triton_key()
    triton.compiler.make_backend(TARGET).hash()  # once, before processes part
    fork, waiting, done = multiprocessing.get_context("fork"), list(enumerate(kernels)), []
    running: dict[Any, tuple[Kernel, Path, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            number, kernel = waiting.pop(0)
            log, (receiver, sender) = folder / f"log{number}", fork.Pipe(duplex=False)
            process = fork.Process(target=_compile, args=(kernel, log, sender))
            process.start()
            sender.close()
            running[receiver] = (kernel, log, process, time.monotonic())
        ready = multiprocessing.connection.wait(list(running), timeout=5)
        late = [one for one, entry in running.items() if time.monotonic() - entry[3] > KERNEL_LIMIT]
        for receiver in {*ready, *late}:
            done.append(_ended(receiver, *running.pop(receiver)[:3]))
    return done


def compile_own() -> list[str]:
    """The kernels that the project itself has written: what refuses them, if anything does."""
    return _of_mixer() + _of_subsampling() + _of_attention()


def _of_mixer() -> list[str]:
    from nest_fn.layers import mixer_triton

    mixer = {"keys": "*i64", "out": "*i32", "bound": "i32", "n": "i32", "blocks": "i32"}
    constants = {"GAMMA": _GAMMA, "M1": _M1, "M2": _M2, "BLOCK": mixer_triton.BLOCK}
    refused = _refusal(mixer_triton.lanes_above_kernel, mixer, constants)
    return refused + _refusal(mixer_triton.packed_kernel, mixer, {**constants, "BLOCK": mixer_triton.BLOCK // 8})


def _of_subsampling() -> list[str]:
    from nest_fn.layers import subsampling_triton

    refused = []
    tile: dict[str, Any] = {name: getattr(subsampling_triton, name) for name in ("POSITIONS", "CHANNELS", "TAPS")}
    sizes = dict.fromkeys(("count", "frames", "bins", "once", "wide", "narrow", "channels", "pad"), "i32")
    for kind in ("*bf16", "*fp32"):
        given = {"x": kind, "lengths": "*i64", "first": kind, "second": kind}
        tile["PRECISION"] = "tf32" if kind == "*bf16" else "ieee"
        refused += _refusal(subsampling_triton.forward_kernel, {**given, "y": kind, **sizes}, tile)
        whole = {"grad": kind, **given, "partial": "*fp32", **sizes}
        refused += _refusal(subsampling_triton.backward_kernel, whole, tile)
    return refused


def _of_attention() -> list[str]:
    """For heads of NEST-Large, NEST-Small and NEST-XLarge, with dropout and without."""
    from nest_fn.layers import attention_triton, attention_triton_backward

    kernels = [getattr(attention_triton_backward, f"{name}_kernel") for name in ("query", "key", "position")]
    fixed = {"valid": "*i1", "kept": "*i32", **dict.fromkeys(attention_triton.SIZES, "i32")}
    fixed |= dict.fromkeys(("scale", "masked", "raised", "root"), "fp32")
    fixed |= dict.fromkeys(("norm", "shared", "shared_out", "to_biases", "partial"), "*fp32")
    refused = []
    for width, kind, drops in ((64, torch.bfloat16, True), (44, torch.float16, False), (128, torch.bfloat16, True)):
        constants = attention_triton.settings(torch.empty(0, dtype=kind), width, None) | {"DROPS": drops}
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        for kernel in (attention_triton.forward_kernel, *kernels):
            names = [name for name in kernel.arg_names if name not in constants]
            types = {name: fixed.get(name, f"*{constants['KIND']}") for name in names}
            even = [name for name in names if types[name].startswith("*")]
            refused += _refusal(kernel, types, constants, even, **options)
    return refused


def _refusal(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], even: Sequence[str] = (), **options: int
) -> list[str]:
    """``even``: arguments that are known to be multiples of 16, as those of a launch are seen to be."""
    names, signature = kernel.arg_names, {**types, **dict.fromkeys(constants, "constexpr")}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = triton.compiler.ASTSource(kernel, {n: signature[n] for n in names}, constants, attributes)
    try:
        made = triton.compile(source, target=TARGET, options=options)
    except Exception as error:
        return [f"kernel {kernel.__name__}, {types}: {type(error).__name__}: {str(error)[:2000]}"]
    most = PROPERTIES["shared_memory_per_block_optin"]
    if made.metadata.shared > most:
        return [f"kernel {kernel.__name__}, {types}: {made.metadata.shared} bytes of shared memory, at most {most}"]
    return []


def _ended(receiver: Any, kernel: Kernel, log: Path, process: Any) -> Made:
    told: list[Told] = []
    if receiver.poll():
        with contextlib.suppress(EOFError):
            told = receiver.recv()
    else:
        process.kill()
        told = [Told("?", f"no answer in {KERNEL_LIMIT:g} s")]
    process.join()
    said = log.read_text(errors="replace") if log.exists() else ""
    return Made(kernel, told or [Told("?", f"the compiler ended with {process.exitcode}")], said)


def _compile(kernel: Kernel, log: Path, pipe: Any) -> None:
    """All configurations; sends ``list[Told]``. Its words go to ``log``."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    triton.knobs.nvidia.dump_ptxas_log = True
    tuner = getattr(PyCodeCache.load(kernel.source), kernel.name)
    told: list[Told] = []
    precompile, tuner._make_launchers = tuner._precompile_config, lambda: None

    def compile_one(configuration: Any) -> Any:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                result = precompile(configuration)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            told.append(Told(str(configuration), text, isinstance(error, OutOfResources | PTXASError)))
            raise
        told.append(Told(str(configuration)))
        with contextlib.suppress(AttributeError):
            used = map(int, re.findall(r"Used (\d+) registers", said.getvalue()))
            result.kernel.n_regs = max(used, default=0)
        return result

    tuner._precompile_config, tuner.compile_results = compile_one, []
    for configuration in tuner.configs:
        with contextlib.suppress(Exception):
            tuner.compile_results.append(compile_one(configuration))
    with contextlib.suppress(Exception):
        tuner._dynamic_scale_rblock()  # smaller blocks where registers run out
    pipe.send(told)
    pipe.close()

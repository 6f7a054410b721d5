"""The kernels of a training step, as Inductor writes them for a pretended H100: forward and backward of every part."""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.exc
import torch._inductor.compile_fx as compile_fx
import torch._inductor.exc
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codegen.triton import TritonScheduling
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import Layout
from torch._inductor.scheduler import NopKernelSchedulerNode
from torch._inductor.virtualized import V

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.train.step.compiled import compile_parts
from nest_fn.train.step.step import init_train_state, training_loss, value_and_grad

from .pretend import CUDA, MODE

_ROOT = str(Path(__file__).resolve().parents[2]) + os.sep


@dataclass
class Kernel:
    """One generated kernel, and the lines of the project that its operations come from."""

    name: str
    source: str
    graph: str
    rows: int
    places: Counter[str] = field(default_factory=Counter)

    def run(self, *_: Any, **__: Any) -> None:
        """Never."""
        raise RuntimeError("no device")


@dataclass
class Traffic:
    """What the kernels and calls of a graph read and write, by Inductor's count: each buffer once a kernel or call."""

    read: int = 0  # bytes
    written: int = 0
    kernels: int = 0
    calls: int = 0  # to cuBLAS, cuDNN, cuFFT
    times: int = 0  # that a step runs the graph
    largest: list[tuple[int, int, str]] = field(default_factory=list)  # read, written, what it makes and from where


class Collector:
    """Takes kernels and traffic as Inductor makes them, and graphs that it refuses."""

    def __init__(self, parts: tuple[str, ...] = ()) -> None:
        self.parts = parts  # names of ``compile_parts``; empty: all
        self.kernels: list[Kernel] = []
        self.traffic: dict[str, Traffic] = {}
        self.refused: list[str] = []
        self.graph, self.rows = "none", 0
        self._places: dict[str, Counter[str]] = {}
        define, made = TritonScheduling.define_kernel, GraphLowering._compile_to_module

        def defined(scheduling: Any, source: str, nodes: Any, kernel: Any) -> Any:
            name = define(scheduling, source, nodes, kernel)
            found = self._places.setdefault(name, Counter())
            for node in nodes:
                origins = node.node.get_origins() if getattr(node, "node", None) is not None else ()
                found.update(filter(None, map(_place, origins)))
            return name

        def counted(lowering: Any) -> Any:
            module = made(lowering)
            with V.set_graph_handler(lowering):
                self._count(lowering.scheduler.nodes)
            return module

        TritonScheduling.define_kernel, GraphLowering._compile_to_module = defined, counted
        AsyncCompile.triton = lambda _, name, source, device_str="cuda": self._take(name, source)

    def _take(self, name: str, source: str) -> Kernel:
        self.kernels.append(Kernel(name, source, self.graph, self.rows, self._places.pop(name, Counter())))
        return self.kernels[-1]

    def _count(self, nodes: Any) -> None:
        tally = self.traffic.setdefault(self.graph, Traffic())
        for node in nodes:
            if isinstance(node, NopKernelSchedulerNode) or (node.is_extern() and not node.get_write_buffer_sizes()):
                continue  # nothing happens: a call that writes nothing makes a view, as view_as_real
            tally.read += int(node.get_read_buffer_sizes())
            tally.written += int(node.get_write_buffer_sizes())
            tally.calls += node.is_extern()
            tally.kernels += not node.is_extern()
            self._list(tally, node)

    def _list(self, tally: Traffic, node: Any) -> None:
        """Note a kernel's bytes, what it writes, and the project's lines that it comes from."""
        parts = node.get_nodes() if hasattr(node, "get_nodes") else [node]
        places = Counter(
            place
            for part in parts
            if getattr(part, "node", None) is not None
            for place in filter(None, map(_place, part.node.get_origins()))
        )
        made = [
            f"{str(buffer.node.get_dtype()).removeprefix('torch.')}{list(map(int, buffer.node.get_size()))}"
            for buffer in node.get_outputs()
            if isinstance(buffer.node.layout, Layout)
        ]
        lines = ", ".join(place for place, _ in places.most_common(4)) or "no line of the project"
        name = "call" if node.is_extern() else "kernel"
        amount = (int(node.get_read_buffer_sizes()), int(node.get_write_buffer_sizes()))
        tally.largest.append((*amount, f"{name} {' '.join(made)} from {lines}"))

    def refuse(self, graph: str, error: Exception) -> None:
        """Note a graph of which no code could be made."""
        lines = [line[:200] for line in str(error).splitlines() if line.strip()]
        said = "\n    ".join(lines[:6])
        self.refused.append(f"graph {graph}, {self.rows} rows: {type(error).__name__}: {said}")

    def _backend_if_wanted(self, part: str) -> str | Callable[..., Any]:
        return "eager" if self.parts and part not in self.parts else self.backend(part)

    def backend(self, part: str) -> Callable[..., Any]:
        """Inductor, whose code is written but never run: the graph is interpreted with fake tensors instead."""

        def inner(graph: Any, inputs: Any, **settings: Any) -> Any:
            name = self.graph = f"{part}, {'backward' if settings.get('is_backward') else 'forward'}"
            played = copy.deepcopy(graph)
            compiled = compile_fx.compile_fx_inner(graph, inputs, **settings)

            def play(given: Any) -> Any:
                self.traffic.setdefault(name, Traffic()).times += 1
                values = list(given)
                if isinstance(given, list):
                    given.clear()
                made = torch.fx.Interpreter(played).run(*values)
                return list(made) if isinstance(made, list | tuple) else [made]

            compiled.current_callable = play
            return compiled

        def compile(graph: Any, inputs: Any) -> Any:
            whole = copy.deepcopy(graph)
            try:
                return compile_fx.compile_fx(graph, inputs, inner_compile=inner)
            except Exception as error:
                self.refuse(f"{part}, forward", error)
                return whole.forward

        return compile

    def generate(self, cfg: Config, rows: int, seconds: float) -> None:
        """Loss and gradients of one batch of ``rows`` times ``seconds`` on fake tensors, each part compiled anew."""
        torch._dynamo.reset()
        self.rows = rows
        with MODE:
            root = random.key(0, device=CUDA)
            ts = init_train_state(random.fold_in(root, 0), cfg)
            loss = training_loss(cfg, parts=compile_parts(self._backend_if_wanted))
            paths = list(flatten(ts.params))
            try:
                value_and_grad(loss)(ts.params, paths, ts.state, _batch(rows, seconds), random.fold_in(root, 1))
            except Exception as error:
                ours = (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError)
                self.refuse(f"{self.graph}, or the next" if isinstance(error, ours) else "none, outside of them", error)


def _batch(rows: int, seconds: float) -> dict[str, Any]:
    """Zeros in the shape of a batch."""
    width = int(seconds * 16000) - 160
    length, numbers = torch.full((rows,), width, device=CUDA), torch.arange(rows, device=CUDA)
    signal = torch.zeros(rows, width, dtype=torch.int16, device=CUDA)
    return {
        "audio": signal, "audio_len": length, "noise": signal.clone(), "noise_len": length.clone(), "row": numbers,
        "utterance": numbers.clone(), "weight": torch.ones(rows, device=CUDA),
    }  # fmt: skip


def _place(origin: torch.fx.Node) -> str | None:
    """file:line of the innermost frame of the project."""
    for path, line in reversed(re.findall(r'File "([^"]+)", line (\d+)', origin.meta.get("stack_trace") or "")):
        path = os.path.realpath(path)
        if path.startswith(_ROOT) and "site-packages" not in path:
            return f"{path[len(_ROOT) :]}:{line}"
    return None

"""The compiler of a run: PyTorch's Inductor, which reports each graph that it compiles, and in how many seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from nest_fn.train.step.compiled import Backend


def inductor(say: Callable[[str], None]) -> Callable[[str], Backend]:
    """The Inductor backend for each named part; each compilation is reported with its duration."""

    def backend(name: str) -> Backend:
        def compile(graph: Any, inputs: Any) -> Any:
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(graph, inputs, inner_compile=told)

        def told(graph: Any, inputs: Any, **settings: Any) -> Any:
            from torch._inductor.compile_fx import compile_fx_inner

            way = "backward" if settings.get("is_backward") else "forward"
            say(f"compiling {name}, {way} ...")
            started = time.monotonic()
            code = compile_fx_inner(graph, inputs, **settings)
            _keep_strides_free(code, inputs)
            say(f"compiled {name}, {way}, in {time.monotonic() - started:.1f} s")
            return code

        return compile

    return backend


def _keep_strides_free(code: Any, inputs: Any) -> None:
    """Report the strides of a graph's outputs as expressions in its sizes, not as the numbers of the batch at hand.

    PyTorch 2.11 builds the backward graph on the numbers where Inductor lays an output out in its own way, as that of a
    convolution, and so ties the graph to one width: each bucket would be compiled anew.
    """
    context = torch._guards.TracingContext.try_get()
    free = next((size.node.shape_env for size in inputs if isinstance(size, torch.SymInt)), None)
    if free is None or context is None or not context.output_strides:
        return
    given = code.output_strides
    context.output_strides[:] = [s if s is None else tuple(map(free.deserialize_symexpr, s)) for s in given]

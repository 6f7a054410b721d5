"""The step's parts, each as a graph of its own; the Conformer block once for all layers (design.md, "Compilation").

    loss = training_loss(cfg, parts=compile_parts(inductor(say)))

Shapes are PyTorch's automatic dynamic ones: the first batch's shape is compiled as it is, and where a later one
differs, the part is compiled once more, for every size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple, TypeVar, cast

import torch

from nest_fn import parts
from nest_fn.encoder import EncoderParts
from nest_fn.parts import Parts
from nest_fn.train.augment.mixing import prepare_inputs

F = TypeVar("F", bound=Callable[..., Any])
Backend = str | Callable[..., Any]  # as torch.compile takes it


class StepParts(NamedTuple):
    """The mixing, and the parts of the model's loss."""

    mix: Callable[..., Any] = prepare_inputs
    model: Parts = parts.EAGER


EAGER = StepParts()


def compile_parts(backend: Callable[[str], Backend]) -> StepParts:
    """Every part compiled, ``backend(name)`` making code of its graphs; graphs are shared with no other call's."""

    def made(name: str, part: F) -> F:
        return cast(F, torch.compile(_anew(part), fullgraph=True, backend=backend(name)))

    model = parts.EAGER
    blocks = EncoderParts(
        made("encoder input", model.encoder.embed_input), made("conformer block", model.encoder.block)
    )
    return StepParts(
        made("mixing", prepare_inputs),
        Parts(
            keys=made("keys", model.keys),
            features=made("log-mel features", model.features),
            mask=made("masking", model.mask),
            subsample=made("subsampling", model.subsample),
            quantize=made("quantizer", model.quantize),
            encoder=blocks,
            score=made("decoder and loss", model.score),
        ),
    )


def _anew(part: F) -> F:
    """The function with a code object of its own. PyTorch keeps graphs by code object and takes eight for each: so no
    set of parts takes another's room, and no setting of the process need be changed."""
    assert isinstance(part, FunctionType)
    copy = FunctionType(part.__code__.replace(), part.__globals__, part.__name__, part.__defaults__, part.__closure__)
    copy.__kwdefaults__ = part.__kwdefaults__
    return cast(F, copy)


def inductor(say: Callable[[str], None]) -> Callable[[str], Backend]:
    """PyTorch's own compiler, which tells what it compiles and how long that took."""

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

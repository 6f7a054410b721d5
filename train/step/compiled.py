"""The step's parts, each as a graph of its own; the Conformer block once for all layers (design.md, "Compilation").

    loss = training_loss(cfg, parts=compile_parts(lambda name: "inductor"))

Shapes are PyTorch's automatic dynamic ones: the first batch's shape is compiled as it is, and where a later one
differs, the part is compiled once more, for every size.
"""

from __future__ import annotations

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
    """Every part compiled by ``backend(name)``; the graphs are not shared with those of another call."""

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
    """The function with a code object of its own.

    PyTorch keeps at most eight graphs for each code object: with its own, no set of parts evicts another's graphs, and
    no setting of the process needs to be changed.
    """
    assert isinstance(part, FunctionType)
    copy = FunctionType(part.__code__.replace(), part.__globals__, part.__name__, part.__defaults__, part.__closure__)
    copy.__kwdefaults__ = part.__kwdefaults__
    return cast(F, copy)

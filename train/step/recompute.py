"""Activation recomputation: the blocks keep their inputs alone, and are run again in the backward pass.

Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174, by PyTorch's non-reentrant checkpoint. A
block draws from a key that it is given, so that its second run makes the bits of the first, and no state of a generator
is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.utils.checkpoint import checkpoint

from .compiled import StepParts


def recompute_blocks(parts: StepParts) -> StepParts:
    """The parts with a Conformer block that saves its inputs alone: memory by layer falls to one ``[B, T, D]``."""
    encoder = parts.model.encoder._replace(block=recomputed(parts.model.encoder.block))
    return parts._replace(model=parts.model._replace(encoder=encoder))


def recomputed(part: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose intermediate results are not saved for its backward pass, but computed again there."""

    @wraps(part)
    def run(*args: Any, **named: Any) -> Any:
        return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False, **named)

    return run

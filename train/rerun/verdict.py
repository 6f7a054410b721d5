"""What the comparisons of ``verify`` come to: from which step on, in which tensor, by how much, and why perhaps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from nest_fn.train.run.record.run_folder import RunFolder, environment

from .compare import ROUNDING, changed_entries

_ROUNDS = ("code", "nest_fn", "torch", "ranks", "devices", "threads", "processor", "vector_instructions")
"""Entries of ``environment.json`` that can change a number; the others, as the kernel's version, do not."""


_PROOF = (("digests", False), ("digests", True), ("metrics", True))
"""Kinds of equal records, and whether they are of a later step, that show that a checkpoint was changed."""


class Comparison(NamedTuple):
    """What was compared at one step."""

    kind: Literal["beginning", "digests", "metrics", "checkpoint"]
    step: int  # updates done
    text: str
    equal: bool
    relative: float | None  # largest relative difference of values, or of a checkpoint's parts; None: unknown
    tensor: str | None = None  # the first one that differs, where tensors were compared


def surroundings(folder: Path) -> list[str]:
    """How machine, versions and ranks differ from those of the run, as ``name: then -> now``."""
    then = RunFolder(folder).environment()
    now = {**environment(), "ranks": 1, "executable": then.get("executable")}
    return changed_entries(then, {name: now[name] for name in now if name in then}) if then else []


def verdict(found: Sequence[Comparison], changed: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The comparisons in a sentence; if something differs, also the first tensor and the likely cause.

    ``changed`` are the surroundings that are not as they were, ``overrides`` settings given now.
    """
    other = [one for one in found if not one.equal]
    if not other:
        return [f"equal to the last bit: {counted(len(found), 'record')}, steps {found[0].step} to {found[-1].step}"]
    known = [one.relative for one in other if one.relative is not None]
    size = ""
    if known:
        worst = max(known)
        size = f"; largest relative difference {worst:.2g}, "
        size += "of the size of rounding" if worst <= ROUNDING else "more than rounding"
    digests = any(one.kind in ("digests", "beginning") for one in found)
    cause = _cause(found, changed, overrides)
    return [f"differs from step {other[0].step} on{size}", _first_tensor(other, digests), cause]


def _first_tensor(other: Sequence[Comparison], digests: bool) -> str:
    """The first tensor that differs; how to know it of the very step where the run has no digests."""
    named = next((one for one in other if one.tensor is not None), None)
    more = "a run with trainer.digest_every=1 records digests of every tensor at every step"
    if named is None:
        return f"in which tensor is not known, for no checkpoint or digest stands there; {more}"
    told = f"the first tensor that differs: {named.tensor}, step {named.step}"
    return told if digests else f"{told}, the first step whose tensors can be compared; {more}"


def _cause(found: Sequence[Comparison], changed: Sequence[str], overrides: Sequence[str]) -> str:
    if (damaged := _changed_checkpoint(found)) is not None:
        return f"the likely cause: the checkpoint of step {damaged} was changed after it was written"
    causes = [*overrides, *(one for one in changed if one.partition(":")[0] in _ROUNDS)]
    if causes:
        return f"the likely cause, not as when the run was made: {'; '.join(causes)}"
    return (
        "the likely cause is none that was recorded, for code, versions, threads and devices are the same: "
        "look for a changed checkpoint, changed audio, or operations that are not deterministic"
    )


def _changed_checkpoint(found: Sequence[Comparison]) -> int | None:
    """The step of a checkpoint that is not what the run had, if the run's other records show that.

    Either the checkpoint from which steps were made has other digests; or checkpoints alone differ, and the tensors
    at that step, or the metrics after it, were made again as they were recorded.
    """
    other = [one for one in found if not one.equal]
    first = other[0].step
    if other[0].kind == "beginning":
        return first
    proof = any(one.equal and (one.kind, one.step > first) in _PROOF and one.step >= first for one in found)
    return first if proof and all(one.kind == "checkpoint" for one in other) else None


def counted(number: int, name: str) -> str:
    """A number of things: ``1 record``, ``2 records``."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"

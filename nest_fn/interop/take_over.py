"""Parts of one model for another: those of the same shapes are taken over, the others stay as they were initialised.

A part is taken whole or not at all: the subsampling, each block with its running statistics, the decoder, the
quantizer. The decoder predicts the quantizer's codes, so that it goes only with the same codebooks.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from nest_fn.config import Config
from nest_fn.layers.tree import fill, flatten
from nest_fn.layers.types import Params, State

_LAYER = re.compile(r"encoder\.layers\.(\d+)")


class TakenOver(NamedTuple):
    """A model of which parts come from another one."""

    params: Params
    state: State
    taken: tuple[str, ...]  # parts
    fresh: tuple[str, ...]  # parts that stay as initialised, and why
    unused: tuple[str, ...]  # parts of the other model without a place

    def lines(self) -> list[str]:
        """What was taken and what was not, for a person."""
        told = [f"taken: {', '.join(_joined(self.taken)) or 'nothing'}"]
        told += [f"not taken, as initialised: {text}" for text in self.fresh]
        return told + ([f"without a place here: {', '.join(_joined(self.unused))}"] if self.unused else [])


def take_over(params: Params, state: State, given_params: Params, given_state: State) -> TakenOver:
    """Replace the parts of ``params`` and ``state`` that the given model has with the same shapes.

    Tensors get the dtype and device that they have here.
    """
    ours = {"params": params, "state": state}
    wanted, given = _by_part(ours), _by_part({"params": given_params, "state": given_state})
    why = {part: _obstacle(leaves, given.get(part)) for part, leaves in wanted.items()}
    if why.get("quantizer") and why.get("decoder") is None:
        why["decoder"] = "its classes are codes of other codebooks"
    taken = {part for part, obstacle in why.items() if obstacle is None}
    leaves = {
        path: given[part][path].to(leaf.device, leaf.dtype).clone() if part in taken else leaf
        for part, mine in wanted.items()
        for path, leaf in mine.items()
    }
    made = fill(ours, leaves)
    fresh = tuple(f"{part}: {obstacle}" for part, obstacle in why.items() if obstacle is not None)
    unused = tuple(part for part in given if part not in wanted)
    return TakenOver(made["params"], made["state"], tuple(part for part in wanted if part in taken), fresh, unused)


def differing_settings(before: Config, after: Config) -> list[str]:
    """Settings of features, encoder and quantizer in which two models differ, though their shapes may not."""
    old, new = flatten(before.to_dict()), flatten(after.to_dict())
    sections = ("preprocessor.", "encoder.", "quantizer.", "compat", "sample_rate", "mask_position")
    names = (name for name in sorted(old.keys() | new.keys()) if name.startswith(sections))
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]


def _by_part(trees: dict[str, Any]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(trees).items():
        parts.setdefault(_part(path), {})[path] = leaf
    return parts


def _part(path: str) -> str:
    """``params.encoder.layers.3.conv.norm.weight -> encoder.layers.3``; of other parts the first two names, or one."""
    names = path.split(".")[1:]
    return ".".join(
        names[:3] if names[:2] == ["encoder", "layers"] else names[:2] if names[0] == "encoder" else names[:1]
    )


def _obstacle(leaves: dict[str, Any], given: dict[str, Any] | None) -> str | None:
    """Why a part is not taken; None if it is."""
    if given is None:
        return "is not in the file"
    for path, leaf in leaves.items():
        name = path.partition(".")[2]
        if path not in given:
            return f"'{name}' is not in the file"
        if given[path].shape != leaf.shape:
            return f"'{name}' is {list(given[path].shape)} in the file, {list(leaf.shape)} here"
    more = [path for path in given if path not in leaves]
    return f"'{more[0].partition('.')[2]}' of the file has no place here" if more else None


def _joined(parts: tuple[str, ...]) -> list[str]:
    """``encoder.layers.0, encoder.layers.1`` as ``encoder.layers 0-1``."""
    numbers = [int(found[1]) for part in parts if (found := _LAYER.fullmatch(part))]
    others = [part for part in parts if not _LAYER.fullmatch(part)]
    if not numbers:
        return others
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    text = f"{numbers[0]}-{numbers[-1]}" if whole and len(numbers) > 1 else ", ".join(map(str, numbers))
    return [*others, f"encoder.layers {text}"]

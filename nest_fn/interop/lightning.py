"""Plain values from the configuration that Lightning pickles into a ``.ckpt``, without the classes that it was made of.

The reference hands Lightning an OmegaConf object. Each of its classes is read as an inert stand-in that keeps what the
pickle says and can do nothing; any class that is not listed here makes the file refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nest_fn.errors import CheckpointError

_MAX_NODES = 100_000
_MAX_DEPTH = 64
_MISSING = "???"


class _StandIn:
    """Something that a pickle makes and that is never used as what it was."""

    def __new__(cls, *args: Any) -> _StandIn:
        return object.__new__(cls)


class _Branch(_StandIn):
    """A mapping or list: ``_content`` holds its children."""


class _Leaf(_StandIn):
    """One value, ``_val``."""


_NODES = "AnyNode StringNode IntegerNode FloatNode BooleanNode BytesNode PathNode EnumNode InterpolationResultNode"
_OTHERS = (
    "omegaconf.base.Metadata omegaconf.base.ContainerMetadata omegaconf.base.SCMode typing.Any collections.defaultdict "
    "builtins.dict builtins.list builtins.tuple builtins.int builtins.float builtins.str builtins.bool builtins.object "
    "builtins.type pathlib.Path pathlib.PosixPath pathlib.PurePosixPath pathlib._local.PosixPath "
    "numpy.dtype numpy.core.multiarray.scalar numpy._core.multiarray.scalar"
)

STAND_INS: dict[str, type] = {
    "omegaconf.dictconfig.DictConfig": _Branch,
    "omegaconf.listconfig.ListConfig": _Branch,
    **{f"omegaconf.nodes.{name}": _Leaf for name in _NODES.split()},
    **dict.fromkeys(_OTHERS.split(), _StandIn),
}
"""Classes by the name that the pickle gives them, and what they are read as."""


def to_plain(value: Any, source: str) -> Any:
    """Nested dicts, lists and values of what was read with ``STAND_INS``. Raises ``CheckpointError`` if too many."""
    return _Reader(source).plain(value, 0)


class _Reader:
    """Counts what it makes: parts of a pickle may be shared, so that a small file stands for a huge tree."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.nodes = 0

    def plain(self, value: Any, depth: int) -> Any:
        """One node and all below it. A text that is a reference, ``${a.b}``, stays one."""
        self.nodes += 1
        if self.nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise CheckpointError(f"{self.source}: its config grows beyond {_MAX_NODES} nodes or {_MAX_DEPTH} levels.")
        if isinstance(value, _Branch):
            return self.plain(value.__dict__.get("_content"), depth + 1)
        if isinstance(value, _Leaf):
            return self.plain(value.__dict__.get("_val"), depth + 1)
        if isinstance(value, Mapping):
            return {str(name): self.plain(child, depth + 1) for name, child in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(child, depth + 1) for child in value]
        if value is None or isinstance(value, str | int | float):
            return value
        return _MISSING  # a setting that is no plain value, such as a class; the reader of configs leaves it out

"""Plain values from the configuration that Lightning pickles into a ``.ckpt``, without importing its classes.

The reference passes an OmegaConf object to Lightning. Each of its classes is read as a stand-in without behaviour,
which only stores the pickled attributes; a file that names any class not listed here is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nest_fn.errors import CheckpointError

_MAX_NODES = 100_000
_MAX_DEPTH = 64
_MISSING = "???"


class _StandIn:
    """Replaces a class in a pickle; its instances only store their attributes."""

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
"""Names of classes in a pickle, and the classes as which they are read."""


def to_plain(value: Any, source: str) -> Any:
    """Convert what was read with ``STAND_INS`` to plain dicts, lists and values.

    Raises ``CheckpointError`` if there are too many.
    """
    return _Reader(source).plain(value, 0)


class _Reader:
    """Counts nodes, because objects in a pickle may be shared, so that a small file expands to a huge tree."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.nodes = 0

    def plain(self, value: Any, depth: int) -> Any:
        """Convert one node and all below it. References such as ``${a.b}`` are kept as strings."""
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
        return _MISSING  # not a plain value, such as a class; treated as a missing setting

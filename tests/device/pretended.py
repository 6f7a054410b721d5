"""A pretended CUDA device: tensors that say ``cuda:0`` and hold a CPU's numbers, under CUDA's rules.

Every operation is checked as CUDA's dispatcher checks it: all tensors with axes on one device, numbers of the CPU may
join. What would make the host wait for the device is noted with the line of the library that did it. Values are real,
so code that depends on data runs. Autograd's engine wants a real device: only forward passes are pretended.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda:0")
ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten
Waits = Counter[str]

_WAITS = {
    aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten.masked_select.default,
    aten.equal.default, aten.is_nonzero.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
_INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor,
    aten._index_put_impl_.default, aten._unsafe_index_put.default,
}  # fmt: skip
_found: list[Waits] = []


class DeviceError(RuntimeError):
    """Tensors of two devices met in one operation."""


class Pretended(torch.Tensor):
    """A tensor that says it is on the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            layout=held.layout, device=CUDA,
        )  # fmt: skip
        made.held = held.detach()
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


def on_device(tree: Any) -> Any:
    """All tensors of a tree as if they were on the device."""
    return tree_map_only(torch.Tensor, lambda x: x if isinstance(x, Pretended) else Pretended(x), tree)


def off_device(tree: Any) -> Any:
    """Their values."""
    return tree_map_only(Pretended, lambda x: x.held, tree)


@contextmanager
def pretending() -> Iterator[Waits]:
    """Factories with ``device="cuda"`` make pretended tensors; what waits is counted by line in what is given."""
    torch._C._ensureCUDADeviceGuardSet()
    waits: Waits = Counter()
    _found.append(waits)
    before, torch.cuda._lazy_init = torch.cuda._lazy_init, lambda: None
    try:
        with _Device(), _Lifts():
            yield waits
    finally:
        torch.cuda._lazy_init = before
        _found.remove(waits)


def _wait(what: str) -> None:
    for waits in _found:
        waits[f"{_line()}: {what}"] += 1


def _line() -> str:
    """The innermost line of the library."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and "tests" not in path.parts and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "tests"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func in (aten._use_cudnn_ctc_loss.Tensor, aten._use_miopen_ctc_loss.Tensor):
        return False  # questions about a library, asked with the targets on either side
    flat = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    there = [leaf for leaf in flat if isinstance(leaf, Pretended)]
    named = kwargs.get("device")
    to_device = named is not None and torch.device(named).type == "cuda"
    result_there = bool(there) if named is None else to_device
    if func is aten._to_copy.default:
        source = args[0]
        result_there = to_device or (named is None and isinstance(source, Pretended))
        if isinstance(source, Pretended) and not result_there:
            _wait("a copy to the host")
        if not isinstance(source, Pretended) and to_device and not kwargs.get("non_blocking"):
            _wait("a blocking copy to the device")
    elif func is aten.copy_.default:
        result_there = isinstance(args[0], Pretended)
        if result_there != isinstance(args[1], Pretended):
            _wait("copy_ between host and device")
    elif there:
        _check(func, args, flat)
    return _compute(func, args, kwargs, there, result_there, to_device)


def _check(func: Any, args: Any, flat: list[torch.Tensor]) -> None:
    for leaf in flat:
        if isinstance(leaf, Pretended) or leaf.ndim == 0:
            continue
        if func in _INDEXING and leaf is not flat[0] and not leaf.is_floating_point():
            _wait("an index on the host")
            continue
        raise DeviceError(f"{func} meets a CPU tensor {tuple(leaf.shape)} at {_line()}")
    if func in _WAITS:
        _wait(func.__name__)
    if func in _INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
        _wait("an index of bools")


def _compute(func: Any, args: Any, kwargs: dict[str, Any], there: list[Any], wrap: bool, to_device: bool) -> Any:
    plain_args, plain = off_device((args, kwargs))
    if "device" in plain and to_device:
        plain = {**plain, "device": torch.device("cpu")}
    if "pin_memory" in plain:
        plain = {**plain, "pin_memory": False}
    result = _STAND_INS.get(func, func)(*plain_args, **plain)
    if func is aten._local_scalar_dense.default:
        return result
    if torch.Tag.inplace_view in func.tags and isinstance(args[0], Pretended):
        with no_dispatch():
            func(*args, **kwargs)  # the wrapper's own sizes and strides
        return args[0]
    known = {id(leaf.held): leaf for leaf in there}

    def put(x: torch.Tensor) -> torch.Tensor:
        if not wrap or isinstance(x, Pretended):
            return x
        return known[id(x)] if id(x) in known else Pretended(x)

    return tree_map_only(torch.Tensor, put, result)


def _cudnn_batch_norm(x: Any, w: Any, b: Any, mean: Any, var: Any, train: bool, momentum: float, eps: float) -> Any:
    made = aten.native_batch_norm.default(x, w, b, mean, var, train, momentum, eps)
    return (*made, torch.empty(0, dtype=torch.uint8))


_STAND_INS: dict[Any, Callable[..., Any]] = {
    aten.cudnn_batch_norm.default: _cudnn_batch_norm,
}


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Lifts(TorchFunctionMode):
    """Host numbers made into tensors of the device are blocking copies."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        named = kwargs.get("device")
        lifts = func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], Pretended)
        if lifts and named is not None and torch.device(named).type == "cuda":
            _wait(f"{func.__name__} of host numbers")
            return Pretended(func(*args, **{**kwargs, "device": "cpu"}))
        if func is torch.Tensor.tolist and isinstance(args[0], Pretended):
            _wait("tolist")
            return args[0].held.tolist()
        return func(*args, **kwargs)

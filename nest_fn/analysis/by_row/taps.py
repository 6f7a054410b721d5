"""The gradient of every row of a batch in one backward pass, one parameter at a time.

Where a parameter meets data, its gradient is a product of the data and of the gradient of the result, and both still
have an axis of rows: kept apart there, instead of summed up, they give the gradient of each row (Goodfellow,
arXiv 1510.01799; for convolutions Rochette et al., arXiv 1912.06015).

``torch.func.vmap(grad)`` gives the same numbers (``gradients.py``); it holds the gradients of all parameters at once,
and its convolutions with a weight for each row are slow.

A ``TorchFunctionMode`` sees the calls of PyTorch inside its block and nowhere else. Parameters, and what is computed
from parameters and constants alone, are *shared*; a call with a shared tensor and data is a meeting. Data are tensors
of three axes or more whose first axis is that of the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from nest_fn.layers.types import Tensor

from .row_gradients import Convolved, Held, Product, RowGradient

Sink = Callable[[str, RowGradient], None]
"""Is given each parameter's path and gradient once, in the order in which the backward pass comes to them."""


def backward_by_row(f: Callable[[Any], Tensor], params: Mapping[str, Tensor], rows: int, sink: Sink) -> Tensor:
    """Give ``sink`` the gradient of every row of ``f(params) -> [B]`` by every leaf; returns ``f``'s value.

    ``params`` are leaves by path, ``rows`` is B; ``f`` takes them by path. A leaf that ``f`` does not use is not given.
    Row b of the result must depend on row b of the data alone. Raises ``ValueError`` where a parameter meets data that
    have lost their axis of rows.
    """
    leaves = {path: leaf.detach().requires_grad_() for path, leaf in params.items()}
    mode = _Taps(leaves, rows)
    with torch.enable_grad():
        with mode:
            value = f(leaves)
        if mode.is_shared(value):
            raise ValueError(_NO_ROWS)
        backward = _Backward(mode, leaves, sink)
        if mode.roots:
            torch.autograd.grad(value.sum(), mode.roots, allow_unused=True)
        backward.finish()
    return value.detach()


_NO_ROWS = (
    "backward_by_row: a parameter meets data without an axis of rows in front and two behind it; keep the data in that "
    "form, or take method='vmap'."
)

Read = Callable[[Tensor], RowGradient]
"""From the gradient of a result to that of a parameter, row by row."""


class _Meeting(NamedTuple):
    """Where shared tensors met data: the tensor whose gradient tells, and how to read theirs from it."""

    watched: Tensor
    shared: tuple[tuple[Tensor, Read], ...]


class _Taps(TorchFunctionMode):
    """Keeps rows apart wherever a shared tensor meets data; ``meetings`` lists these places."""

    def __init__(self, leaves: Mapping[str, Tensor], rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.roots: list[Tensor] = []  # where the backward pass ends: the first results that need a gradient
        self.meetings: list[_Meeting] = []
        self._shared = {id(leaf): leaf for leaf in leaves.values()}  # holds them, so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if not any(self.is_shared(leaf) for leaf in given):
            return func(*args, **kwargs)
        if not any(self._is_data(leaf) for leaf in given):
            if any(leaf.requires_grad and not self.is_shared(leaf) for leaf in given):
                raise ValueError(_NO_ROWS)
            return self._share(func(*args, **kwargs))
        rewritten = _MEETINGS.get(func)
        return self._expanded(func, args, kwargs) if rewritten is None else rewritten(self, *args, **kwargs)

    def is_shared(self, leaf: Any) -> bool:
        """Whether it is a parameter, or computed from parameters and constants alone."""
        return id(leaf) in self._shared

    def _is_data(self, leaf: Tensor) -> bool:
        return not self.is_shared(leaf) and leaf.ndim >= 3 and leaf.shape[0] == self.rows

    def _share(self, result: Any) -> Any:
        """Mark what was computed from parameters and constants alone."""
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._shared[id(leaf)] = leaf
        return result

    def watch(self, watched: Tensor, *shared: tuple[Tensor | None, Read]) -> Tensor:
        """Note a meeting; the result is ``watched``, made to have a gradient."""
        if not watched.requires_grad:
            watched = watched.detach().requires_grad_()
            self.roots.append(watched)
        self.meetings.append(_Meeting(watched, tuple((leaf, read) for leaf, read in shared if leaf is not None)))
        return watched

    def by_row(self, shared: Tensor, ndim: int, behind: int = 0) -> Tensor:
        """A shared tensor for each row, to be broadcast with ``ndim`` axes: ``[...] -> [B, 1, ..., ..., 1]``.

        ``behind`` is the number of axes of length 1 at the end.
        """
        rows = self.rows
        shape = (*(1,) * (ndim - 1 - shared.ndim - behind), *shared.shape, *(1,) * behind)
        # The view with all rows is watched: the gradient of what it repeats would be summed up over them.
        repeated = shared.detach().reshape(shape).expand(rows, *shape)
        return self.watch(repeated, (shared, lambda grad: Held(grad.reshape(rows, *shared.shape))))

    def _expanded(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call that broadcasts: its shared tensors are repeated for each row."""
        given = tree_flatten((args, kwargs))[0]
        ndim = max(leaf.ndim for leaf in given if isinstance(leaf, Tensor) and self._is_data(leaf))

        def by_row(leaf: Any) -> Any:
            return self.by_row(leaf, ndim) if self.is_shared(leaf) else leaf

        args, kwargs = tree_map(by_row, (args, kwargs))
        return func(*args, **kwargs)


def _value(shared: Tensor | None) -> Tensor | None:
    return None if shared is None else shared.detach()


def _frames(x: Tensor) -> Tensor:
    """``[B, ..., D] -> [B, n, D]``."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _frame_sum(x: Tensor) -> RowGradient:
    return Held(_frames(x).sum(dim=1))


def _linear(taps: _Taps, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    inside = x.detach()
    return taps.watch(
        F.linear(x, weight.detach(), _value(bias)),
        (weight, lambda grad: Product(_frames(grad), _frames(inside), weight.shape)),
        (bias, _frame_sum),
    )


def _matmul(taps: _Taps, x: Tensor, other: Tensor) -> Tensor:
    if taps.is_shared(x):
        return torch.matmul(taps.by_row(x, other.ndim), other)
    if other.ndim != 2:
        return torch.matmul(x, taps.by_row(other, x.ndim))
    inside = x.detach()
    read = (other, lambda grad: Product(_frames(inside), _frames(grad), other.shape))
    return taps.watch(x @ other.detach(), read)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(
        taps: _Taps, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Tensor:  # fmt: skip
        settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        inside = x.detach()
        return taps.watch(
            function(x, weight.detach(), _value(bias), **settings),
            (weight, lambda grad: Convolved(inside, grad, weight.shape, settings)),
            (bias, lambda grad: _frame_sum(grad.movedim(1, -1))),
        )

    return run


def _norm(
    taps: _Taps, function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, channels: int
) -> Tensor:
    """A norm ``function(x, weight, bias)`` whose parameters belong to the axis ``channels``."""
    inside = x.detach()

    def scale(grad: Tensor) -> RowGradient:
        return _frame_sum((grad * function(inside, None, None)).movedim(channels, -1))

    y = function(x, weight.detach(), bias.detach())
    return taps.watch(y, (weight, scale), (bias, lambda grad: _frame_sum(grad.movedim(channels, -1))))


def _layer_norm(taps: _Taps, x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return _norm(taps, lambda y, w, b: F.layer_norm(y, shape, w, b, eps), x, weight, bias, -1)


def _group_norm(taps: _Taps, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return _norm(taps, lambda y, w, b: F.group_norm(y, groups, w, b, eps), x, weight, bias, 1)


def _batch_norm(
    taps: _Taps, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, *, training: bool,
    momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    assert not training, "statistics of the batch leave a row no gradient of its own"
    return _norm(taps, lambda y, w, b: F.batch_norm(y, mean, variance, w, b, eps=eps), x, weight, bias, 1)


_MEETINGS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    F.conv1d: _convolution(F.conv1d),
    F.conv2d: _convolution(F.conv2d),
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
}
"""Calls of which the gradient is read from input and output; all others are taken to broadcast."""


class _Backward:
    """Hooks at the meetings, and the sums of the parameters that met data more than once."""

    def __init__(self, taps: _Taps, leaves: Mapping[str, Tensor], sink: Sink) -> None:
        self._path = {id(leaf): path for path, leaf in leaves.items()}
        self._leaves, self._sink = leaves, sink
        self._later: list[tuple[Tensor, Tensor]] = []  # tensors computed from parameters, and their gradients
        shared = [leaf for meeting in taps.meetings for leaf, _ in meeting.shared]
        uses = Counter(path for leaf in shared for path in self._sources(leaf))
        self._single = {self._path[id(leaf)] for leaf in shared if id(leaf) in self._path}
        self._single = {path for path in self._single if uses[path] == 1}
        self._sums: dict[str, Tensor] = {}
        for meeting in taps.meetings:
            meeting.watched.register_hook(self._hook(meeting.shared))

    def _sources(self, shared: Tensor) -> list[str]:
        """Paths of the parameters that a tensor was computed from: of a parameter, its own."""
        if id(shared) in self._path:
            return [self._path[id(shared)]]
        found: dict[str, None] = {}
        todo, seen = [shared.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if hasattr(node, "variable"):
                found[self._path[id(node.variable)]] = None
            todo += [following for following, _ in node.next_functions]
        return list(found)

    def _hook(self, shared: tuple[tuple[Tensor, Read], ...]) -> Callable[[Tensor], None]:
        """A hook on a watched tensor. It must not hold that tensor itself: such a circle would never be freed."""

        def receive(grad: Tensor) -> None:
            with torch.no_grad():
                for leaf, read in shared:
                    self._receive(leaf, read(grad))

        return receive

    def _receive(self, shared: Tensor, found: RowGradient) -> None:
        path = self._path.get(id(shared))
        if path is None:
            self._later.append((shared, found.full()))
        elif path in self._single:
            self._sink(path, found)
        else:
            self._add(path, found.full())

    def _add(self, path: str, gradient: Tensor) -> None:
        self._sums[path] = self._sums[path] + gradient if path in self._sums else gradient

    def finish(self) -> None:
        """Lead the gradients of computed tensors on to their parameters, row by row, and give the sums."""
        for shared, gradient in self._later:
            paths = self._sources(shared)
            leaves = [self._leaves[path] for path in paths]
            rows = [torch.autograd.grad(shared, leaves, row, retain_graph=True) for row in gradient]
            for path, each in zip(paths, zip(*rows, strict=True), strict=True):
                self._add(path, torch.stack(each))
        for path, total in self._sums.items():
            self._sink(path, Held(total))

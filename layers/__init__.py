"""Layers as pure functions of parameter dicts. They know tensors, not NEST.

**A layer is two functions in one file**: ``init_linear(key, ...) -> params`` and ``linear(params, x) -> y``. A stateful
layer is ``init(...) -> (params, state)`` and returns ``(y, state)``; a stochastic layer takes ``key=``.
**Order of arguments**: parameters (``params``), state, inputs (``x``, masks), configuration; then keyword arguments for
randomness (``key``) and mode (``train``).
**A layer takes a key and never returns one.** A key is used once: to draw, or to ``split``/``fold_in``, never both.
Keys ``[..., 2]`` draw independently for each leading index: dropout with keys ``[B, 2]`` draws each row from its own
key.
**State is threaded**: functions return the new state; no argument and no buffer is modified.

Axes: ``B`` batch, ``N`` samples, ``F`` frames of 10 ms, ``M`` mel bins, ``T`` encoder frames of 80 ms, ``D`` model
width, ``H`` heads, ``C`` classes, ``K`` books.
"""

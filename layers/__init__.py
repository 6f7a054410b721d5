"""Layers as pure functions over parameter dicts. They know tensors, not NEST.

**A layer is two functions in one file**: ``init_linear(key, ...) -> params`` and ``linear(params, x) -> y``. A layer
with memory is ``init(...) -> (params, state)`` and returns ``(y, state)``; a layer with chance takes ``key=``.
**Order of arguments**: what is learnt (params), what is remembered (state), what flows (x, masks), how it is shaped;
then keywords: chance (``key``), mode (``train``).
**A key goes in and never comes out**, and is used once: to draw, or to ``split``/``fold_in``, never both. A key
``[..., 2]`` draws for each of its leading axes separately: dropout with keys ``[B, 2]`` decides for each row alone.
**State is threaded**: functions return the new state; nothing is mutated, no argument, no buffer.

Axes: ``B`` batch, ``N`` samples, ``F`` frames of 10 ms, ``M`` mel bins, ``T`` encoder frames of 80 ms, ``D`` model
width, ``H`` heads, ``C`` classes, ``K`` books.
"""

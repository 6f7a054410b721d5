"""``python -m nest_fn.train``: the same as ``nest-fn``, for torchrun."""

from .cli.main import process

process()

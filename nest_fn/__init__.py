"""NEST, self-supervised pre-training of speech encoders, as pure functions with explicit params, state and keys.

    from nest_fn import Config, key, init, loss

    cfg = Config.from_yaml("configs/nest_large.yaml")
    params, state = init(key(0), cfg)
    value, (metrics, state) = loss(params, state, batch, cfg, key=key(1))

Start reading at ``nest_fn/model.py``. The paper: "NEST: Self-supervised Fast Conformer as All-purpose Seasoning to
Speech Processing Tasks", arXiv 2408.13106.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from nest_fn.layers.random import fold_in, key, split

    from .checkpoint.model_files import load, save, save_file
    from .config import Config, ConfigError
    from .frontend import log_mel
    from .hidden_states import features
    from .interop import nemo
    from .model import Batch, Output, abstract, encode, forward, init, loss, loss_sum, quantize
    from .train.facade.ssl_model import PureTorchSSLModel, create_optimizer, create_scheduler
    from .tree_summary import summary

__all__ = [
    "Batch",
    "Config",
    "ConfigError",
    "Output",
    "PureTorchSSLModel",
    "abstract",
    "create_optimizer",
    "create_scheduler",
    "encode",
    "features",
    "fold_in",
    "forward",
    "init",
    "key",
    "load",
    "log_mel",
    "loss",
    "loss_sum",
    "nemo",
    "quantize",
    "save",
    "save_file",
    "split",
    "summary",
]

_HOMES = {
    "layers.random": ("fold_in", "key", "split"),
    "checkpoint.model_files": ("load", "save", "save_file"),
    "config": ("Config", "ConfigError"),
    "frontend": ("log_mel",),
    "hidden_states": ("features",),
    "model": ("Batch", "Output", "abstract", "encode", "forward", "init", "loss", "loss_sum", "quantize"),
    "train.facade.ssl_model": ("PureTorchSSLModel", "create_optimizer", "create_scheduler"),
    "tree_summary": ("summary",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that the command line can print its help without loading torch.

    The names of ``train`` are the only import against the order train -> nest_fn -> layers. Raises ``AttributeError``
    for other names.
    """
    if name == "nemo":
        return import_module(".interop.nemo", __name__)
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """All public names, whether imported already or not."""
    return sorted({*globals(), *__all__})

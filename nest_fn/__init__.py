"""NEST, self-supervised pre-training of speech encoders, as pure functions with explicit params, state and keys.

    from nest_fn import Config, key, init, loss

    cfg = Config.from_yaml("configs/nest_large.yaml")
    params, state = init(key(0), cfg)
    value, (metrics, state) = loss(params, state, batch, cfg, key=key(1))

Start reading at ``nest_fn/model.py``. The paper: "NEST: Self-supervised Fast Conformer as All-purpose Seasoning to
Speech Processing Tasks", arXiv 2408.13106.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nest_fn.layers.random import fold_in, key, split

from .checkpoint.model_files import load, save, save_file
from .config import Config, ConfigError
from .frontend import log_mel
from .hidden_states import features
from .interop import nemo
from .model import Batch, Output, abstract, encode, forward, init, loss, loss_sum, quantize

if TYPE_CHECKING:
    from .train.facade.ssl_model import PureTorchSSLModel, create_optimizer, create_scheduler

__version__ = "0.1.0"

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
]

_FROM_TRAIN = ("PureTorchSSLModel", "create_optimizer", "create_scheduler")


def __getattr__(name: str) -> Any:
    """Names that live in ``train``, imported when first asked for: the only import that points up."""
    if name in _FROM_TRAIN:
        from .train.facade import ssl_model

        return getattr(ssl_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Everything that can be asked for, imported yet or not."""
    return sorted({*globals(), *__all__})

"""Conversion of the pure-PyTorch port's constructor keywords to a ``Config`` (reference 11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nest_fn.config import Config
from nest_fn.config.parse.problems import Problems

_PLACES = {
    "": "sample_rate num_classes num_books code_dim squeeze_single mask_position",
    "preprocessor": "features window_size window_stride n_fft normalize",
    "encoder": (
        "n_layers d_model n_heads subsampling subsampling_factor subsampling_conv_channels ff_expansion_factor "
        "conv_kernel_size dropout"
    ),
    "masking": "block_size mask_prob",
    "loss": "mask_threshold",
}
_SECTION = {name: section for section, names in _PLACES.items() for name in names.split()}

KEYWORDS = tuple(_SECTION)
"""Names of the keywords, in the order of the port's signature."""


def is_flat(settings: Mapping[str, Any]) -> bool:
    """Whether settings are constructor keywords instead of a nested configuration."""
    return not any(isinstance(value, Mapping) for value in settings.values())


def config_from_keywords(keywords: Mapping[str, Any]) -> Config:
    """Build a config from keywords, ``n_layers=17, d_model=512, ...``, and the port's fixed values (reference 11).

    The port fixes dither at 0 and uses one dropout rate. Keywords that are missing or ``None`` have the port's
    defaults, those of NEST-Large. Raises ``ConfigError``.
    """
    problems = Problems()
    tree: dict[str, Any] = {"preprocessor": {"dither": 0.0}, "encoder": {}, "masking": {}, "loss": {}}
    for name, value in keywords.items():
        if name not in _SECTION:
            problems.unknown(name, KEYWORDS)
        elif value is not None:
            section = _SECTION[name]
            (tree[section] if section else tree)[name] = value
    problems.raise_if_any("keywords")
    rate = tree["encoder"].get("dropout", 0.1)
    tree["encoder"] |= {"dropout": rate, "dropout_pre_encoder": rate, "dropout_att": rate, "dropout_emb": 0.0}
    return Config.from_dict(tree)

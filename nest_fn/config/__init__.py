"""``Config``: everything that a model and a run are made of, read strictly from the reference's YAML.

``Config.from_yaml("configs/nest_large.yaml", overrides=["encoder.n_layers=2"])`` is the way in. The dataclasses are
frozen and hold only plain values. A ``Config`` is complete and valid by construction: what a section leaves open
(``None``) is filled from the rest, and settings that do not fit each other raise ``ConfigError``, also in
``Config(...)`` and ``dataclasses.replace``. To change a value from which others follow, use
``config.override("encoder.d_model=256")``.

From file to config: ``reader`` (YAML), ``references`` (overrides, ``${a.b}``), ``dialect`` (the reference's sections as
ours), ``coerce`` (types), ``derive`` (open fields), ``checks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from . import derive
from .checks import check_model
from .checks_training import advice, check_training
from .limits import check_limits, check_sections
from .model import (
    Compat,
    DecoderConfig,
    EncoderConfig,
    LossConfig,
    MaskingConfig,
    PreprocessorConfig,
    QuantizerConfig,
)
from .parse.coerce import build, to_plain
from .parse.nemo_dialect import read_dialect
from .parse.overrides import apply_overrides, resolve
from .parse.problems import ConfigError, Problems, blamed
from .parse.yaml_io import read
from .representation import ShortRepr
from .training import AugmentConfig, DataConfig, OptimConfig, SchedConfig, TrainerConfig

__all__ = [
    "AugmentConfig",
    "Compat",
    "Config",
    "ConfigError",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "LossConfig",
    "MaskingConfig",
    "OptimConfig",
    "PreprocessorConfig",
    "QuantizerConfig",
    "SchedConfig",
    "TrainerConfig",
]


@dataclass(frozen=True, repr=False)
class Config(ShortRepr):
    """A whole configuration; ``Config()`` is NEST-Large with the reference's recipe."""

    sample_rate: int = 16000  # Hz
    num_classes: int = 8192
    num_books: int = 1
    code_dim: int = 16
    squeeze_single: bool = False
    mask_position: str = "pre_conv"  # pre_conv, post_conv
    compat: Compat = "current"
    preprocessor: PreprocessorConfig = field(default_factory=PreprocessorConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    unused: ClassVar[tuple[str, ...]] = ()
    """Keys of the file that was read which have no effect here, a remark for each section: part of ``advice``."""

    def __post_init__(self) -> None:
        """Fill what the sections leave open and check the whole. Raises ``ConfigError`` with every problem."""
        check_sections(self)
        problems = Problems()
        check_limits(self, problems)
        problems.raise_if_any()
        for name, section in derive.fill(self).items():
            object.__setattr__(self, name, section)
        check_model(self, problems)
        check_training(self, problems)
        problems.raise_if_any()

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Config:
        """Read a YAML file, with ``overrides`` such as ``"encoder.n_layers=2"`` on top. Raises ``ConfigError``."""
        return cls._from_tree(read(path), overrides, str(path))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
        """Read a nested mapping, with or without a ``model`` root. Raises ``ConfigError``."""
        return cls._from_tree(mapping, overrides, "config")

    @classmethod
    def preset(cls, name: str, overrides: Sequence[str] = ()) -> Config:
        """Read one of the shipped files by name: ``nest_large``, ``tiny``. Raises ``ConfigError``."""
        folder = resources.files("nest_fn.configs")
        names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
        if name not in names:
            raise ConfigError([f"unknown preset '{name}'; there are {', '.join(names)}"])
        with resources.as_file(folder / f"{name}.yaml") as path:
            return cls.from_yaml(path, overrides)

    @classmethod
    def _from_tree(cls, tree: Mapping[str, Any], overrides: Sequence[str], source: str) -> Config:
        try:
            return cls._built(tree, overrides, source)
        except ConfigError as error:
            if not overrides:
                raise
            first = error
        try:
            cls._built(tree, (), source)
        except ConfigError as error:
            raise blamed(first, error.problems, overrides) from None
        raise blamed(first, (), overrides)

    @classmethod
    def _built(cls, tree: Mapping[str, Any], overrides: Sequence[str], source: str) -> Config:
        problems = Problems()
        try:
            flat = read_dialect(resolve(apply_overrides(dict(tree), overrides)), problems)
            config = build(cls, flat, "", problems)
        except ConfigError as error:
            raise ConfigError([*problems.lines, *map(problems.as_written, error.problems)], source) from None
        problems.raise_if_any(source)
        if config is None:
            raise AssertionError("a config without problems was not built")
        object.__setattr__(config, "unused", tuple(problems.unused))
        return config

    def override(self, *overrides: str) -> Config:
        """A new config with e.g. ``"encoder.d_model=256"``; values derived from what changes follow it."""
        return type(self).from_dict(self.to_dict(), overrides)

    def to_dict(self) -> dict[str, Any]:
        """The nested mapping of plain values from which ``from_dict`` makes an equal config; derived ones are None."""
        return derive.strip(self, to_plain(self))

    def _shown(self, name: str) -> Any:
        return derive.unfilled(self, name)

    @property
    def frames_per_token(self) -> int:
        """Frames of 10 ms for which there is one token and one row of log-probabilities."""
        return derive.frames_in_token(self)

    @property
    def mask_block(self) -> int:
        """Frames in one masked block where the mask is applied: before or, under post_conv, after subsampling."""
        divisor = self.encoder.subsampling_factor if self.mask_position == "post_conv" else 1
        return self.masking.block_size // divisor

    @property
    def advice(self) -> tuple[str, ...]:
        """Remarks on settings that are legal and seldom meant, or that have no effect here, a line each."""
        return (*advice(self), *self.unused)

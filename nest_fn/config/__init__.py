"""``Config``: all settings of a model and of a run, read strictly from YAML, ours or the reference's.

Start with ``Config.from_yaml("configs/nest_large.yaml", overrides=["encoder.n_layers=2"])``. The dataclasses are frozen
and contain plain values only. A ``Config`` is complete and valid by construction: fields that are ``None`` in a section
are derived from the rest, and inconsistent settings raise ``ConfigError``, also in ``Config(...)`` and
``dataclasses.replace``. To change a value from which others are derived, use
``config.override("encoder.d_model=256")``.

From file to config: ``parse.yaml_io`` (YAML), ``parse.overrides`` (overrides, ``${a.b}``), ``parse.nemo_dialect`` (the
reference's sections to ours), ``parse.coerce`` (types), ``derive`` (derived fields), ``limits`` and ``checks``.
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
from .parse.problems import ConfigError, Problems, blame_overrides
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
    """All settings; ``Config()`` is NEST-Large with the reference's recipe."""

    sample_rate: int = 16000  # Hz; rate of the audio that the model sees; files of another rate are resampled
    num_classes: int = 8192  # codes in each codebook of the quantizer
    num_books: int = 1  # codebooks, each with a projection, and a decoder, of its own
    code_dim: int = 16  # width of a code and of the projected features
    squeeze_single: bool = False  # True: with one codebook, tokens and logits have no axis of codebooks
    mask_position: str = "pre_conv"  # what is masked, features or the subsampling's output: pre_conv, post_conv
    compat: Compat = "current"  # numerics of the reference from 2.5 on or up to 2.4 (reference 0): current, legacy
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
    """Remarks on keys without effect in the file that was read, one for each section; part of ``advice``."""

    def __post_init__(self) -> None:
        """Fill the derived fields and check all settings. Raises ``ConfigError`` listing all problems."""
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
        """Read a YAML file and apply ``overrides`` such as ``"encoder.n_layers=2"``. Raises ``ConfigError``."""
        return cls._from_tree(read(path), overrides, str(path))

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
        """Read a nested mapping, with or without a top-level ``model`` key. Raises ``ConfigError``."""
        return cls._from_tree(mapping, overrides, "config")

    @classmethod
    def preset(cls, name: str, overrides: Sequence[str] = ()) -> Config:
        """Read one of the configurations of the package, such as ``nest_large`` or ``tiny``. Raises ``ConfigError``."""
        folder = resources.files("nest_fn.configs")
        names = sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
        if name not in names:
            raise ConfigError([f"unknown preset '{name}'; there are {', '.join(names)}"])
        with resources.as_file(folder / f"{name}.yaml") as path:
            return cls.from_yaml(path, overrides)

    @classmethod
    def _from_tree(cls, tree: Mapping[str, Any], overrides: Sequence[str], source: str) -> Config:
        try:
            return cls._build(tree, overrides, source)
        except ConfigError as error:
            if not overrides:
                raise
            first = error

        def problems_of(some: Sequence[str]) -> tuple[str, ...]:
            try:
                cls._build(tree, some, source)
            except ConfigError as error:
                return error.problems
            return ()

        raise blame_overrides(first, overrides, problems_of) from None

    @classmethod
    def _build(cls, tree: Mapping[str, Any], overrides: Sequence[str], source: str) -> Config:
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
        """A new config with e.g. ``"encoder.d_model=256"``, its derived values recomputed. Raises ``ConfigError``."""
        return type(self).from_dict(self.to_dict(), overrides)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a nested mapping of plain values for ``from_dict``; derived values are ``None``."""
        return derive.strip(self, to_plain(self))

    def _shown(self, name: str) -> Any:
        return derive.unfilled(self, name)

    @property
    def frames_per_token(self) -> int:
        """Frames of 10 ms per token, and per frame of the encoder's output."""
        return derive.frames_in_token(self)

    @property
    def mask_block(self) -> int:
        """Length of a masked block in the frames that are masked: of 10 ms or, under post_conv, encoder frames."""
        divisor = self.encoder.subsampling_factor if self.mask_position == "post_conv" else 1
        return self.masking.block_size // divisor

    @property
    def advice(self) -> tuple[str, ...]:
        """Remarks, one line each, on settings that are valid but probably a mistake, or that have no effect."""
        return (*advice(self), *self.unused)

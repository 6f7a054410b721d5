"""Converts a batch in any format of the original PureTorchSSLModel interface to the mapping of ``nest_fn.model``.

The formats: an object with the attributes ``audio``, ``audio_len``, ``noisy_audio``, ``noisy_audio_len`` (a dataclass,
a named tuple, the reference's AudioNoiseBatch with its ``sample_id``); a tuple ``(audio, audio_len, noise, noise_len,
noisy_audio, noisy_audio_len)``, optionally preceded by the reference's ``sample_id``; a mapping with the four names,
which may also have ``row`` and ``weight`` of ``nest_fn.model``. The noise itself is ignored: the noisy signal contains
it already.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nest_fn.layers.types import Tensor

NAMES = ("audio", "audio_len", "noisy_audio", "noisy_audio_len")
OPTIONAL = ("row", "weight")
_TUPLE = ("audio", "audio_len", "noise", "noise_len", "noisy_audio", "noisy_audio_len")
_FORMATS = f"want an object with {', '.join(NAMES)}, a mapping with these names, or a tuple ({', '.join(_TUPLE)})"


def as_batch(batch: Any, device: torch.device | None = None) -> dict[str, Tensor]:
    """The batch as a mapping of tensors, moved to ``device`` unless that is None.

    Signals are float or int16 ``[B, N]``, lengths integers ``[B]`` in samples. Raises ``ValueError`` for an unknown
    format, missing parts, and wrong shapes or dtypes.
    """
    tensors = _parts(batch)
    missing = [name for name in NAMES if tensors.get(name) is None]
    if missing:
        unmixed = " It has not been mixed with noise yet;" if missing == list(NAMES[2:]) else ""
        raise ValueError(
            f"batch: {', '.join(missing)} missing.{unmixed} for clean input give the clean audio as noisy_audio too."
        )
    for name, value in tensors.items():
        _check(name, value, tensors["audio"])
    return {name: value if device is None else value.to(device, non_blocking=True) for name, value in tensors.items()}


def _parts(batch: Any) -> dict[str, Any]:
    """The four parts, and the optional ones that a mapping has, unchecked."""
    if isinstance(batch, Mapping):
        return {name: batch[name] for name in (*NAMES, *OPTIONAL) if batch.get(name) is not None}
    if all(hasattr(batch, name) for name in NAMES):
        return {name: getattr(batch, name) for name in NAMES}
    if isinstance(batch, tuple | list):
        values = list(batch)
        if len(values) == len(_TUPLE) + 1 and not isinstance(values[0], Tensor):
            values = values[1:]  # sample_id
        if len(values) == len(_TUPLE):
            parts = dict(zip(_TUPLE, values, strict=True))
            return {name: parts[name] for name in NAMES}
        raise ValueError(f"batch: a {type(batch).__name__} of {len(batch)}; {_FORMATS}.")
    raise ValueError(f"batch: a {type(batch).__name__}; {_FORMATS}.")


def _check(name: str, value: Any, audio: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"batch: {name} is a {type(value).__name__}; want a tensor.")
    if name in ("audio", "noisy_audio"):
        if value.ndim != 2 or not (value.is_floating_point() or value.dtype == torch.int16):
            raise ValueError(f"batch: {name} is {value.dtype} {list(value.shape)}; want float or int16 samples [B, N].")
        return
    whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if tuple(value.shape) != tuple(audio.shape[:1]) or not (whole or name == "weight"):
        kind = "numbers" if name == "weight" else "whole numbers"
        raise ValueError(
            f"batch: {name} is {value.dtype} {list(value.shape)}; want {kind} {list(audio.shape[:1])}, one a row."
        )


def signal_parts(
    what: str, name: str, raw: Tensor | None, raw_len: Tensor | None, processed: Tensor | None,
    processed_len: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The entries of one signal in the core's batch: ``audio`` or, if it is processed, ``features``, and its lengths.

    ``raw [B, N]``, ``processed [B, M, F]``. Raises ``ValueError`` unless exactly one of the two is given, with lengths.
    """
    given = [value is not None for value in (raw, raw_len, processed, processed_len)]
    if raw is not None and raw_len is not None and not any(given[2:]):
        return {name: raw, f"{name}_len": raw_len}
    if processed is not None and processed_len is not None and not any(given[:2]):
        features = name.replace("audio", "features")
        return {features: processed, f"{features}_len": processed_len}
    kinds = ("raw", "the raw one's lengths", "processed", "the processed one's lengths")
    got = ", ".join(kind for kind, here in zip(kinds, given, strict=True) if here) or "nothing"
    raise ValueError(
        f"forward: the {what} is wanted either raw or processed, with its lengths; got {got}. "
        "For clean input give the clean signal as the noisy one too."
    )

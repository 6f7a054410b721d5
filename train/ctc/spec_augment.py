"""SpecAugment (arXiv 1904.08779) by torchaudio's transforms, with random numbers from keys.

The transforms draw with ``torch.rand``. A torch function mode gives them numbers of the utterance's key instead: the
global generator is neither read nor changed, and the masks depend neither on the batch nor on its padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from nest_fn.layers import random
from nest_fn.layers.types import Key, Tensor
from nest_fn.train.errors import UsageError


class SpecAugment(NamedTuple):
    """Number and width of the masks; 0 masks: off."""

    time_masks: int = 0
    time_width: int = 25  # at most, frames of 10 ms
    time_share: float = 0.05  # at most, of the utterance, for each mask
    freq_masks: int = 0
    freq_width: int = 15  # at most, mel bins


def spec_augment(features: Tensor, lengths: Sequence[int], masks: SpecAugment, keys: Key) -> Tensor:
    """Set blocks of frames and of mel bins to 0, the mean of normalised features: ``[B, M, F] -> [B, M, F]``.

    ``lengths``, in frames, bound the masks of each row; ``keys`` are int64 ``[B, 2]``. Raises
    ``UsageError`` if masks are wanted and torchaudio does not load.
    """
    if not masks.time_masks and not masks.freq_masks:
        return features
    try:
        from torchaudio.transforms import FrequencyMasking, TimeMasking
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError("SpecAugment wants torchaudio, which does not load; set the numbers of masks to 0") from error
    time = TimeMasking(masks.time_width, iid_masks=True, p=masks.time_share)
    freq = FrequencyMasking(masks.freq_width, iid_masks=True)
    rows = []
    for row, key, length in zip(features, keys.unbind(0), lengths, strict=True):
        made = row[None, :, :length]
        with _KeyedUniform(key):
            for transform in [time] * masks.time_masks + [freq] * masks.freq_masks:
                made = transform(made)
        rows.append(torch.cat((made[0], row[:, length:]), dim=1))
    return torch.stack(rows)


class _KeyedUniform(TorchFunctionMode):
    """While it is entered, ``torch.rand`` draws from keys derived from one key, the n-th call from the n-th."""

    def __init__(self, key: Key) -> None:
        super().__init__()
        self._key, self._calls = key, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.rand:
            return func(*args, **kwargs)
        self._calls += 1
        shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
        with torch._C.DisableTorchFunction():
            drawn = random.uniform(random.fold_in(self._key, self._calls), tuple(shape))
        return drawn.to(device=kwargs.get("device"), dtype=kwargs.get("dtype"))

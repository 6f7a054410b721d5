"""An encoder over a recording of any length: windows, of which the frames that know enough context are joined.

With limited attention context the joined frames are those of the whole recording: a window has, on both sides of the
frames that are kept, as many as these depend on. Otherwise no part can equal the whole, and the rule is: windows of
equal length, each beginning two thirds of a window after the one before, the last one ending with the recording; a
frame is taken of the window in which it lies further from an end. Features are normalised over the whole recording in
both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F

from nest_fn.config import Config
from nest_fn.encoder import encode_frames, subsample_features, subsampling_spec
from nest_fn.frontend import frames
from nest_fn.hidden_states import layer_numbers
from nest_fn.layers.subsampling import subsampled_length
from nest_fn.layers.types import Params, State, Tensor

from .mel import Read, Statistics, mel_frames, normalized, recording_statistics
from .reach import Reach, encoder_reach


class Window(NamedTuple):
    """Encoder frames ``[first, last)`` are computed, and ``[begin, end)`` of them are kept."""

    first: int
    last: int
    begin: int
    end: int


class Piece(NamedTuple):
    """What one window yields: frames from ``begin`` on, and its normalised log-mel of the frames that are kept."""

    begin: int  # encoder frame
    frames: tuple[Tensor, ...]  # one layer each, [t, D]
    mel: Tensor  # [1, M, F]


def windows(total: int, size: int, reach: Reach | None) -> Iterator[Window]:
    """Windows that cover ``total`` encoder frames; ``size`` is the least length of one, in encoder frames.

    With a reach, windows are as long as twice the reach at least, so that at most half of the work is done twice.
    """
    if total <= size:
        yield Window(0, total, 0, total)
    elif reach is None:
        yield from _equal_windows(total, size)
    else:
        step = max(size - reach.left - reach.right, reach.left + reach.right, 1)
        for begin in range(0, total, step):
            end = min(begin + step, total)
            first = max(0, begin - reach.left) // reach.period * reach.period
            yield Window(first, min(end + reach.right, total), begin, end)


def _equal_windows(total: int, size: int) -> Iterator[Window]:
    side = size // 6
    firsts = [*range(0, total - size, max(size - 2 * side, 1)), total - size]
    begins = [0] + [(before + size + after) // 2 for before, after in pairwise(firsts)]
    for first, begin, end in zip(firsts, begins, [*begins[1:], total], strict=True):
        yield Window(first, first + size, begin, end)


def encoder_frames(samples: int, cfg: Config) -> int:
    """Encoder frames of a recording of ``samples`` samples."""
    count = frames(samples, cfg.preprocessor)
    pad_to = cfg.preprocessor.pad_to
    width = count + (-count % pad_to if pad_to > 0 else 0)
    return cast(int, subsampled_length(count, subsampling_spec(cfg.encoder), width))


def recording_features(
    params: Params, state: State, read: Read, samples: int, cfg: Config, layers: Sequence[int] | None, seconds: float
) -> Iterator[Piece]:
    """Outputs of the blocks ``layers`` (as in ``features``) over windows of at least ``seconds``, in order.

    Memory does not grow with ``samples``. Raises ``ValueError`` for an encoder that reduces its frames after a block.
    """
    chosen = layer_numbers(cfg.encoder.n_layers, layers)

    def encode(mel: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        x, short = subsample_features(params["encoder"], mel, lengths, cfg.encoder)
        encoded = encode_frames(params["encoder"], state["encoder"], x, short, cfg.encoder, layers=sorted(set(chosen)))
        made = dict(zip(sorted(set(chosen)), encoded.outputs, strict=True))
        return tuple(made[layer] for layer in chosen)

    yield from over_windows(encode, read, samples, cfg, seconds)


def over_windows(
    encode: Callable[[Tensor, Tensor], tuple[Tensor, ...]], read: Read, samples: int, cfg: Config, seconds: float
) -> Iterator[Piece]:
    """Apply ``encode`` (mel ``[1, M, F]``, lengths ``[1]`` -> layers ``[1, T, D]``) to the windows of a recording.

    ``encode`` must not depend on more than the encoder does. Raises ``ValueError`` as ``recording_features``.
    """
    if cfg.encoder.reduction is not None:
        raise ValueError("windows: an encoder with reduction has frames of two rates, which are not joined; cut the "
                         "recording, or raise data.batch_seconds.")  # fmt: skip
    factor = cfg.encoder.subsampling_factor if subsampling_spec(cfg.encoder).kind else 1
    size = max(1, round(seconds * cfg.sample_rate) // (factor * cfg.preprocessor.hop_length))
    statistics = recording_statistics(read, samples, cfg.preprocessor, size * factor)
    for window in windows(encoder_frames(samples, cfg), size, encoder_reach(cfg.encoder)):
        mel = _window_mel(read, samples, window, factor, statistics, cfg)
        lengths = torch.tensor([mel.shape[2]], device=mel.device)
        made = encode(_padded(mel, samples, window, cfg), lengths)
        kept = slice(window.begin - window.first, window.end - window.first)
        inside = slice(kept.start * factor, kept.stop * factor)
        yield Piece(window.begin, tuple(layer[0, kept] for layer in made), mel[:, :, inside])


def _window_mel(read: Read, samples: int, window: Window, factor: int, statistics: Statistics, cfg: Config) -> Tensor:
    at_end = window.last == encoder_frames(samples, cfg)
    last = frames(samples, cfg.preprocessor) if at_end else window.last * factor
    mel = mel_frames(read, samples, window.first * factor, last, cfg.preprocessor)
    return normalized(mel, statistics, cfg.preprocessor)


def _padded(mel: Tensor, samples: int, window: Window, cfg: Config) -> Tensor:
    """The last window with the padding that the whole recording would have; others as they are."""
    pad_to, total = cfg.preprocessor.pad_to, frames(samples, cfg.preprocessor)
    if window.last != encoder_frames(samples, cfg) or pad_to <= 0:
        return mel
    return F.pad(mel, (0, -total % pad_to), value=cfg.preprocessor.pad_value)

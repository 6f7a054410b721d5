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
from nest_fn.encoder import encode_frames, reduced_length, subsample_features, subsampling_spec
from nest_fn.frontend import frames
from nest_fn.hidden_states import are_reduced, layer_numbers
from nest_fn.layers.subsampling import subsampled_length
from nest_fn.layers.types import Params, State, Tensor

from .mel import Read, Statistics, mel_frames, normalized, recording_statistics
from .reach import Reach, encoder_reach, reduction_factor


class Window(NamedTuple):
    """Encoder frames ``[first, last)`` are computed, and ``[begin, end)`` of them are kept."""

    first: int
    last: int
    begin: int
    end: int


class Piece(NamedTuple):
    """What one window yields: frames from ``begin`` on, and its normalised log-mel of the frames that are kept."""

    begin: int  # frame of the layers
    frames: tuple[Tensor, ...]  # one layer each, [t, D]
    mel: Tensor  # [1, M, F]


def windows(total: int, size: int, reach: Reach | None, grid: int = 1) -> Iterator[Window]:
    """Windows that cover ``total`` encoder frames; ``size`` is the least length of one, in encoder frames.

    With a reach, windows are as long as twice the reach at least, so that at most half of the work is done twice. All
    begin, and begin to be kept, at multiples of ``grid``, of which the reach's period is one too.
    """
    if total <= size:
        yield Window(0, total, 0, total)
    elif reach is None:
        yield from _equal_windows(total, max(grid, size // grid * grid), grid)
    else:
        step = -(-max(size - reach.left - reach.right, reach.left + reach.right, 1) // grid) * grid
        for begin in range(0, total, step):
            end = min(begin + step, total)
            first = max(0, begin - reach.left) // reach.period * reach.period
            yield Window(first, min(end + reach.right, total), begin, end)


def _equal_windows(total: int, size: int, grid: int) -> Iterator[Window]:
    step = max(size - 2 * (size // 6 // grid * grid), grid)
    firsts = [*range(0, total - size, step), -(-(total - size) // grid) * grid]
    begins = [0] + [(before + size + after) // 2 // grid * grid for before, after in pairwise(firsts)]
    for first, begin, end in zip(firsts, begins, [*begins[1:], total], strict=True):
        yield Window(first, min(first + size, total), begin, end)


def encoder_frames(samples: int, cfg: Config, reduced: bool = True) -> int:
    """Encoder frames of a recording of ``samples`` samples, after the encoder's reduction if it has one, or before."""
    made = _frames_before_reduction(samples, cfg)
    return cast(int, reduced_length(made, cfg.encoder)) if reduced else made


def _frames_before_reduction(samples: int, cfg: Config) -> int:
    count = frames(samples, cfg.preprocessor)
    pad_to = cfg.preprocessor.pad_to
    width = count + (-count % pad_to if pad_to > 0 else 0)
    return cast(int, subsampled_length(count, subsampling_spec(cfg.encoder), width))


def recording_features(
    params: Params, state: State, read: Read, samples: int, cfg: Config, layers: Sequence[int] | None, seconds: float
) -> Iterator[Piece]:
    """Outputs of the blocks ``layers`` (as in ``features``) over windows of at least ``seconds``, in order.

    Memory does not grow with ``samples``. Raises ``ValueError`` as ``features``.
    """
    chosen = layer_numbers(cfg.encoder.n_layers, layers)
    reduced = are_reduced(cfg.encoder, chosen)

    def encode(mel: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        x, short = subsample_features(params["encoder"], mel, lengths, cfg.encoder)
        encoded = encode_frames(params["encoder"], state["encoder"], x, short, cfg.encoder, layers=sorted(set(chosen)))
        made = dict(zip(sorted(set(chosen)), encoded.outputs, strict=True))
        return tuple(made[layer] for layer in chosen)

    yield from over_windows(encode, read, samples, cfg, seconds, reduced)


def over_windows(
    encode: Callable[[Tensor, Tensor], tuple[Tensor, ...]], read: Read, samples: int, cfg: Config, seconds: float,
    reduced: bool = True,
) -> Iterator[Piece]:  # fmt: skip
    """Apply ``encode`` (mel ``[1, M, F]``, lengths ``[1]`` -> layers ``[1, T, D]``) to the windows of a recording.

    ``encode`` must not depend on more than the encoder does. ``reduced`` says whether its frames are those after the
    encoder's reduction, if it has one.
    """
    factor = cfg.encoder.subsampling_factor if subsampling_spec(cfg.encoder).kind else 1
    size = max(1, round(seconds * cfg.sample_rate) // (factor * cfg.preprocessor.hop_length))
    statistics = recording_statistics(read, samples, cfg.preprocessor, size * factor)
    total, grid = _frames_before_reduction(samples, cfg), reduction_factor(cfg.encoder)
    rate = grid if reduced else 1  # encoder frames in a frame of the layers
    for window in windows(total, size, encoder_reach(cfg.encoder), grid):
        mel = _window_mel(read, samples, window, factor, statistics, cfg)
        lengths = torch.tensor([mel.shape[2]], device=mel.device)
        made = encode(_padded(mel, samples, window, cfg), lengths)
        begin, first = window.begin // rate, window.first // rate
        end = encoder_frames(samples, cfg, reduced) if window.end == total else window.end // rate
        inside = slice((begin - first) * rate * factor, (end - first) * rate * factor)
        yield Piece(begin, tuple(layer[0, begin - first : end - first] for layer in made), mel[:, :, inside])


def _window_mel(read: Read, samples: int, window: Window, factor: int, statistics: Statistics, cfg: Config) -> Tensor:
    at_end = window.last == _frames_before_reduction(samples, cfg)
    last = frames(samples, cfg.preprocessor) if at_end else window.last * factor
    mel = mel_frames(read, samples, window.first * factor, last, cfg.preprocessor)
    return normalized(mel, statistics, cfg.preprocessor)


def _padded(mel: Tensor, samples: int, window: Window, cfg: Config) -> Tensor:
    """The last window with the padding that the whole recording would have; others as they are."""
    pad_to, total = cfg.preprocessor.pad_to, frames(samples, cfg.preprocessor)
    if window.last != _frames_before_reduction(samples, cfg) or pad_to <= 0:
        return mel
    return F.pad(mel, (0, -total % pad_to), value=cfg.preprocessor.pad_value)

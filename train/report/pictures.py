"""Pictures of data and of utterances: durations, padding by bucket, log-mel with mask, targets and predictions."""

from __future__ import annotations

from typing import Any

import numpy as np

from nest_fn.config import Config
from nest_fn.config.required import required
from nest_fn.train.data.dataset import Dataset

from .drawing import COLOURS, drawing, to_svg
from .examples import Utterance

_HIDDEN = "#e9ecf0"
_RIGHT, _WRONG, _SEEN = "#2d8a4e", "#b03a5b", "#d5d9df"


def duration_histogram(dataset: Dataset, widths_s: list[float]) -> str:
    """How long the utterances are, and the widths of the buckets."""
    seconds = np.minimum(dataset.manifest.duration, dataset.config.max_duration)
    with drawing() as figure:
        axes = figure.subplots()
        axes.hist(seconds, bins=min(40, max(8, len(seconds) // 10)), color=COLOURS[0], alpha=0.8)
        for width in widths_s:
            axes.axvline(width, color="#8a8f98", linestyle=":", linewidth=1.0)
        axes.set(xlabel="seconds (dotted: widths of the buckets)", title="utterances by duration")
        return to_svg(figure, "utterances by duration")


def padding_bars(by_bucket: list[tuple[float, float, float]]) -> str:
    """Hours of audio and of padding in an epoch, by bucket: ``(width in s, audio in h, padding in h)``."""
    with drawing() as figure:
        axes = figure.subplots()
        names = [f"{width:.1f} s" for width, _, _ in by_bucket]
        audio, padding = ([one[place] for one in by_bucket] for place in (1, 2))
        axes.bar(names, audio, color=COLOURS[0], label="audio")
        axes.bar(names, padding, bottom=audio, color="#d5d9df", label="padding")
        axes.set(title="hours of an epoch by bucket")
        axes.tick_params(axis="x", labelrotation=0 if len(names) < 8 else 45)
        axes.grid(axis="x", visible=False)
        axes.legend()
        return to_svg(figure, "audio and padding by bucket")


def utterance_picture(one: Utterance, cfg: Config) -> str:
    """Log-mel clean and as the model hears it, with what is hidden; below, targets, guesses, and which are right."""
    hop = required(cfg.preprocessor.window_stride, "preprocessor.window_stride")
    token = hop * cfg.encoder.subsampling_factor
    with drawing(9.0, 3.9) as figure:
        clean, noisy, codes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.5))
        for axes, mel, title in (
            (clean, one.clean_mel, "clean, log-mel"), (noisy, one.noisy_mel, "as the model hears it; pale: hidden"),
        ):  # fmt: skip
            low, high = np.quantile(mel, (0.02, 0.995)) if mel.size else (0.0, 1.0)
            axes.imshow(
                mel, origin="lower", aspect="auto", cmap="magma", vmin=low, vmax=high, interpolation="nearest",
                extent=(0, mel.shape[1] * hop, 0, mel.shape[0]),
            )  # fmt: skip
            axes.set(title=title, ylabel="mel bin")
            axes.grid(False)
        for start, end in _spans(one.mask):
            noisy.axvspan(start * hop, end * hop, color=_HIDDEN, alpha=0.85, linewidth=0)
        _draw_codes(codes, one, token)
        return to_svg(figure, f"log-mel, mask, targets and guesses of {one.name}")


def _draw_codes(axes: Any, one: Utterance, token: float) -> None:
    """Three rows: target and guess coloured by code, and whether the guess is right where the token was hidden."""
    from matplotlib.colors import hsv_to_rgb, to_rgb

    def coloured(codes: Any) -> Any:
        hue = (np.asarray(codes) * 0.61803398875) % 1.0  # neighbouring codes look different
        light = 0.6 + 0.35 * ((np.asarray(codes) * 0.754877666) % 1.0)
        return hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.55), light], axis=-1))

    right = one.targets == one.guesses
    kinds = np.where(one.masked, np.where(right, 0, 1), 2)
    judged = np.array([to_rgb(colour) for colour in (_RIGHT, _WRONG, _SEEN)])[kinds]
    rows = np.stack([judged, coloured(one.guesses), coloured(one.targets)])
    axes.imshow(rows, origin="lower", aspect="auto", interpolation="nearest", extent=(0, len(right) * token, 0, 3))
    axes.set_yticks([0.5, 1.5, 2.5], ["right?", "guess", "target"])
    axes.set(xlabel="seconds", title="tokens, a colour a code; green: hidden and right, red: hidden and wrong")
    axes.grid(False)


def _spans(mask: Any) -> list[tuple[int, int]]:
    """Beginnings and ends of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]

"""What a run reports: sums over steps as means and fractions, and warnings where these look wrong."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nest_fn.layers.types import Tensor

Sums = dict[str, Tensor]

SUMMED = ("loss_sum", "masked_tokens", "correct", "overflow", "valid_tokens", "token_counts", "masked_token_counts",
          "audio_samples", "padded_samples", "unmasked_tokens", "unmasked_correct")  # fmt: skip


def add(window: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> Sums:
    """Add one step to a window of steps; an empty window starts one.

    Sums stay on the device of their metrics, so that the host waits for none before it reports them. Of the metrics
    that are no sums, the last ``grad_norm`` is kept; the others are left out.
    """
    step = {name: metrics[name].detach().to(torch.float64) for name in SUMMED if name in metrics}
    step |= {"steps": torch.ones((), dtype=torch.float64), "skipped": torch.zeros((), dtype=torch.float64)}
    sums = {name: window[name].to(value.device) + value if name in window else value for name, value in step.items()}
    last = {"grad_norm": metrics["grad_norm"].detach()} if "grad_norm" in metrics else {}
    return {**window, **sums, **last}


def skip(window: Mapping[str, Tensor], metrics: Mapping[str, Tensor]) -> Sums:
    """Add one step whose update was skipped: it counts in ``steps`` and ``skipped`` alone."""
    window = add(window, {name: torch.zeros_like(metrics[name]) for name in SUMMED if name in metrics})
    return {**window, "skipped": window["skipped"] + 1}


def summarise(window: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over a window's tokens.

    ``loss`` in nats; ``accuracy`` over masked tokens and ``unigram_accuracy``, that of always guessing the commonest
    masked token of the window; ``masked_share``, the fraction of valid tokens that are masked; ``coverage``, the
    fraction of codes that occur, and ``perplexity``, the exponential of the entropy of their counts, each a mean over
    the books.
    """
    window = {name: value.to("cpu") for name, value in window.items()}
    masked = float(window["masked_tokens"])
    books = window["token_counts"].shape[0]
    counts = window["token_counts"]
    fraction = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    entropy = -torch.special.xlogy(fraction, fraction).sum(dim=1)
    guess = window["masked_token_counts"].max(dim=1).values.sum()
    return {
        "loss": float(window["loss_sum"]) / max(masked, 1.0),
        "accuracy": float(window["correct"]) / max(masked, 1.0),
        "unigram_accuracy": float(guess) / max(masked, 1.0),
        "masked_share": masked / max(float(window["valid_tokens"]) * books, 1.0),
        "masked_tokens": masked,
        "coverage": float((counts > 0).double().mean()),
        "perplexity": float(entropy.exp().mean()),
        "overflow": float(window["overflow"]),
    }


def warnings(values: Mapping[str, float], classes: int, step: int, warmup: int) -> dict[str, str]:
    """Signs that a run goes wrong, one sentence for each kind; empty if there are none."""
    found = {}
    if values["masked_tokens"] == 0 and not values.get("skipped"):
        found["unmasked"] = "no token was masked, nothing was learnt; are utterances shorter than masking.block_size?"
    if values["overflow"] > 0:
        found["overflow"] = f"{values['overflow']:.0f} masked tokens were left out; raise loss.capacity."
    if values["masked_tokens"] > 20 * classes and values["perplexity"] < 0.05 * classes:
        found["collapse"] = (
            f"the quantizer uses few codes (perplexity {values['perplexity']:.1f} of {classes}); "
            "is the audio silent, or preprocessor.normalize off?"
        )
    if step > warmup and values["masked_tokens"] >= 2000 and values["accuracy"] < values["unigram_accuracy"] + 0.005:
        found["unlearnt"] = (
            f"masked accuracy {values['accuracy']:.3f} is not above always guessing the commonest token "
            f"({values['unigram_accuracy']:.3f}); the model has not learnt from context yet."
        )
    return found

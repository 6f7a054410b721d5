"""A run in words: how far it is, whether it has learnt, and what looks wrong. Each sentence names its number."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import isfinite, log
from statistics import median
from typing import NamedTuple

from .record import Record

ABOVE_GUESS = 0.005  # accuracy above the commonest token's from which a model counts as having learnt
_TAIL = 5  # lines of metrics that count as the end of a run


class Sentence(NamedTuple):
    """One finding: ``good``, ``bad``, or ``plain``."""

    kind: str
    text: str


def verdict(record: Record) -> list[Sentence]:
    """What is known of a run, the most important first."""
    if not record.steps:
        return [_state(record), Sentence("plain", "It has recorded no metrics yet.")]
    found = [_state(record), *_learning(record), *_validation(record), *_codes(record), *_stability(record)]
    return [*found, *_speed(record)]


def _state(record: Record) -> Sentence:
    done, total = record.done, record.cfg.trainer.max_steps
    far = f"{done:,} of {total:,} updates ({done / total:.0%})"
    if record.holder is not None:
        return Sentence("plain", f"In progress: {far}; {record.holder} is writing it.")
    if record.error is not None:
        return Sentence("bad", f"Ended with an error after {far}: {record.error}")
    if record.finished:
        return Sentence("good", f"Finished: {far}.")
    return Sentence("plain", f"Stopped after {far}; the same command goes on from there.")


def _learning(record: Record) -> Iterator[Sentence]:
    valid = bool(record.valid)
    accuracy, guess = record.last("accuracy", valid), record.last("unigram_accuracy", valid)
    where = "on validation data" if valid else "on training data (there is no validation)"
    if accuracy is None or guess is None:
        return
    if accuracy >= guess + ABOVE_GUESS:
        times = f"{accuracy / guess:.1f} times as many as by" if guess > 0 else "more than by"
        yield Sentence(
            "good",
            f"It has learnt from context: {accuracy:.1%} of the masked tokens are right {where}, {times} always "
            f"guessing the commonest token ({guess:.1%}).",
        )
    else:
        yield Sentence(
            "bad",
            f"It has not learnt from context: {accuracy:.1%} of the masked tokens are right {where}, and always "
            f"guessing the commonest token is right in {guess:.1%}.",
        )
    loss, perplexity = record.last("loss", valid), record.last("perplexity", valid)
    if loss is not None and perplexity is not None and perplexity >= 1:
        bound = log(perplexity)
        side = "less" if loss < bound else "more"
        yield Sentence(
            "plain",
            f"The loss is {loss:.3f} nats {where}, {abs(bound - loss):.3f} {side} than by guessing each token by its "
            f"frequency (about {bound:.3f}).",
        )


def _validation(record: Record) -> Iterator[Sentence]:
    """Whether the validation loss still falls, or rises again."""
    steps, losses = record.series("loss", valid=True)
    if len(losses) < 3 or not all(map(isfinite, losses)):
        return
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[-1] > 1.02 * losses[best]:
        yield Sentence(
            "bad",
            f"The validation loss was lowest at step {steps[best]:,} ({losses[best]:.3f}) and has risen to "
            f"{losses[-1]:.3f}; more data, more noise or fewer steps are called for.",
        )
    elif best == len(losses) - 1:
        fall = losses[-2] - losses[-1]
        yield Sentence(
            "plain",
            f"The validation loss fell to the end, by {fall:.3f} nats from step {steps[-2]:,} to {steps[-1]:,}.",
        )


def _codes(record: Record) -> Iterator[Sentence]:
    valid = bool(record.valid)
    coverage, perplexity = record.last("coverage", valid), record.last("perplexity", valid)
    if coverage is None or perplexity is None:
        return
    classes = record.cfg.num_classes
    poor = perplexity < 0.05 * classes
    text = f"The quantizer uses {coverage:.1%} of {classes:,} codes, as evenly as {perplexity:,.0f} equally common ones"
    yield Sentence("bad" if poor else "plain", f"{text}{': few, a sign of collapse' if poor else ''}.")


def _stability(record: Record) -> Iterator[Sentence]:
    skipped = sum(int(line.get("skipped", 0)) for line in record.steps)
    if skipped:
        yield Sentence("bad", f"{skipped:,} updates were skipped, for they were not finite or above trainer.skip_norm.")
    if record.failures:
        yield Sentence("bad", f"A dump of the state before step {record.failures[-1]:,} is there for nest-fn replay.")
    norms = [norm for norm in record.series("grad_norm")[1] if isfinite(norm) and norm > 0]
    if len(norms) >= 2 * _TAIL:
        middle, most = median(norms), max(norms[_TAIL:])
        if most > 10 * middle:
            yield Sentence("bad", f"The gradient norm has peaks of {most:.3g}, {most / middle:.0f} times its median.")
    _, losses = record.series("loss")
    jumps = sum(after > 1.5 * before for before, after in pairwise(losses) if isfinite(after))
    if jumps:
        yield Sentence("bad", f"The training loss jumped by more than half {jumps} times.")
    if record.warnings:
        yield Sentence("plain", f"It warned {len(record.warnings)} times; the warnings are listed below.")


def _speed(record: Record) -> Iterator[Sentence]:
    rates = [line["time"]["audio_seconds_per_second"] for line in record.steps if "time" in line]
    if rates:
        threads = record.environment.get("threads", "?")
        devices = record.environment.get("devices") or [f"{threads} CPU thread{'' if threads == 1 else 's'}"]
        rate = median(rates)
        names = ", ".join(sorted(set(map(str, devices))))
        yield Sentence("plain", f"It processed {rate:,.0f} seconds of audio a second (median) on {names}.")

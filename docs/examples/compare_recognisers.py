"""Is one recogniser better than another? Character error rates of what `nest-fn transcribe` wrote, and an interval.

    python docs/examples/compare_recognisers.py scratch_0.jsonl,scratch_1.jsonl init_0.jsonl,init_1.jsonl

Each argument is one way of training, its files the same test set recognised after training from one seed each. The
interval of the difference is a paired bootstrap (Bisani and Ney, "Bootstrap estimates for confidence intervals in ASR
performance evaluation", ICASSP 2004): utterances are drawn with replacement, the same for both ways, and so are seeds,
for each way in the same position. It is the smaller the more the two err on the same utterances.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nest_fn.train.ctc.scores import count_errors
from nest_fn.train.studies.statistics import Difference, paired

RESAMPLES = 10_000
Array = NDArray[np.float64]


class Comparison(NamedTuple):
    """Error rates by seed of two ways of training, and the second's minus the first's."""

    first: list[float]
    second: list[float]
    difference: float
    interval: tuple[float, float]  # of 95 %, over utterances and seeds
    over_seeds: Difference  # Student's interval, over seeds alone


def errors(path: str) -> tuple[Array, Array]:
    """Wrong characters and characters ``[N]`` of a file's utterances, in its order."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    counts = [count_errors([(line["text"], line["reference"])]) for line in lines]
    return np.array([one.wrong_characters for one in counts], float), np.array(
        [one.characters for one in counts], float
    )


def compare(first: Sequence[str], second: Sequence[str]) -> Comparison:
    """Compare two ways of training by as many files each. Raises ``ValueError`` if their utterances differ."""
    read = [errors(path) for path in (*first, *second)]
    if len(first) != len(second) or any(not np.array_equal(read[0][1], characters) for _, characters in read):
        raise ValueError("compare: want as many files of both, of the same utterances in the same order.")
    characters, wrong = read[0][1], np.stack([one for one, _ in read]).reshape(2, len(first), -1)
    rates = wrong.sum(-1) / characters.sum()
    random = np.random.Generator(np.random.Philox(0))
    drawn = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        utterances = random.integers(0, len(characters), len(characters))
        seeds = random.integers(0, len(first), len(first))
        changed = (wrong[1] - wrong[0])[seeds][:, utterances]
        drawn[index] = changed.sum() / (len(first) * characters[utterances].sum())
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    one, two = rates.tolist()
    return Comparison(one, two, float(rates[1].mean() - rates[0].mean()), (low, high), paired(one, two))


def main() -> None:
    found = compare(*(argument.split(",") for argument in sys.argv[1:3]))
    for name, rates in (("first ", found.first), ("second", found.second)):
        print(f"{name}  CER {np.mean(rates):.4f}  by seed {', '.join(f'{rate:.4f}' for rate in rates)}")
    low, high = found.interval
    print(f"second - first  {found.difference:+.4f}, 95 % from {low:+.4f} to {high:+.4f} (utterances and seeds)")
    if len(found.first) > 1:
        low, high = found.over_seeds.interval
        print(f"over seeds alone, Student's: from {low:+.4f} to {high:+.4f}, p = {found.over_seeds.p:.4f}")


if __name__ == "__main__":
    main()

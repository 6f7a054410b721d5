"""Fifty training steps, from files to losses, against numbers that were written down once (tests/golden/losses.json).

A change of any part of the way (reading, planning, mixing, masking, model, loss, gradient, optimiser, schedule) that
changes numbers is seen here, whatever it was meant to do. If it was meant, write the numbers down anew, look at the
difference, and say in the commit why they moved:

    OMP_NUM_THREADS=1 python -m tests.test_golden_losses

The audio is made by integer arithmetic, so it is the same on every machine; sums of floats are not. Vectors of another
width (ATEN_CPU_CAPABILITY=default, avx2, avx512), other kernels below (MKL's compatible ones, no oneDNN, oneDNN for
SSE4.1) and two threads moved the losses by at most 1.7e-7 of themselves and the gradient norms by 4e-7, at step 50 no
more than at step 5. A second moment that forgets by 0.981 instead of 0.98 moves them by 2e-5 within ten steps.
"""

from __future__ import annotations

import json
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nest_fn import Config
from nest_fn.layers import random
from nest_fn.train.data.audio_files.wav import write_wav
from nest_fn.train.data.corpus.manifest import write_manifest
from nest_fn.train.data.dataset import batches, open_dataset
from nest_fn.train.data.transfer import to_device
from nest_fn.train.hash_rng import randint_below, random_words, stream_key
from nest_fn.train.step.step import init_train_state, make_step

FILE = Path(__file__).parent / "golden" / "losses.json"
STEPS = 50
TOLERANCE = 1e-5  # relative
Line = dict[str, float]


def _integers(name: str, row: int, count: int, bound: int) -> NDArray[np.int64]:
    """Random integers in ``[-bound, bound)``."""
    word = random_words(stream_key(0, name, 0), np.array([row], np.int64), count)[0]
    return randint_below(word, 2 * bound) - bound


def _speech(row: int) -> NDArray[np.int16]:
    """Syllables of 100 ms, each one of six triangle waves, in a little noise."""
    count = 16000 + 2000 * (row % 9)
    period = 40 + 25 * (randint_below(random_words(stream_key(0, "syllable", 0), np.array([row], np.int64), 64)[0], 6))
    at = np.arange(count)
    wave = np.abs((at * 512 // period[at // 1600]) % 512 - 256) - 128
    return (wave * (20 + at % 1600 // 40) + _integers("hiss", row, count, 200)).astype(np.int16)


def _write(folder: Path, name: str, clips: list[NDArray[np.int16]]) -> str:
    for number, clip in enumerate(clips):
        write_wav(folder / f"{name}{number}.wav", clip)
    entries = [{"audio_filepath": f"{name}{n}.wav", "duration": len(clip) / 16000} for n, clip in enumerate(clips)]
    write_manifest(folder / f"{name}.jsonl", entries, overwrite=True)
    return str(folder / f"{name}.jsonl")


def measure(folder: Path, *overrides: str, steps: int = STEPS) -> list[Line]:
    """Loss, gradient norm and counts of every step."""
    train = _write(folder, "train", [_speech(row) for row in range(20)])
    noise = _write(folder, "noise", [_integers("noise", row, 24000, 2000).astype(np.int16) for row in range(3)])
    settings = [
        "encoder.n_layers=1", "encoder.subsampling_conv_channels=8", "num_classes=32", "masking.mask_prob=0.03",
        "data.batch_seconds=12", "data.max_duration=4", "trainer.clip_norm=1", "optim.sched.warmup_steps=10",
    ]  # fmt: skip
    cfg = Config.preset("tiny", [f"data.train={train}", f"data.noise={noise}", *settings, *overrides])
    ts, step = init_train_state(random.key(1), cfg), make_step(cfg)
    lines = []
    for number, raw in enumerate(islice(batches(open_dataset(cfg.data, 1)), steps)):
        ts, told = step(ts, [to_device(raw, torch.device("cpu"))], random.fold_in(random.key(2), number))
        masked, valid = int(told["masked_tokens"]), int(told["valid_tokens"])
        loss = float(told["loss_sum"]) / max(masked, 1)
        lines.append({"loss": loss, "grad_norm": float(told["grad_norm"]), "masked": masked, "valid": valid})
    return lines


def _moved(measured: list[Line]) -> list[str]:
    """The steps that are not what they were."""
    return [
        f"step {number}: was {then}, is {now}"
        for number, (then, now) in enumerate(zip(json.loads(FILE.read_text()), measured, strict=False))
        if any(now[name] != then[name] for name in ("masked", "valid"))
        or any(abs(now[name] - then[name]) > TOLERANCE * abs(then[name]) for name in ("loss", "grad_norm"))
    ]


def test_fifty_steps_are_what_they_were(tmp_path: Path) -> None:
    measured = measure(tmp_path)
    assert len(measured) == STEPS == len(json.loads(FILE.read_text()))
    moved = _moved(measured)
    assert not moved, f"{len(moved)} steps moved; if they were meant to, see the head of this file\n" + "\n".join(moved)
    losses = [line["loss"] for line in measured]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])  # it learns


def test_a_small_change_is_seen(tmp_path: Path) -> None:
    assert len(_moved(measure(tmp_path, "optim.betas=[0.9,0.981]", steps=15))) > 3
    assert _moved(measure(tmp_path, "data.augment.prob=0", steps=1))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        measured = measure(Path(scratch))
    FILE.write_text("[\n" + ",\n".join(json.dumps(line) for line in measured) + "\n]\n")

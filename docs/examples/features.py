"""What does each layer of a trained model know? Here: the pitch of a tone, read off by a linear map.

    python docs/examples/train_from_python.py 400 my_model
    python docs/examples/features.py my_model

The folder is one of `nest_fn.save` or a checkpoint of a run. If nothing stands there, an untrained model is saved
there first, so that this example runs alone.

R squared is about 0.8 in both layers after those 400 steps, 0.08 in an untrained model, and 0.06 in the log-mel
features: each of their bins is normalised over the utterance, which hides the level by which a tone stands out from the
noise.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch

from nest_fn import Config, features, init, key, load, log_mel, save, split
from nest_fn.layers import random

RATE = 16000  # Hz
TOKEN = 1280  # samples in an encoder frame of 80 ms


def glides(key: torch.Tensor, rows: int, seconds: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Gliding tones in noise ``[B, N]``, and their pitch in octaves at each encoder frame ``[B, T]``."""
    pitch_key, noise_key = split(key, 2)
    low, high = 4.0 * random.uniform(pitch_key, (2, rows, 1))  # octaves above 200 Hz
    octaves = low + (high - low) * torch.linspace(0.0, 1.0, seconds * RATE)  # [B, N]
    tone = 0.1 * torch.sin(2 * math.pi * torch.cumsum(200.0 * 2.0**octaves / RATE, dim=1))
    return tone + 0.01 * random.normal(noise_key, tone.shape), octaves[:, TOKEN // 2 :: TOKEN]


def explained(train_x, train_y, test_x, test_y) -> float:
    """Share of the variance of ``test_y [n]`` that a ridge regression from ``x [n, D]`` explains (R squared)."""
    mean, spread = train_x.mean(0), train_x.std(0) + 1e-6
    train, test = ((x - mean) / spread for x in (train_x, test_x))
    gram = train.T @ train + 1.0 * torch.eye(train.shape[1])
    weight = torch.linalg.solve(gram, train.T @ (train_y - train_y.mean()))
    rest = test_y - train_y.mean() - test @ weight
    return 1.0 - float(rest.var() / test_y.var())


def main(folder: str) -> dict[str, float]:
    """R squared of the pitch for each layer, and for the log-mel features that went in."""
    if not Path(folder).exists():
        cfg = Config.preset("tiny")
        save(folder, *init(key(0), cfg), cfg)
        print(f"{folder}: saved an untrained model")
    params, state, cfg = load(folder)

    def look(k: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Every representation of 64 tones, one row per encoder frame, and the pitch of each."""
        audio, octaves = glides(k, rows=64)
        length = torch.full((len(audio),), audio.shape[1])
        mel, _ = log_mel(audio, length, cfg.preprocessor)  # [B, M, F], frames of 10 ms
        layers, lengths = features(params, state, audio, length, cfg)  # one [B, T, D] per layer
        frames = min(int(lengths.min()), octaves.shape[1])  # all are equally long here
        found = {"log-mel": mel[:, :, 4::8].transpose(1, 2)}  # the frame in the middle of each 80 ms
        found |= {f"layer {number}": layer for number, layer in enumerate(layers)}
        return {name: x[:, :frames].flatten(0, 1) for name, x in found.items()}, octaves[:, :frames].flatten()

    (train_x, train_y), (test_x, test_y) = (look(k) for k in split(key(1), 2))
    scores = {name: explained(train_x[name], train_y, test_x[name], test_y) for name in train_x}
    for name, score in scores.items():
        print(f"{name:8}  width {train_x[name].shape[1]:4d}  R squared of the pitch {score:.3f}")
    return scores


if __name__ == "__main__":
    main(sys.argv[1])

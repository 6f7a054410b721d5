"""Train a tiny model from Python, without the command line.

    python docs/examples/train_from_python.py              # 100 steps, ten seconds on a CPU
    python docs/examples/train_from_python.py 400 my_model # longer, and save the result to a new folder

A training step is a function: `step(train_state, batches, key)` returns a new train state and metrics. Everything that
training changes is in the train state: parameters, batch statistics, the optimizer's moments, the number of the step.
Everything random follows from the key, so the same call gives the same result, whenever it is made.
"""

from __future__ import annotations

import math
import sys

import torch

from nest_fn import Config, fold_in, key, loss_sum, save, split
from nest_fn.layers import random
from nest_fn.train.step.step import TrainState, init_train_state, make_step

RATE = 16000  # Hz


def glides(key: torch.Tensor, rows: int, seconds: int = 4) -> dict[str, torch.Tensor]:
    """A batch: every row a tone that glides, once clean (for the targets) and once in noise (for the encoder)."""
    pitch_key, noise_key = split(key, 2)
    low, high = 200.0 * 2.0 ** (4.0 * random.uniform(pitch_key, (2, rows, 1)))  # Hz at both ends, over four octaves
    pitch = low * (high / low) ** torch.linspace(0.0, 1.0, seconds * RATE)  # [B, N]
    phase = 2 * math.pi * torch.cumsum(pitch / RATE, dim=1)
    clean = 0.1 * torch.sin(phase)  # [B, N]
    noisy = clean + 0.01 * random.normal(noise_key, clean.shape)
    length = torch.full((rows,), clean.shape[1])  # samples
    return {"audio": clean, "audio_len": length, "noisy_audio": noisy, "noisy_audio_len": length}


def train(steps: int, seed: int = 0) -> tuple[list[float], TrainState, Config]:
    """Train for so many steps: the loss of each, and the train state after the last."""
    cfg = Config.preset(
        "tiny", ["masking.mask_prob=0.03", "optim.sched.name=constant", "optim.lr=3e-3", "trainer.clip_norm=1"]
    )

    # Three uses of chance, three keys, and none of them is used twice.
    init_key, data_key, step_key = split(key(seed), 3)
    ts = init_train_state(init_key, cfg)  # TrainState(step=0, params, state, opt_state, ema)

    # The objective is any function (params, state, batch, key) -> (sum, (metrics, state)). This is the one of NEST;
    # without `loss=` make_step takes the trainer's, which also mixes noise and other speakers into the batch.
    def objective(params, state, batch, key):
        return loss_sum(params, state, batch, cfg, key=key, train=True)

    step = make_step(cfg, loss=objective)

    losses = []
    for number in range(steps):
        batch = glides(fold_in(data_key, number), rows=8)
        # A list of batches is one update with all their gradients: give several to accumulate.
        ts, metrics = step(ts, [batch], fold_in(step_key, number))
        losses.append(float(metrics["loss_sum"] / metrics["masked_tokens"]))  # nats per masked token
        if number % 10 == 0 or number == steps - 1:
            accuracy = float(metrics["correct"] / metrics["masked_tokens"])
            print(f"step {number:4d}  loss {losses[-1]:.3f}  accuracy {accuracy:.3f} of the masked tokens")
    return losses, ts, cfg


if __name__ == "__main__":
    losses, ts, cfg = train(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
    if len(sys.argv) > 2:
        save(sys.argv[2], ts.params, ts.state, cfg)  # nest_fn.load reads it, and so do the commands of nest-fn

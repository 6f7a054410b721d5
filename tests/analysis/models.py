"""Small models in float64 and batches for the tests of the analyses."""

from __future__ import annotations

from typing import Any

import torch

from nest_fn import Config, init, key
from nest_fn.layers import random
from nest_fn.layers.tree import flatten, tree_map

Model = tuple[Any, Any, Config]


def to_double(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.double() if leaf.is_floating_point() else leaf, tree)


def small_model(*overrides: str, seed: int = 0) -> Model:
    """A tiny model in float64, with no parameter at a special value such as 0 or 1."""
    cfg = Config.preset(
        "tiny",
        ["masking.mask_prob=0.03", "masking.block_size=32", "masking.force_block=true",
         "encoder.d_model=16", "encoder.subsampling_conv_channels=4", "num_classes=16",
         *overrides],
    )  # fmt: skip
    params, state = init(key(seed), cfg)
    keys = iter(random.split(key(seed + 100), len(flatten(params))))
    moved = tree_map(lambda leaf: leaf + 0.05 * random.normal(next(keys), leaf.shape, torch.float64), to_double(params))
    return moved, to_double(state), cfg


def small_batch(rows: int = 3, samples: int = 12000, seed: int = 1) -> dict[str, torch.Tensor]:
    """Noise of different lengths, and noisier noise."""
    one, two = random.split(key(seed), 2)
    audio = 0.1 * random.normal(one, (rows, samples), torch.float64)
    lengths = torch.tensor([samples - 1000 * row for row in range(rows)])
    audio = torch.where(torch.arange(samples) < lengths[:, None], audio, 0.0)
    noisy = audio + 0.05 * random.normal(two, (rows, samples), torch.float64)
    return {"audio": audio, "audio_len": lengths, "noisy_audio": noisy, "noisy_audio_len": lengths}

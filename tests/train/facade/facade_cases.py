"""A small model and a batch of synthetic audio for the tests of the original PureTorchSSLModel interface."""

from __future__ import annotations

import torch

from nest_fn import Config, PureTorchSSLModel, key
from nest_fn.layers import random
from nest_fn.layers.tree import flatten

MASKED = ["masking.mask_prob=0.03", "masking.force_block=true"]
SMALL = ["encoder.n_layers=1", "encoder.d_model=8", "encoder.n_heads=2", "encoder.subsampling_conv_channels=2",
         "num_classes=8", "code_dim=2"]  # fmt: skip


def config(*overrides: str) -> Config:
    """The tiny preset, in which every utterance is masked."""
    return Config.preset("tiny", [*MASKED, *overrides])


def model(*overrides: str, seed: int = 0) -> PureTorchSSLModel:
    """A new tiny model."""
    return PureTorchSSLModel.from_config(config(*overrides), seed)


def batch(rows: int = 4, samples: int = 16000, seed: int = 5) -> dict[str, torch.Tensor]:
    """Clean and noisy audio of falling lengths."""
    clean = 0.1 * random.normal(key(seed), (rows, samples))
    lengths = torch.tensor([samples - 1600 * (row % 4) for row in range(rows)])
    noisy = clean + 0.05 * random.normal(key(seed + 100), (rows, samples))
    return {"audio": clean, "audio_len": lengths, "noisy_audio": noisy, "noisy_audio_len": lengths.clone()}


def signals(one: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch as the keywords of ``forward``."""
    names = {"audio": "input_signal", "noisy_audio": "noisy_input_signal"}
    return {
        names[name.removesuffix("_len")] + ("_length" if name.endswith("_len") else ""): x for name, x in one.items()
    }


def snapshot(tree: object) -> dict[str, torch.Tensor]:
    """Copies of all leaves by path."""
    return {path: leaf.detach().clone() for path, leaf in flatten(tree).items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same names, dtypes and bits."""
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)

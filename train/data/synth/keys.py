"""Random numbers of the synthesiser: a separate numpy generator for every (seed, stream, index)."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np


def generator(seed: int, stream: str, index: int = 0) -> np.random.Generator:
    """A Philox generator that depends only on these three values, so that no draw depends on the order of work."""
    digest = blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

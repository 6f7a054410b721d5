"""CPU time and memory of the gradients of single rows: ``python -m tests.measure_row_gradients MANIFEST SECONDS``.

64 utterances of a manifest, cut or repeated to one length, through NEST-Small with 4 layers, on one thread. Each way
runs in a process of its own, once on two rows to warm up and then on all; memory is what its peak resident size rises
above that of the process before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nest_fn import Config, init, key, loss_sum
from nest_fn.analysis.by_row.rows import chunks
from nest_fn.analysis.gradients import per_example_gradients, per_example_norms
from nest_fn.layers.tree import fill, flatten
from nest_fn.train.downstream.inference import open_audio, utterances

ROWS = 64
WAYS = (
    "loop of torch.func.grad",
    "loop of autograd",
    "sum over a chunk",
    "vmap, gradients",
    "taps, gradients",
    "taps, norms",
)


def batch_of(manifest: str, seconds: float, cfg: Config) -> dict[str, torch.Tensor]:
    """The first 64 utterances, each of ``seconds``."""
    width = round(seconds * cfg.sample_rate)
    rows: list[torch.Tensor] = []
    for found in utterances(open_audio(manifest, cfg)):
        rows += [audio[: int(n)].float() * 2.0**-15 for audio, n in zip(found.audio, found.lengths, strict=True)]
        if len(rows) >= ROWS:
            break
    audio = torch.stack([row.repeat(-(-width // len(row)))[:width] for row in rows[:ROWS]])
    length = torch.full((ROWS,), width)
    return {"audio": audio, "audio_len": length, "noisy_audio": audio, "noisy_audio_len": length}


def run(way: str, model: Any, batch: dict[str, torch.Tensor], chunk: int) -> None:
    """Make the gradients, or only their norms, as the way says; a loop keeps no more than one of them."""
    params, state, cfg = model
    if way.startswith(("loop", "sum")):
        for row in chunks(batch, chunk):
            if "func" in way:
                torch.func.grad(lambda p, row=row: loss_sum(p, state, row, cfg, key=key(2), train=False)[0])(params)
                continue
            leaves = {path: leaf.detach().requires_grad_() for path, leaf in flatten(params).items()}
            value, _ = loss_sum(fill(params, leaves), state, row, cfg, key=key(2), train=False)
            if value.requires_grad:
                torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    elif way == "taps, norms":
        per_example_norms(params, state, batch, cfg, key=key(2), chunk=chunk)
    else:  # a chunk at a time, as who sums them up would: 64 whole gradients are 1.4 GB
        for part in chunks(batch, chunk):
            per_example_gradients(params, state, part, cfg, key=key(2), method=way.partition(",")[0])


def peak() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def measure(way: str, manifest: str, seconds: float, chunk: int) -> dict[str, float]:
    """Seconds of CPU, and the rise of the peak in bytes."""
    torch.set_num_threads(1)
    cfg = Config.preset("nest_small", ["encoder.n_layers=4"])
    model = (*init(key(0), cfg), cfg)
    batch = batch_of(manifest, seconds, cfg)
    before = peak()
    run(way, model, {name: leaf[:2] for name, leaf in batch.items()}, 2)
    start = time.process_time()
    run(way, model, batch, chunk)
    return {"seconds": time.process_time() - start, "bytes": peak() - before}


def main() -> None:
    """Each way in a process of its own, in turns, and the least of the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--chunks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--way", default=None)
    args = parser.parse_args()
    if args.way is not None:
        print(json.dumps(measure(args.way, args.manifest, args.seconds, args.chunks[0])))
        return
    cases = [(way, chunk) for way in WAYS for chunk in ([1] if way.startswith("loop") else args.chunks)]
    found: dict[tuple[str, int], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for way, chunk in cases:
            words = [args.manifest, str(args.seconds), "--way", way, "--chunks", str(chunk)]
            done = subprocess.run([sys.executable, "-m", "tests.measure_row_gradients", *words], stdout=subprocess.PIPE)
            found[way, chunk].append(json.loads(done.stdout) if done.returncode == 0 else {"seconds": 0, "bytes": 0})
    for (way, chunk), results in found.items():
        seconds, memory = (min(one[name] for one in results) for name in ("seconds", "bytes"))
        print(f"{way:24} chunk {chunk:3}: {seconds:7.2f} s  {memory / 2**20:7.0f} MiB", flush=True)


if __name__ == "__main__":
    main()

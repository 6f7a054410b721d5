"""One side of a comparison: a process that makes training steps when it is asked to.

    python -m nest_fn.train.bench.server '{"preset": "nest_small", "overrides": [], "device": "cpu", "threads": 1}'

It answers one line of JSON for each line of JSON on its standard input, ``{"rows": 4, "seconds": 10, "steps": 2}``;
``peer_nemo.py`` keeps the same rules. Two such processes, asked in turns, see the same machine.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import flatten
from nest_fn.train.run.device import keep_freed_memory
from nest_fn.train.run.inductor import inductor
from nest_fn.train.step.compiled import EAGER, compile_parts
from nest_fn.train.step.step import init_train_state, make_step, training_loss
from nest_fn.version import versions

from .rates import peak_memory, timed
from .workload import Shape, made_up_batch

Message = dict[str, Any]


def serve(settings: Message) -> None:
    """Answer each line of standard input with a line on standard output, until the input ends."""
    torch.set_num_threads(settings["threads"])
    keep_freed_memory()
    cfg = Config.preset(settings["preset"], settings["overrides"])
    requests = map(json.loads, sys.stdin)
    for said in answers(cfg, torch.device(settings["device"]), requests, compiled=settings["compiled"]):
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


def answers(
    cfg: Config, device: torch.device, requests: Iterable[Message], *, compiled: bool = False
) -> Iterator[Message]:
    """First what this side is; then, for each request, its steps: seconds, losses, peak memory, compilations so far."""
    key = random.key(0, device=device)
    ts = init_train_state(random.fold_in(key, 0), cfg)
    graphs: list[str] = []
    parts = compile_parts(inductor(graphs.append)) if compiled else EAGER
    step = make_step(cfg, donate=True, loss=training_loss(cfg, parts=parts))
    count = sum(leaf.numel() for leaf in flatten(ts.params).values())
    yield {"side": "nest_fn", "parameters": count, "compiled": compiled, **versions()}
    for request in requests:
        begun = time.perf_counter()
        batch = made_up_batch(cfg, Shape(request["rows"], request["seconds"]), device)
        seconds, losses, first = [], [], 0.0
        for _ in range(request["steps"]):
            (ts, metrics), taken = timed(partial(step, ts, [batch], random.fold_in(key, ts.step)), device)
            first = first or time.perf_counter() - begun
            seconds.append(taken)
            losses.append(float(metrics["loss_sum"]) / max(float(metrics["masked_tokens"]), 1.0))
        yield {
            "seconds": seconds, "losses": losses, "first_wall": first, "peak_bytes": peak_memory(device),
            "graphs": sum(line.startswith("compiled ") for line in graphs),
        }  # fmt: skip


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))

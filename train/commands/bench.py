"""``make bench``: core-seconds of a training step by part, beside a matrix product measured in the same run.

The workload is NEST-Small on four utterances of ten seconds, one thread. Only ratios mean anything across machines: to
the GEMM of the run, or of one part to another.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from nest_fn.config import Config
from nest_fn.decoder import logits
from nest_fn.encoder import encode_frames, subsample_features
from nest_fn.errors import OutputError
from nest_fn.files.outputs import claim, written
from nest_fn.frontend import log_mel
from nest_fn.layers import random
from nest_fn.layers.linear import init_linear, linear
from nest_fn.layers.tree import flatten
from nest_fn.masking import apply_mask, draw_mask
from nest_fn.quantizer import quantize_features
from nest_fn.train.run.device import keep_freed_memory
from nest_fn.train.run.inductor import inductor
from nest_fn.train.run.record.run_folder import environment
from nest_fn.train.step.compiled import compile_parts
from nest_fn.train.step.optimizer import make_optimizer
from nest_fn.train.step.step import init_train_state, make_step, training_loss, value_and_grad
from nest_fn.version import versions

ROWS, SECONDS = 4, 10
REFERENCE_GEMM = 89.0
"""GFLOP/s of one core on the machine where the reference took ``REFERENCE_STEP`` core-seconds for this step."""
REFERENCE_STEP = 2.36


def run_benchmark(out: Path, repeats: int = 3, compiled: bool = False, *, overwrite: bool = False) -> Iterator[str]:
    """Measure, write ``out`` as JSON, report line by line. Raises ``OutputError`` if ``out`` holds figures already."""
    place = claim(out, {"command": "bench", **versions()}, folder=False, overwrite=overwrite)
    if place.begun:
        raise OutputError(f"{out}: holds the figures of an earlier run; give --out another name, or --overwrite it.")
    torch.set_num_threads(1)
    keep_freed_memory()
    cfg = Config.preset("nest_small")
    figures: dict[str, Any] = {"environment": environment(), "rows": ROWS, "seconds": SECONDS}
    figures["gemm_gflops"] = gemm_gflops()
    yield f"one core: {figures['gemm_gflops']:.0f} GFLOP/s in a 2048^3 float32 product"
    parts = step_parts(cfg, repeats)
    figures["core_seconds"] = parts
    for name, (least, median) in parts.items():
        yield f"  {name:<28}{least * 1e3:9.1f} ms  (median {median * 1e3:.1f})"
    figures["gemm_gflops"] = max(figures["gemm_gflops"], gemm_gflops())
    scaled = parts["whole step"][0] * figures["gemm_gflops"] / REFERENCE_GEMM
    figures["step_scaled"] = scaled
    yield (
        f"the step at {REFERENCE_GEMM:.0f} GFLOP/s a core: {scaled:.2f} core-seconds, {ROWS * SECONDS / scaled:.0f} "
        f"audio-s a core-s; the reference takes {REFERENCE_STEP}, {REFERENCE_STEP / scaled:.2f} times as long"
    )
    figures["functional_call_microseconds"] = functional_call_cost()
    yield f"functional_call costs {figures['functional_call_microseconds']:.0f} us a leaf in eager mode"
    figures["loader"] = loader_figures()
    for name, rate in figures["loader"].items():
        kind, _, noise = name.partition("_")
        yield f"loader, {kind.upper()}, {'noise on' if noise else 'no noise'}: {rate:,.0f} audio-s a core-s"
    if compiled:
        figures["compiled"] = compiled_step(cfg, repeats)
        yield f"compiled: {figures['compiled']['step']:.2f} core-s, first step {figures['compiled']['first']:.0f} s"
    with written(place) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
    yield f"written to {out}"


def core_seconds(f: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Least and median time of all threads over ``repeats`` calls, after one that does not count."""
    f()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        f()
        taken.append(time.process_time() - start)
    return min(taken), statistics.median(taken)


def gemm_gflops(size: int = 2048) -> float:
    """GFLOP/s of one core in a large float32 matrix product."""
    a, b = random.normal(random.key(0), (2, size, size)).unbind(0)
    return 2.0 * size**3 / core_seconds(lambda: a @ b, 5)[0] / 1e9


def workload(cfg: Config) -> dict[str, torch.Tensor]:
    """Noise at the level of speech, never zeros: ``audio`` and ``noise`` int16 ``[B, N]`` and the rest of a batch."""
    samples = SECONDS * cfg.sample_rate
    draw = random.normal(random.key(7), (2, ROWS, samples)) * 2000.0
    length = torch.full((ROWS,), samples)
    return {
        "audio": draw[0].to(torch.int16), "audio_len": length, "noise": draw[1].to(torch.int16), "noise_len": length,
        "row": torch.arange(ROWS), "utterance": torch.arange(ROWS) + 1, "weight": torch.ones(ROWS),
    }  # fmt: skip


def step_parts(cfg: Config, repeats: int) -> dict[str, tuple[float, float]]:
    """Core-seconds (least, median) of the parts of a step, and of the step."""
    key, raw = random.key(0), workload(cfg)
    ts = init_train_state(key, cfg)
    params, state = ts.params, ts.state
    audio, lengths = raw["audio"].float() / 32768, raw["audio_len"]
    mel, frames = log_mel(audio, lengths, cfg.preprocessor)
    x, short = subsample_features(params["encoder"], mel, frames, cfg.encoder)
    encoded = encode_frames(params["encoder"], state["encoder"], x, short, cfg.encoder, key=key, train=True).frames
    third = encoded.flatten(0, 1)[: encoded.shape[0] * encoded.shape[1] * 3 // 10]
    paths, f = list(flatten(params)), training_loss(cfg)
    grads = {path: torch.ones_like(leaf) for path, leaf in flatten(params).items()}
    optimizer, step = make_optimizer(cfg.optim), make_step(cfg, donate=True)

    def embed(name: str) -> torch.Tensor:
        found: torch.Tensor = (params if name in params else state)[name]["embedding"]
        return found

    parts: dict[str, Callable[[], Any]] = {
        "features, one signal": lambda: log_mel(audio, lengths, cfg.preprocessor, key=key, train=True),
        "quantizer": lambda: quantize_features(state["quantizer"], mel, cfg.quantizer),
        "masking": lambda: apply_mask(
            mel, draw_mask(key, frames, mel.shape[2], cfg.masking, cfg.mask_block), embed("masking")
        ),
        "subsampling, forward": lambda: subsample_features(params["encoder"], mel, frames, cfg.encoder),
        "conformer layers, forward": lambda: encode_frames(
            params["encoder"], state["encoder"], x, short, cfg.encoder, key=key, train=True
        ),
        "decoder, masked third": lambda: logits(params["decoder"], third, cfg.decoder).log_softmax(-2),
        "whole loss, forward": lambda: f(params, state, raw, key),
        "loss and gradients": lambda: value_and_grad(f)(params, paths, state, raw, key),
        "optimizer": lambda: optimizer.update(flatten(params), grads, ts.opt_state, 1e-4, donate=True),
    }
    with torch.no_grad():
        found = {name: core_seconds(run, repeats) for name, run in parts.items() if name != "loss and gradients"}
    found["loss and gradients"] = core_seconds(parts["loss and gradients"], repeats)
    found["whole step"] = core_seconds(lambda: step(ts, [raw], key), repeats)
    return found


def functional_call_cost(calls: int = 2000) -> float:
    """Microseconds that a leaf pays for ``functional_call``, against ``F.linear`` on the same tensors."""
    params, x = init_linear(random.key(0), 4, 4), torch.zeros(1, 4)

    def plain() -> None:
        for _ in range(calls):
            torch.nn.functional.linear(x, params["weight"], params["bias"])

    def leaf() -> None:
        for _ in range(calls):
            linear(params, x)

    return (core_seconds(leaf, 3)[0] - core_seconds(plain, 3)[0]) / calls * 1e6


def compiled_step(cfg: Config, repeats: int) -> dict[str, float]:
    """Seconds to the first compiled step, and core-seconds of the next ones."""
    ts, raw, key = init_train_state(random.key(0), cfg), workload(cfg), random.key(0)
    parts = compile_parts(inductor(lambda _: None))
    step = make_step(cfg, donate=True, loss=training_loss(cfg, parts=parts))
    start = time.monotonic()
    step(ts, [raw], key)
    first = time.monotonic() - start
    return {"first": first, "step": core_seconds(lambda: step(ts, [raw], key), repeats)[0]}


def loader_figures(minutes: float = 4.0) -> dict[str, float]:
    """Audio-seconds a core-second from WAV, and from FLAC where soundfile is installed, with noise and without."""
    from .bench_loader import loader_rates

    with tempfile.TemporaryDirectory() as folder:
        return loader_rates(Path(folder), minutes)

"""Seconds of a training step by part, and what ``functional_call`` costs a leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nest_fn.config import Config
from nest_fn.decoder import logits
from nest_fn.encoder import encode_frames, subsample_features
from nest_fn.frontend import log_mel
from nest_fn.layers import random
from nest_fn.layers.linear import init_linear, linear
from nest_fn.layers.tree import flatten
from nest_fn.masking import apply_mask, draw_mask
from nest_fn.quantizer import quantize_features
from nest_fn.train.step.optimizer import make_optimizer
from nest_fn.train.step.step import init_train_state, make_step, training_loss, value_and_grad

from .rates import least_and_median
from .workload import Shape, made_up_batch


def step_parts(cfg: Config, shape: Shape, device: torch.device, repeats: int) -> dict[str, tuple[float, float]]:
    """Seconds (least, median) of the parts of an eager step, and of the step; the parts overlap, and are no sum."""
    key, raw = random.key(0, device=device), made_up_batch(cfg, shape, device)
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
        found = {
            name: least_and_median(run, repeats, device) for name, run in parts.items() if name != "loss and gradients"
        }
    found["loss and gradients"] = least_and_median(parts["loss and gradients"], repeats, device)
    found["whole step"] = least_and_median(lambda: step(ts, [raw], key), repeats, device)
    return found


def functional_call_cost(calls: int = 2000) -> float:
    """Microseconds that a leaf pays for ``functional_call``, against ``F.linear`` on the same tensors."""
    cpu, params, x = torch.device("cpu"), init_linear(random.key(0), 4, 4), torch.zeros(1, 4)

    def plain() -> None:
        for _ in range(calls):
            torch.nn.functional.linear(x, params["weight"], params["bias"])

    def leaf() -> None:
        for _ in range(calls):
            linear(params, x)

    return (least_and_median(leaf, 3, cpu)[0] - least_and_median(plain, 3, cpu)[0]) / calls * 1e6

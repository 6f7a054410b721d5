"""What a run would do: parameters, plan, and one real update on its largest batch."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import torch

from nest_fn.config import Config
from nest_fn.layers.tree import count, flatten
from nest_fn.model import abstract
from nest_fn.train.data.clips import load_rirs
from nest_fn.train.data.dataset import RawBatch, load_batch, open_dataset
from nest_fn.train.keys import init_key, root_key, step_key
from nest_fn.train.run.batch import prepare_batch
from nest_fn.train.run.context import check_frames
from nest_fn.train.run.device import check_precision, choose_device
from nest_fn.train.run.failure_dump import explain_oom
from nest_fn.train.step.step import init_train_state, make_step, training_loss


def describe(cfg: Config) -> Iterator[str]:
    """Lines about the model, the data and the plan; then one update on the largest batch, with its time and memory."""
    params, _ = abstract(cfg)
    yield f"parameters: {count(params):,} trained"
    for part in params:
        yield f"  {part}: {count(params[part]):,}"
    for remark in cfg.advice:
        yield f"note: {remark}"
    dataset = open_dataset(cfg.data, cfg.trainer.seed, split="train", sample_rate=cfg.sample_rate)
    plan = dataset.plan(0)
    seconds = dataset.shapes.width / cfg.sample_rate
    yield f"data: {len(dataset.manifest):,} utterances, {float(dataset.manifest.duration.sum()) / 3600:.2f} hours"
    if dataset.manifest.cropped:
        yield f"  cropped: {dataset.manifest.cropped:,} longer than max_duration={cfg.data.max_duration} s"
    for rule, dropped in dataset.manifest.dropped:
        yield f"  left out: {dropped:,} {rule}"
    yield f"plan: {len(plan)} batches an epoch, padding efficiency {plan.efficiency(dataset.length):.3f}"
    for rows, width in zip(dataset.shapes.rows.tolist(), seconds.tolist(), strict=True):
        yield f"  {rows} x {width:.2f} s"
    number = plan.largest()
    raw = load_batch(dataset, plan.batch(number), 0, number)
    yield f"largest batch: {raw['audio'].shape[0]} x {raw['audio'].shape[1] / cfg.sample_rate:.2f} s"
    with explain_oom(raw, cfg, choose_device(cfg.trainer.device)):
        yield from _try(cfg, raw)


def _try(cfg: Config, raw: RawBatch) -> Iterator[str]:
    device = choose_device(cfg.trainer.device)
    check_precision(cfg.trainer.precision, device)
    check_frames(cfg)
    rirs = load_rirs(cfg.data, cfg.sample_rate)
    step = make_step(cfg, loss=training_loss(cfg, None if rirs is None else rirs.to(device)))
    root = root_key(cfg.trainer.seed, device=device)
    key = step_key(root, 0)
    started = time.monotonic()
    parts = prepare_batch(raw, cfg, key, device, parts=cfg.trainer.accumulate)
    ts, metrics = step(init_train_state(init_key(root), cfg), parts, key)
    mean = float(metrics["loss_sum"]) / max(float(metrics["masked_tokens"]), 1.0)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield (
        f"  one eager update: loss {mean:.3f} over {int(metrics['masked_tokens'])} masked tokens, "
        f"{time.monotonic() - started:.1f} s, peak memory {peak:.2f} GiB, {len(flatten(ts.params))} tensors"
    )

"""Everything on a CUDA device, without one: no host tensor is mixed in, and a step waits once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn import Config, encode, features, forward, key, log_mel, loss, quantize
from nest_fn.layers import random
from nest_fn.layers.linear import init_linear
from nest_fn.layers.tree import device_of, flatten
from nest_fn.layers.types import Tensor
from nest_fn.mel import make_tables
from nest_fn.model import init
from nest_fn.train.augment.reverb import reverberate
from nest_fn.train.ctc.recogniser import Design, step_keys, token_log_probs
from nest_fn.train.ctc.spec_augment import SpecAugment
from nest_fn.train.ctc.step import ctc_sum
from nest_fn.train.ctc.transcripts import Transcripts
from nest_fn.train.data.dataset import load_batch
from nest_fn.train.data.transfer import to_device
from nest_fn.train.downstream.extract import extract, tokenize
from nest_fn.train.downstream.inference import Model, open_audio
from nest_fn.train.downstream.settings import inference_config
from nest_fn.train.downstream.utterance_probe import mean_features
from nest_fn.train.finetune.context import with_targets
from nest_fn.train.run.batch import micro_batches
from nest_fn.train.step import metrics
from nest_fn.train.step import step as steps
from nest_fn.train.step.evaluate import make_evaluate, validate
from tests.laws.registry import ALL, Example
from tests.laws.registry import key as example_key
from tests.train.conftest import Corpus

from .pretended import CUDA, DeviceError, Pretended, off_device, on_device, pretending

SAMPLES = 24000


def raw(rows: int = 3) -> dict[str, Any]:
    draw = random.normal(key(3), (2, rows, SAMPLES)) * 2000
    audio, noise = draw.to(torch.int16).unbind(0)
    length = torch.tensor([SAMPLES - 2000 * row for row in range(rows)])
    row = torch.arange(rows)
    return {
        "audio": audio, "audio_len": length, "noise": noise, "noise_len": torch.full((rows,), SAMPLES), "row": row,
        "utterance": row + 7, "weight": torch.ones(rows),
    }  # fmt: skip


def without_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's engine wants a real device; all else of a step runs."""

    def value_and_grad(f: Any) -> Any:
        def g(params: Any, paths: Any, *args: Any) -> Any:
            with torch.no_grad():
                value, aux = f(params, *args)
            leaves = flatten(params)
            return (value, aux), {path: torch.ones_like(leaves[path]) for path in paths}

        return g

    monkeypatch.setattr(steps, "value_and_grad", value_and_grad)


@pytest.mark.parametrize(
    "overrides", [(), ("trainer.accumulate=2",), ("trainer.precision=bf16",), ("trainer.ema_decay=0.9",)]
)
def test_a_step_waits_once(monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]) -> None:
    """For the answer whether its update is finite; keys, batches, metrics and the learning rate cost no wait."""
    without_backward(monkeypatch)
    cfg = Config.preset("tiny", overrides)
    with pretending() as waits:
        root = random.key(0, device=CUDA)
        ts = steps.init_train_state(random.fold_in(root, 0), cfg)
        tables = on_device(make_tables(cfg.preprocessor))
        step = steps.make_step(cfg, donate=True, loss=steps.training_loss(cfg, tables=tables))
        window: metrics.Sums = {}
        for _ in range(2):
            waits.clear()
            parts = micro_batches(to_device(raw(4), CUDA), cfg.trainer.accumulate)  # type: ignore[arg-type]
            ts, values = step(ts, parts, random.fold_in(root, ts.step))
            window = metrics.add(window, values)
        assert list(waits.values()) == [1] and "train/step/step.py" in next(iter(waits)), waits
        assert metrics.summarise(window)["masked_tokens"] > 0
    assert all(isinstance(leaf, Pretended) for leaf in flatten(ts.params).values())


def test_what_waits_is_named() -> None:
    with pretending() as waits:
        x = torch.ones(3, device="cuda")
        float(x.sum())
        x.tolist()
        torch.tensor([1], device="cuda")
        x[x > 0]
        x.cpu()
    assert sorted(waits.values()) == [1, 1, 1, 1, 1]
    with pretending(), pytest.raises(DeviceError, match="meets a CPU tensor"):
        torch.ones(3, device="cuda") + torch.ones(3)


def same(there: Any, here: Any) -> None:
    """All tensors on the device, with the CPU's values."""
    a, b = ([x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)] for tree in (there, here))
    assert len(a) == len(b) and all(isinstance(x, Pretended) for x in a)
    for x, y in zip(off_device(a), b, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("example", ALL, ids=repr)
def test_every_layer(example: Example, train: bool) -> None:
    """In training with dropout, from the same key."""
    arguments = (example.params, example.state, example.inputs, example_key(1))
    with torch.no_grad():
        here = example.run(*arguments, train)
        with pretending():
            there = example.run(*on_device(arguments), train)
    same(there, here)


def batch(source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    audio = source["audio"].float() / 32768
    return {
        "audio": audio,
        "audio_len": source["audio_len"],
        "noisy_audio": audio.flip(1),
        "noisy_audio_len": source["audio_len"],
    }


@pytest.mark.parametrize(
    "overrides", [(), ("mask_position=post_conv",), ("num_books=2",), ("preprocessor.normalize=all_features",)]
)
def test_every_public_function(overrides: tuple[str, ...]) -> None:
    cfg = Config.preset("tiny", overrides)
    params, state = init(key(0), cfg)
    given = batch(raw())

    def everything(p: Any, s: Any, b: Any, k: Any) -> Any:
        mel, lengths = log_mel(b["audio"], b["audio_len"], cfg.preprocessor)
        found = [mel, lengths, encode(p, s, mel, lengths, cfg), forward(p, s, b, cfg, key=k)]
        if cfg.mask_position == "pre_conv":
            found.append(quantize(s, mel, cfg))
        found.append(features(p, s, b["audio"], b["audio_len"], cfg))
        return [*found, loss(p, s, b, cfg, key=k, train=False)[0]]

    with torch.no_grad():
        here = everything(params, state, given, key(1))
        with pretending():
            there = everything(*on_device((params, state, given)), on_device(key(1)))
    same(there, here)


def test_initial_values() -> None:
    cfg = Config.preset("tiny")
    with pretending():
        there = init(random.key(5, device=CUDA), cfg)
    same(there, init(key(5), cfg))


def test_validation() -> None:
    cfg = Config.preset("tiny")
    params, state = init(key(0), cfg)
    evaluate = make_evaluate(cfg)
    here = validate(evaluate, params, state, [raw()], key(2))
    with pretending():
        there = validate(evaluate, *on_device((params, state)), [on_device(raw())], on_device(key(2)))
    assert there == pytest.approx(here)


def test_reverberation() -> None:
    given = raw()
    speech, rirs = given["audio"].float(), torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    words = random.bits(key(4), (3, 2))
    arguments = (speech, given["audio_len"], rirs, words, 0.7)
    here = reverberate(*arguments)
    with pretending():
        same(reverberate(*on_device(arguments)), here)


def test_extraction_tokens_probes_and_recognition(corpus: Corpus, tmp_path: Path) -> None:
    """Commands about a trained model, its weights on the device: the files of the CPU."""
    cfg = Config.preset("tiny")
    trees = init(key(0), cfg)
    dataset = open_audio(corpus.valid, cfg)
    windowed = open_audio(corpus.valid, cfg, data=inference_config("extract", cfg, ["data.batch_seconds=1.1"]).data)
    scores: dict[str, Any] = {}
    for name, model in (("here", Model(*trees, cfg)), ("there", Model(*on_device(trees), cfg))):
        with pretending() if name == "there" else nullcontext():
            assert len(list(extract(model, dataset, tmp_path / name / "features"))) == 4
            assert len(list(tokenize(model, dataset, tmp_path / name / "tokens"))) == 4
            assert len(list(extract(model, windowed, tmp_path / name / "windows"))) == 4
            assert len(list(tokenize(model, windowed, tmp_path / name / "tokens of windows"))) == 4
            pooled = [mean_features(one, (model.params, model.state), cfg) for one in (dataset, windowed)]
            raw = load_batch(dataset, next(iter(dataset.plan(0))), 0)
            device = device_of(model.params)
            texts = Transcripts({}, {name: [1, 2] for name in raw["ids"] if name})
            head = {"linear": init_linear(random.key(0, device=device), 32, 5), "mixture": torch.zeros(2).to(device)}
            (batch,) = with_targets(raw, texts, cfg, device)
            keys, masks = step_keys(random.key(1, device=device), batch["utterance"]), SpecAugment(1, 20, 0.5, 1, 8)
            log_probs, lengths, _ = token_log_probs(
                model.params, head, model.state, batch, cfg, Design(None), keys=keys, train=True, masks=masks
            )
            value = float(ctc_sum(log_probs, lengths, batch)[0])
            scores[name] = (pooled, value)
    torch.testing.assert_close(scores["there"], scores["here"])
    for one in (tmp_path / "here").rglob("*.np?"):
        assert one.read_bytes() == (tmp_path / "there" / one.relative_to(tmp_path / "here")).read_bytes()

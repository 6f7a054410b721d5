"""Validation has masks and noise of its own that never change, so its loss can be compared from pass to pass (Q46)."""

from __future__ import annotations

import pytest
import torch

from nest_fn.config import Config
from nest_fn.layers import random
from nest_fn.layers.tree import tree_map
from nest_fn.layers.types import Tensor
from nest_fn.model import init, loss_sum
from nest_fn.train.augment.mixing import augment
from nest_fn.train.data.dataset import batches, open_dataset
from nest_fn.train.data.transfer import to_device
from nest_fn.train.step.evaluate import make_evaluate, validate
from tests.train.conftest import Corpus

KEY = random.key(5)


def _config(corpus: Corpus, *overrides: str) -> Config:
    data = [f"data.train={corpus.train}", f"data.valid={corpus.valid}", f"data.noise={corpus.noise}"]
    loud = ["masking.mask_prob=0.05", "data.augment.prob=1", "data.augment.noise_ratio=1"]
    return Config.preset("tiny", [*data, *loud, *overrides])


def _batches(cfg: Config) -> list[dict[str, Tensor]]:
    dataset = open_dataset(cfg.data, 0, split="valid", sample_rate=cfg.sample_rate)
    return [to_device(raw, torch.device("cpu")) for raw in batches(dataset, epochs=1)]


def test_every_pass_and_every_cut_gives_the_same(corpus: Corpus) -> None:
    cfg = _config(corpus)
    params, state = init(random.key(0), cfg)
    before = tree_map(torch.clone, {"params": params, "state": state})
    evaluate = make_evaluate(cfg)
    first = validate(evaluate, params, state, _batches(cfg), KEY)
    assert first == validate(evaluate, params, state, _batches(cfg), KEY)
    assert first["masked_tokens"] > 10 and 0 < first["loss"] < 10
    small = _config(corpus, "data.max_batch_size=1", "data.num_buckets=2")
    assert len(_batches(small)) == 4 > len(_batches(cfg))
    cut = validate(evaluate, params, state, _batches(small), KEY)
    assert cut.pop("loss") == pytest.approx(first["loss"], rel=1e-5)
    assert cut == {name: value for name, value in first.items() if name != "loss"}
    assert validate(evaluate, params, state, _batches(cfg), random.key(6))["loss"] != first["loss"]
    tree_map(torch.testing.assert_close, {"params": params, "state": state}, before)


def test_equals_the_training_loss_without_dropout(corpus: Corpus) -> None:
    cfg = _config(corpus, "num_books=2")
    params, state = init(random.key(0), cfg)
    for raw in _batches(cfg):
        mixing, model = random.split(KEY, 2).unbind(0)
        batch = augment(raw, cfg.data.augment, mixing) | {"row": raw["utterance"]}
        _, (wanted, _) = loss_sum(params, state, batch, cfg, key=model, train=False)
        got = make_evaluate(cfg)(params, state, raw, KEY)
        for name in wanted:
            torch.testing.assert_close(got[name].double(), wanted[name].double(), rtol=1e-5, atol=0)
        assert int(got["unmasked_tokens"] + got["masked_tokens"]) == 2 * int(got["valid_tokens"])
        assert 0 <= int(got["unmasked_correct"]) <= int(got["unmasked_tokens"])


def test_unmasked_accuracy_is_that_of_guessing_right(corpus: Corpus) -> None:
    """A decoder that always says the commonest token is right as often as that one occurs."""
    cfg = _config(corpus)
    params, state = init(random.key(0), cfg)
    counts = sum(make_evaluate(cfg)(params, state, raw, KEY)["token_counts"][0] for raw in _batches(cfg))
    masked = sum(make_evaluate(cfg)(params, state, raw, KEY)["masked_token_counts"][0] for raw in _batches(cfg))
    best = int(counts.argmax())
    params["decoder"] = tree_map(torch.zeros_like, params["decoder"])
    bias = next(layer for layer in _dicts(params["decoder"]) if "bias" in layer)["bias"]
    bias[best] = 50.0
    found = validate(make_evaluate(cfg), params, state, _batches(cfg), KEY)
    assert found["accuracy"] == pytest.approx(int(masked[best]) / int(masked.sum()))
    rest = counts - masked
    assert found["unmasked_accuracy"] == pytest.approx(int(rest[best]) / int(rest.sum()))


def _dicts(tree: object) -> list[dict[str, Tensor]]:
    children = list(tree.values()) if isinstance(tree, dict) else list(tree) if isinstance(tree, list) else []
    return ([tree] if isinstance(tree, dict) else []) + [found for child in children for found in _dicts(child)]


def test_nothing_to_validate_is_nothing() -> None:
    cfg = Config.preset("tiny")
    assert validate(make_evaluate(cfg), {}, {}, [], KEY) == {}

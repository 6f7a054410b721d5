"""``${a.b}`` and ``a.b=c``."""

from __future__ import annotations

from typing import Any

import pytest

from nest_fn.config import Config, ConfigError
from nest_fn.config.parse.overrides import apply_overrides, resolve


@pytest.mark.parametrize(
    "tree, wanted",
    [
        ({"a": "${b}", "b": 2}, {"a": 2, "b": 2}),
        ({"a": "${b.c}", "b": {"c": [1]}}, {"a": [1], "b": {"c": [1]}}),
        ({"model": {"a": "${model.b}", "b": 2}}, {"model": {"a": 2, "b": 2}}),
        ({"model": {"a": "${b}", "b": 2}}, {"model": {"a": 2, "b": 2}}),  # as in a .nemo file
        ({"a": "${model.b}", "b": 2}, {"a": 2, "b": 2}),  # the model section alone
        ({"a": "${b}/x-${b}", "b": 2}, {"a": "2/x-2", "b": 2}),
        ({"a": "${b}", "b": "${c}", "c": 1.5}, {"a": 1.5, "b": 1.5, "c": 1.5}),
        ({"a": "???", "b": 1}, {"b": 1}),
        ({"a": "${b}", "b": "???"}, {}),
        ({"a": ["${b}", {"c": "${b}"}], "b": 1}, {"a": [1, {"c": 1}], "b": 1}),
        ({"a": None}, {"a": None}),
    ],
)
def test_references(tree: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert resolve(tree) == wanted


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"a": "${a}"}, r"'a' is a cycle of references: a -> a"),
        ({"a": "${b}", "b": "x${a}"}, "cycle"),
        ({"a": {"x": "${a}"}}, "cycle"),
        ({"a": "${b.c}"}, r"'a' refers to '\$\{b.c\}': no such key"),
        ({"a": "${b.c}", "b": 1}, "no such key"),
        ({"a": "${oc.env:HOME}"}, "resolvers are not supported"),
        ({"a": "${${b}}", "b": "a"}, "nested or not closed"),
        ({"a": "${b"}, "nested or not closed"),
        ({"a": {1: 2}}, "keys are text"),
    ],
)
def test_refused_references(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(tree)


def test_references_are_no_bomb() -> None:
    shared = {"a0": ["x"] * 9} | {f"a{i}": [f"${{a{i - 1}}}"] * 9 for i in range(1, 12)}
    with pytest.raises(ConfigError, match="references grow"):
        resolve(shared)
    text = {"a0": "x" * 100} | {f"a{i}": f"${{a{i - 1}}}" * 9 for i in range(1, 12)}
    with pytest.raises(ConfigError, match="more than 10000 characters"):
        resolve(text)


@pytest.mark.parametrize("root", [{"model": {"encoder": {"n_layers": 3}}}, {"encoder": {"n_layers": 3}}])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_overrides(root: dict[str, Any], prefix: str) -> None:
    before = repr(root)
    config = Config.from_dict(root, [f"{prefix}encoder.d_model=64", "encoder.n_heads=4", "optim.lr=1e-3"])
    assert (config.encoder.n_layers, config.encoder.d_model, config.optim.lr) == (3, 64, 1e-3)
    assert Config.from_dict(root, ["trainer.max_steps=7", "data.train=a.jsonl,b.jsonl"]).data.train == (
        "a.jsonl",
        "b.jsonl",
    )
    assert repr(root) == before


def test_references_follow_overrides() -> None:
    tree = {"model": {"encoder": {"d_model": 64, "n_heads": 4}, "decoder": {"feat_in": "${model.encoder.d_model}"}}}
    assert Config.from_dict(tree, ["encoder.d_model=32"]).decoder.feat_in == 32


def test_override_values_are_yaml() -> None:
    config = Config.from_dict(
        {}, ["optim.betas=[0.8, 0.9]", "preprocessor.normalize=null", "optim.sched={name: cosine}"]
    )
    assert config.optim.betas == (0.8, 0.9)
    assert config.preprocessor.normalize is None
    assert config.optim.sched is not None
    assert config.optim.sched.name == "cosine"
    assert apply_overrides({}, ["a.b=x=y"]) == {"a": {"b": "x=y"}}


@pytest.mark.parametrize(
    "override, words",
    [
        ("encoder.n_layers", "override 'encoder.n_layers' wants the form"),
        ("=3", "wants the form"),
        ("encoder..n_layers=3", "wants the form"),
        ("num_classes.x=3", "runs through a plain value, 8"),
        ("encoder.n_layers=[1", r"override 'encoder.n_layers=\[1': .*expected"),
        ("encoder.n_layer=3", "unknown key 'encoder.n_layer'; did you mean 'n_layers'?"),
    ],
)
def test_refused_overrides(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config.from_dict({"num_classes": 8}, [override])

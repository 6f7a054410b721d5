"""The examples of ``docs/examples/`` run, as a user runs them, and what they claim is so."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.func import grad

from nest_fn import Config, features, init, key, load, save
from nest_fn.layers import random
from nest_fn.layers.tree import flatten, tree_map

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
MAX_LINES = 80

# PyTorch has no batching rule for the Fourier transform of a signal on CPU: it loops, and says so.
pytestmark = pytest.mark.filterwarnings(
    "ignore:There is a performance drop.*aten..stft:UserWarning",
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning",
)


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str | Path) -> str:
    """What an example prints, started from its file in a process of its own."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | path)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples_are_short() -> None:
    paths = sorted(EXAMPLES.glob("*.py"))
    assert len(paths) >= 3
    assert not [path.name for path in paths if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES]


def test_training_lowers_the_loss() -> None:
    losses, ts, _ = example("train_from_python").train(30)
    assert ts.step == len(losses) == 30
    assert sum(losses[-5:]) / 5 < losses[0] - 0.5  # nats


def test_training_is_a_function_of_its_seed() -> None:
    train = example("train_from_python").train
    (_, one, _), (_, again, _), (_, other, _) = train(2), train(2), train(2, seed=1)
    ours, theirs = flatten(one.params), flatten(again.params)
    assert all(torch.equal(leaf, theirs[path]) for path, leaf in ours.items())
    assert not all(torch.equal(leaf, flatten(other.params)[path]) for path, leaf in ours.items())


def test_what_is_saved_can_be_looked_into(tmp_path: Path) -> None:
    assert "step    2  loss" in run("train_from_python", 3, tmp_path / "model")
    assert flatten(load(tmp_path / "model")[0]).keys()
    printed = run("features", tmp_path / "model")
    assert [line.split("  ")[0].strip() for line in printed.splitlines()] == ["log-mel", "layer 0", "layer 1"]


def test_transforms_agree_with_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    found = example("functional_transforms").main()
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert found["losses"].shape == (8,) and len(found["losses"].unique()) == 8
    each, whole = flatten(found["each"]), flatten(found["whole"])
    scale = max(float(leaf.abs().max()) for leaf in whole.values())
    for path, leaf in whole.items():  # the gradients of the examples add up to that of the batch
        torch.testing.assert_close(each[path].sum(0), leaf, rtol=1e-4, atol=1e-5 * scale, msg=path)
    gradient, way = flatten(found["gradient"]), flatten(found["direction"])
    slope = sum((gradient[path] * way[path]).sum() for path in way)
    torch.testing.assert_close(found["slope"], slope, rtol=1e-3, atol=1e-3)
    # The Hessian's product is how the gradient changes along the direction, here the gradient itself.
    step = 1e-3 / float(sum(leaf.square().sum() for leaf in gradient.values())) ** 0.5

    def moved(by: float) -> Any:
        params = tree_map(lambda leaf, along: leaf + by * along, found["params"], found["gradient"])
        return grad(found["value"])(params)

    difference = tree_map(lambda up, down: (up - down) / (2 * step), moved(step), moved(-step))
    product, wanted = (
        torch.cat([x.flatten() for x in flatten(t).values()]) for t in (found["hessian_gradient"], difference)
    )
    assert (product - wanted).norm() < 0.05 * product.norm()


def test_a_trained_model_knows_the_pitch_better(tmp_path: Path) -> None:
    """An untrained model is saved where there is none; training raises what its layers tell."""
    features, train = example("features"), example("train_from_python")
    untrained = features.main(str(tmp_path / "untrained"))
    assert (tmp_path / "untrained").is_dir() and features.main(str(tmp_path / "untrained")) == untrained
    _, ts, cfg = train.train(200)
    train.save(tmp_path / "trained", ts.params, ts.state, cfg)
    trained = features.main(str(tmp_path / "trained"))
    assert trained["log-mel"] == untrained["log-mel"]
    assert min(trained["layer 0"], trained["layer 1"]) > 0.1 + max(untrained.values())


def test_an_upstream_of_s3prl(tmp_path: Path) -> None:
    """What s3prl asks of an upstream: hidden states of waveforms of any lengths, their rate, trainable parameters."""
    cfg = Config.preset("tiny")
    save(tmp_path / "model", *init(key(0), cfg), cfg)
    upstream = example("s3prl_upstream").UpstreamExpert(str(tmp_path / "model"), refresh=False)
    wavs = [0.1 * random.normal(key(n), (n,)) for n in (40000, 31111, 300)]
    hidden = upstream(wavs)["hidden_states"]
    assert len(hidden) == 2 and upstream.get_downsample_rates("hidden_states") == 1280
    for wav, row in zip(wavs, hidden[-1], strict=True):
        (alone,), length = features(*load(tmp_path / "model")[:2], wav[None], torch.tensor([len(wav)]), cfg, [-1])
        torch.testing.assert_close(row[: int(length)], alone[0, : int(length)], atol=1e-5, rtol=1e-5)
    hidden[-1].square().mean().backward()
    assert sum(leaf.grad is not None for leaf in upstream.parameters()) > 50


def test_recognisers_are_compared_by_pairs(tmp_path: Path) -> None:
    """Differences known in advance: one more error in each utterance, and none at all."""
    texts = [f"{'abcdefghij' * (1 + index % 3)}" for index in range(40)]

    def write(name: str, wrong: int) -> str:
        lines = [{"text": text[wrong + index % 4 :], "reference": text} for index, text in enumerate(texts)]
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(tmp_path / name)

    two, three, same = (",".join(write(f"{seed}_{wrong}", wrong) for seed in range(2)) for wrong in (2, 3, 2))
    module = example("compare_recognisers")
    found = module.compare(two.split(","), three.split(","))
    assert found.difference == pytest.approx(len(texts) / sum(map(len, texts)))
    assert found.interval[0] <= found.difference <= found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.02  # paired: only the texts' lengths differ between resamples
    assert module.compare(two.split(","), same.split(",")).interval == (0.0, 0.0)
    assert "second - first  +0.0506, 95 %" in run("compare_recognisers", two, three)
    with pytest.raises(ValueError, match="as many files of both"):
        module.compare(two.split(","), three.split(",")[:1])

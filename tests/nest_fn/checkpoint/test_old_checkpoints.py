"""Checkpoints as earlier versions wrote them stay readable: tests/golden/checkpoints holds one set for every schema.

A set is a model as a folder and as a single file, each with tensors in ``.pt`` and in ``.safetensors``, all of the same
trees, whose values follow from the names of the leaves. What is there is never written anew. When the schema number
rises, add the set of the new one, as what is released writes it:

    python -m tests.nest_fn.checkpoint.test_old_checkpoints
"""

from __future__ import annotations

import json
import shutil
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nest_fn import Config, abstract
from nest_fn.checkpoint import folder as checkpoint_folder
from nest_fn.checkpoint import model_files as checkpoint
from nest_fn.checkpoint.folder import SCHEMA, _sealed
from nest_fn.checkpoint.model_files import CheckpointError
from nest_fn.files import tensors as tensor_files
from nest_fn.layers.tree import fill, flatten

FOLDER = Path(__file__).parents[2] / "golden" / "checkpoints"
SETS = sorted(path.name for path in FOLDER.glob("schema*"))
SUFFIXES = [
    ".pt",
    pytest.param(
        ".safetensors", marks=pytest.mark.skipif(not find_spec("safetensors"), reason="safetensors is not installed")
    ),
]
SETTINGS = ["encoder.n_layers=1", "encoder.d_model=8", "encoder.n_heads=2", "encoder.subsampling_conv_channels=2",
            "encoder.ff_expansion_factor=2", "preprocessor.features=16", "num_classes=16", "code_dim=2"]  # fmt: skip
META = {"step": 1234, "epoch": 5, "batch": 6, "data_digest": "0123456789abcdef", "share": 0.1}


def _leaf(name: str, like: torch.Tensor) -> torch.Tensor:
    """Multiples of 1/256, which every float dtype at hand holds exactly, in an order of the leaf's own."""
    start, stride = divmod(zlib.crc32(name.encode()), 250)
    return ((torch.arange(like.numel()) * (stride + 1) + start) % 251 - 125).to(like.dtype).reshape(like.shape) / 256


def _trees() -> tuple[Config, dict[str, Any]]:
    """What the fixtures hold: a model, and in folders the trees of a trainer with branches of every kind."""
    cfg = Config.preset("tiny", SETTINGS)
    params, state = (
        fill(tree, {path: _leaf(path, leaf) for path, leaf in flatten(tree).items()}) for tree in abstract(cfg)
    )
    mean = {"decoder.bias": torch.arange(-8, 8).to(torch.bfloat16) / 4, "scale": torch.tensor(-0.0)}
    optimizer = {"updates": torch.tensor(1234), "mean": mean, "square": [None, torch.zeros(0, 3), {}, []]}
    return cfg, {"params": params, "state": state, "optimizer": optimizer, "ema": {}}


def _same(a: Any, b: Any) -> bool:
    """Equal structure, dtypes, shapes and bits."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(_same, a, b))
    if a is None or b is None:
        return a is b
    bits = [leaf.contiguous().reshape(-1).view(torch.uint8) for leaf in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def test_there_is_a_set_for_every_schema() -> None:
    assert [f"schema{number}" for number in range(1, SCHEMA + 1)] == SETS


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", SETS)
def test_an_old_folder_is_read(name: str, suffix: str) -> None:
    cfg, trees = _trees()
    folder = FOLDER / name / f"folder{suffix}"
    assert checkpoint.verify(folder)["schema"] == int(name.removeprefix("schema"))
    found = checkpoint.read_checkpoint(folder)
    assert _same(found.trees, trees)
    assert {key: found.meta[key] for key in META} == META and found.meta["versions"]["nest_fn"]
    params, state, read = checkpoint.load(folder)
    assert _same(params, trees["params"]) and _same(state, trees["state"])
    assert (read.encoder, read.preprocessor, read.num_classes) == (cfg.encoder, cfg.preprocessor, cfg.num_classes)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", SETS)
def test_an_old_file_is_read(name: str, suffix: str) -> None:
    cfg, trees = _trees()
    params, state, read = checkpoint.load(FOLDER / name / f"model{suffix}")
    assert _same(params, trees["params"]) and _same(state, trees["state"])
    assert read.encoder == cfg.encoder


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", SETS)
def test_the_digests_are_compared(tmp_path: Path, name: str, suffix: str) -> None:
    """A bit that flips among the numbers, which no format notices by itself."""
    shutil.copytree(FOLDER / name, tmp_path / name)
    number = _leaf("decoder.bias", torch.zeros(16)).numpy().tobytes()
    for path in (tmp_path / name / f"folder{suffix}" / f"params{suffix}", tmp_path / name / f"model{suffix}"):
        content = path.read_bytes()
        assert content.count(number) == 1
        path.write_bytes(content.replace(number, number[:-1] + bytes([number[-1] ^ 1])))
    for path in (tmp_path / name / f"folder{suffix}", tmp_path / name / f"model{suffix}"):
        with pytest.raises(CheckpointError, match="changed since they were written|damaged"):
            checkpoint.load(path)


@pytest.mark.parametrize("schema", [0, SCHEMA + 1, 10**30, -1, "1", None, [1], 1.5])
def test_a_folder_of_another_schema_is_refused(tmp_path: Path, schema: Any) -> None:
    folder = shutil.copytree(FOLDER / SETS[-1] / "folder.pt", tmp_path / "later")
    content = json.loads((folder / "meta.json").read_text())
    del content["sha256"]
    written = {**content, "schema": schema, "versions": {"nest_fn": "99.0"}, "trees": "of another form"}
    (folder / "meta.json").write_text(_sealed(written))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    told = str(caught.value)
    assert f"{folder / 'meta.json'}: schema {schema!r}, this version reads {SCHEMA}" in told and "99.0" in told


@pytest.mark.parametrize("schema", [str(SCHEMA + 1), "one", ""])
def test_a_file_of_another_schema_is_refused(tmp_path: Path, schema: str) -> None:
    leaves, texts = tensor_files.read_tensors(FOLDER / SETS[-1] / "model.pt")
    texts = {**texts, "schema": schema, "structure": "of another form"}
    del texts["sha256"]
    texts["sha256"] = checkpoint_folder.digest_of(leaves, texts)
    tensor_files.write_tensors(tmp_path / "later.pt", leaves, texts)
    with pytest.raises(CheckpointError, match=rf"later\.pt: schema '{schema}', this version reads {SCHEMA}"):
        checkpoint.load(tmp_path / "later.pt")


def _write(folder: Path) -> None:
    """The set of this version's schema; an error where there is one."""
    folder.mkdir(parents=True)
    cfg, trees = _trees()
    for suffix in (".pt", ".safetensors"):
        with patch.object(checkpoint_folder, "usual_suffix", lambda suffix=suffix: suffix):
            checkpoint.write_checkpoint(folder / f"folder{suffix}", trees, cfg.to_dict(), META)
        checkpoint.save_file(folder / f"model{suffix}", trees["params"], trees["state"], cfg, META["step"])


if __name__ == "__main__":
    _write(FOLDER / f"schema{SCHEMA}")

"""Checkpoints of the original PureTorchSSLModel interface: what is in them, what else is read, what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nest_fn import PureTorchSSLModel, create_optimizer
from nest_fn.checkpoint.model_files import CheckpointError, save, save_file
from nest_fn.errors import OutputError
from nest_fn.interop import nemo
from nest_fn.interop.nemo_archive import write_nemo
from nest_fn.layers.tree import flatten
from tests.train.facade.facade_cases import SMALL, batch, equal, model

B = batch()


def trained(steps: int = 2, seed: int = 5) -> tuple[PureTorchSSLModel, torch.optim.Optimizer]:
    made = model(*SMALL, seed=seed)
    optimizer = create_optimizer(made, made.cfg)
    for _ in range(steps):
        update(made, optimizer)
    return made, optimizer


def update(made: PureTorchSSLModel, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    optimizer.zero_grad()
    value = made.training_step(B)
    value.backward()
    optimizer.step()
    return value.detach()


def same(a: PureTorchSSLModel, b: PureTorchSSLModel) -> bool:
    return equal(dict(a.state_dict()), dict(b.state_dict())) and a.cfg == b.cfg


def test_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    made, optimizer = trained()
    made.validation_step(B)
    made.save_checkpoint(tmp_path / "one.pt", optimizer=optimizer, epoch=10, step=1000)
    wanted = [update(made, optimizer) for _ in range(2)]

    fresh = model(*SMALL, seed=99)
    other = create_optimizer(fresh, fresh.cfg)
    info = fresh.load_checkpoint(tmp_path / "one.pt", optimizer=other)
    assert info == {"epoch": 10, "step": 1000}
    assert (fresh.seed, fresh.counter.tolist()) == (5, [2, 1])
    assert [update(fresh, other) for _ in range(2)] == wanted
    assert same(fresh, made)

    loaded = PureTorchSSLModel.from_checkpoint(tmp_path / "one.pt")
    assert (loaded.seed, loaded.counter.tolist()) == (5, [2, 1])
    assert PureTorchSSLModel.from_checkpoint(tmp_path / "one.pt", seed=8).counter.tolist() == [0, 0]
    assert loaded.cfg == made.cfg
    assert torch.equal(loaded.training_step(B), wanted[0])


def test_the_file_holds_the_seeds_entries_and_no_code(tmp_path: Path) -> None:
    made, optimizer = trained()
    made.save_checkpoint(tmp_path / "one.pt", optimizer=optimizer)
    content = torch.load(tmp_path / "one.pt", weights_only=True)
    assert content.keys() == {"model_state_dict", "config", "epoch", "step", "optimizer_state_dict", "seed", "counter"}
    assert (content["epoch"], content["step"], content["config"]["num_classes"]) == (0, 0, 8)
    assert equal(content["model_state_dict"], dict(made.state_dict()))
    assert content["model_state_dict"]["quantizer.codebooks"].dtype == torch.float64
    made.save_checkpoint(tmp_path / "two.pt")
    assert "optimizer_state_dict" not in torch.load(tmp_path / "two.pt", weights_only=True)


def test_the_ports_files_load(tmp_path: Path) -> None:
    """The reference's names of tensors, a config of keywords, and nothing of ours beside it."""
    made = model(*SMALL, "preprocessor.dither=0", "masking.mask_prob=0.01", "masking.force_block=false")
    words = {"n_layers": 1, "d_model": 8, "n_heads": 2, "subsampling_conv_channels": 2, "num_classes": 8, "code_dim": 2}
    weights = nemo.to_state_dict(made.params, made.state, made.cfg)
    torch.save({"model_state_dict": weights, "config": words, "epoch": 3, "step": 7}, tmp_path / "port.pt")
    loaded = PureTorchSSLModel.from_checkpoint(tmp_path / "port.pt")
    assert equal(dict(loaded.state_dict()), dict(made.state_dict()))
    other = model(*SMALL, seed=4)
    assert other.load_checkpoint(tmp_path / "port.pt") == {"epoch": 3, "step": 7}
    assert equal(dict(other.state_dict()), dict(made.state_dict()))
    assert other.seed == 4


@pytest.mark.parametrize("name", ["folder", "file.pt", "file.safetensors", "file.nemo"])
def test_our_other_files_load(tmp_path: Path, name: str) -> None:
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    made, _ = trained()
    write = write_nemo if name.endswith("nemo") else save_file if "." in name else save
    write(tmp_path / name, made.params, made.state, made.cfg)
    loaded = PureTorchSSLModel.from_checkpoint(tmp_path / name)
    assert equal(dict(loaded.state_dict()), dict(made.state_dict()))
    assert torch.equal(loaded.eval().training_step(B), _anew(made).eval().training_step(B))
    other = model(*SMALL, seed=1)
    assert other.load_checkpoint(tmp_path / name) == {"epoch": 0, "step": 0}
    assert equal(dict(other.state_dict()), dict(made.state_dict()))


def _anew(made: PureTorchSSLModel) -> PureTorchSSLModel:
    """The same model with its draws before it."""
    return PureTorchSSLModel.from_params(made.params, made.state, made.cfg, seed=0)


def test_half_precision_survives(tmp_path: Path) -> None:
    made = model(*SMALL).half()
    made.save_checkpoint(tmp_path / "half.pt")
    assert same(PureTorchSSLModel.from_checkpoint(tmp_path / "half.pt"), made)


def test_numerics_can_be_chosen(tmp_path: Path) -> None:
    model(*SMALL).save_checkpoint(tmp_path / "one.pt")
    assert PureTorchSSLModel.from_checkpoint(tmp_path / "one.pt", compat="legacy").cfg.compat == "legacy"


def test_not_strict(tmp_path: Path) -> None:
    made = model(*SMALL)
    content = {"model_state_dict": dict(made.state_dict()), "config": made.cfg.to_dict()}
    del content["model_state_dict"]["decoder.weight"]
    torch.save(content, tmp_path / "part.pt")
    other = model(*SMALL, seed=1)
    with pytest.raises(CheckpointError, match="part.pt: does not fit: .*decoder.weight"):
        other.load_checkpoint(tmp_path / "part.pt")
    other.load_checkpoint(tmp_path / "part.pt", strict=False)
    assert equal(flatten(other.params["encoder"]), flatten(made.params["encoder"]))


class _Runs:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "made"
    content = {"model_state_dict": {}, "config": {}, "epoch": _Runs(str(target))}
    torch.save(content, tmp_path / "bad.pt")
    for read in (PureTorchSSLModel.from_checkpoint, model(*SMALL).load_checkpoint):
        with pytest.raises(CheckpointError, match="mkdir, which could run code"):
            read(tmp_path / "bad.pt")
    assert not target.exists()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"epoch": "ten"}, "epoch, step, seed or counter are not whole numbers"),
        ({"counter": [1]}, "epoch, step, seed or counter are not whole numbers"),
        ({"counter": 3}, "epoch, step, seed or counter are not whole numbers"),
        ({"model_state_dict": [1, 2]}, "wants tensors by name"),
        ({"model_state_dict": {"a": 3}}, "only tensors by name are read"),
        ({"config": None}, "has no 'config'"),
        ({"config": {"encoder": {"n_layer": 1}}}, "did you mean 'n_layers'"),
        ({"config": {"num_classes": 9}}, "do not fit the config|is \\["),
    ],
    ids=range(8),
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = model(*SMALL)
    made.save_checkpoint(tmp_path / "one.pt")
    content = torch.load(tmp_path / "one.pt", weights_only=True) | change
    torch.save(content, tmp_path / "one.pt")
    with pytest.raises(CheckpointError, match=message):
        PureTorchSSLModel.from_checkpoint(tmp_path / "one.pt")


def test_missing_damaged_and_another_model(tmp_path: Path) -> None:
    made, optimizer = trained(1)
    with pytest.raises(CheckpointError, match="none.pt: cannot be read"):
        PureTorchSSLModel.from_checkpoint(tmp_path / "none.pt")
    made.save_checkpoint(tmp_path / "one.pt")
    with pytest.raises(CheckpointError, match="has no state of an optimizer; leave optimizer= out"):
        made.load_checkpoint(tmp_path / "one.pt", optimizer=optimizer)
    with pytest.raises(CheckpointError, match="one.pt: does not fit"):
        model("num_classes=9").load_checkpoint(tmp_path / "one.pt")
    whole = (tmp_path / "one.pt").read_bytes()
    (tmp_path / "one.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        PureTorchSSLModel.from_checkpoint(tmp_path / "one.pt")
    with pytest.raises(OutputError, match="is a folder, and a file was to be written"):
        made.save_checkpoint(tmp_path)

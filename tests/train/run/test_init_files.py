"""``pretrain --init`` from files of the reference and of the port, as they lie on people's disks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nest_fn import Config, init, key
from nest_fn.checkpoint.folder import read_checkpoint
from nest_fn.interop import nemo
from nest_fn.interop.nemo_config import from_reference
from nest_fn.interop.port_keywords import config_from_keywords
from nest_fn.layers.tree import flatten
from nest_fn.layers.types import Params, State
from nest_fn.train.cli.main import main
from tests.nest_fn.interop.test_nemo_files import pack, reference_config
from tests.train.conftest import Corpus

from .test_init import Captured, evaluated, validations, words

KEYWORDS = {"n_layers": 2, "d_model": 8, "n_heads": 2, "subsampling_conv_channels": 2, "num_classes": 8, "code_dim": 2}
SCHEDULE = ("trainer.max_steps=1", "optim.sched.name=constant", "optim.sched.warmup_steps=0")
Source = tuple[Path, Params, State, Config]


def lightning(folder: Path, wrap: Callable[[Any], Any] = lambda config: config, prefix: str = "") -> Source:
    """A ``.ckpt`` of two layers, with what Lightning stores beside the weights."""
    cfg = from_reference(reference_config(n_layers=2), "by hand", None)
    params, state = init(key(4), cfg)
    weights = {prefix + name: leaf for name, leaf in nemo.to_state_dict(params, state, cfg).items()}
    content = {"state_dict": weights, "hyper_parameters": {"cfg": wrap(reference_config(n_layers=2))}, "epoch": 3,
               "global_step": 77, "pytorch-lightning_version": "2.4.0", "optimizer_states": [], "loops": {},
               "lr_schedulers": []}  # fmt: skip
    torch.save(content, folder / "a.ckpt")
    return folder / "a.ckpt", params, state, cfg


def compiled_lightning(folder: Path) -> Source:
    """Of a module that was compiled."""
    return lightning(folder, prefix="_orig_mod.")


def omega_lightning(folder: Path) -> Source:
    """With settings in OmegaConf's objects, whose classes are not here when the file is read."""
    module = {name: ModuleType(f"omegaconf.{name}") for name in ("dictconfig", "listconfig", "nodes")}
    made = {}
    for owner, name in (("dictconfig", "DictConfig"), ("listconfig", "ListConfig"), ("nodes", "AnyNode")):
        made[name] = type(name, (), {"__module__": f"omegaconf.{owner}"})
        setattr(module[owner], name, made[name])

    def wrap(value: Any) -> Any:
        kind = "DictConfig" if isinstance(value, dict) else "ListConfig" if isinstance(value, list) else "AnyNode"
        node = made[kind]()
        if isinstance(value, dict):
            node._content = {name: wrap(child) for name, child in value.items()}
        else:
            setattr(node, *(("_content", list(map(wrap, value))) if isinstance(value, list) else ("_val", value)))
        return node

    names = {"omegaconf": ModuleType("omegaconf")} | {one.__name__: one for one in module.values()}
    with pytest.MonkeyPatch.context() as patch:
        for name, one in names.items():
            patch.setitem(sys.modules, name, one)
        return lightning(folder, wrap)


def port(folder: Path, config: Mapping[str, Any] | None = None, prefix: str = "", own: bool = False) -> Source:
    """A ``.pt`` of the port, by default with its flat keywords as config."""
    cfg = config_from_keywords(KEYWORDS) if config is None else Config.from_dict(config)
    params, state = init(key(5), cfg)
    names = flatten(params) | flatten(state) if own else nemo.to_state_dict(params, state, cfg)
    weights = {prefix + name: leaf for name, leaf in names.items()}
    content = {"model_state_dict": weights, "config": KEYWORDS if config is None else config, "epoch": 2, "step": 30,
               "optimizer_state_dict": {"state": {}}}  # fmt: skip
    torch.save(content, folder / "a.pt")
    return folder / "a.pt", params, state, cfg


def nested_port(folder: Path) -> Source:
    """With a nested config, and our own names under those of data-parallel and compiled modules."""
    return port(folder, Config.preset("tiny").to_dict(), "module._orig_mod.", own=True)


@pytest.mark.parametrize("make", [lightning, compiled_lightning, omega_lightning, port, nested_port])
def test_the_first_validation_is_the_sources(
    make: Callable[[Path], Source], corpus: Corpus, tmp_path: Path, capsys: Captured
) -> None:
    """Without ``-c`` the config is the file's; weights, statistics and codebooks are taken, the optimizer is new."""
    file, params, state, cfg = make(tmp_path)
    run = words(corpus, tmp_path / "run", "--init", str(file), *SCHEDULE)
    assert main(run) == 0
    told = capsys.readouterr().err
    assert "taken: encoder.subsampling, decoder, quantizer, masking, encoder.layers 0-1" in told
    assert "not taken" not in told and "without a place" not in told and "not as in" not in told
    cfg = cfg.override(*(word for word in run if "=" in word))
    assert validations(tmp_path / "run")[0] == evaluated(params, state, cfg)
    trees, _, meta = read_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000001")
    assert float(trees["optimizer"]["updates"]) == 1 and meta["step"] == 1


@pytest.mark.parametrize("make", [lightning, port])
def test_what_is_taken_and_what_is_not(
    make: Callable[[Path], Source], corpus: Corpus, tmp_path: Path, capsys: Captured
) -> None:
    """A third layer and another number of classes: the encoder's two layers go over, decoder and codebooks do not."""
    file, params, _, _ = make(tmp_path)
    more = ["encoder.n_layers=3", "num_classes=32", *SCHEDULE, "optim.lr=0", "optim.sched.min_lr=0"]
    assert main(words(corpus, tmp_path / "deep", "--init", str(file), *more)) == 0
    told = capsys.readouterr().err
    assert "taken: encoder.subsampling, masking, encoder.layers 0-1" in told
    assert "not taken, as initialised: encoder.layers.2: is not in the file" in told
    assert "not taken, as initialised: decoder: 'decoder." in told and "is [8, 8] in the file, [32, 8] here" in told
    assert "not taken, as initialised: quantizer: 'quantizer.codebooks' is [1, 8, 2] in the file" in told
    assert "encoder.n_layers: 2 -> 3" in told
    trees = read_checkpoint(tmp_path / "deep" / "checkpoints" / "step_00000001")[0]
    found = trees["params"]["encoder"]["layers"]
    for number in range(2):  # the learning rate is 0, so that the one update left them alone
        for path, leaf in flatten(params["encoder"]["layers"][number]).items():
            assert torch.equal(flatten(found[number])[path], leaf), path
    flat = ["encoder.n_layers=1", *SCHEDULE]
    assert main(words(corpus, tmp_path / "flat", "--init", str(file), *flat)) == 0
    assert "without a place here: encoder.layers 1" in capsys.readouterr().err
    wide = words(corpus, tmp_path / "wide", "--init", str(file), "encoder.d_model=16")
    assert main(wide) == 4 and "no part of its encoder fits" in capsys.readouterr().err
    assert not (tmp_path / "wide").exists()


@pytest.mark.filterwarnings("ignore:.*settings of its training run are left out")
def test_the_released_dialect(corpus: Corpus, tmp_path: Path, capsys: Captured) -> None:
    """18 layers, a second decoder ``decoder_ssl`` passed over, counters missing, tarred data; in its old numerics."""
    settings = reference_config(n_layers=18)
    settings["train_ds"] = {"manifest_filepath": "/a.json", "is_tarred": True, "tarred_audio_filepaths": "a_{0..3}.tar"}
    cfg = from_reference(settings, "by hand", None)
    params, state = init(key(6), cfg)
    weights = {name: leaf for name, leaf in nemo.to_state_dict(params, state, cfg).items()
               if not name.endswith("num_batches_tracked")}  # fmt: skip
    for name in ("weight", "bias"):
        weights[f"decoder_ssl.decoder_layers.0.{name}"] = torch.full_like(
            weights[f"decoder.decoder_layers.0.{name}"], 9
        )
    archive = pack(tmp_path / "large.nemo", settings, weights)
    run = words(corpus, tmp_path / "run", "--init", str(archive), *SCHEDULE, "compat=legacy")
    assert main(run) == 0
    told = capsys.readouterr().err
    assert "taken: encoder.subsampling, decoder, quantizer, masking, encoder.layers 0-17" in told
    cfg = cfg.override(*(word for word in run if "=" in word))
    first = validations(tmp_path / "run")[0]
    assert first == evaluated(params, state, cfg) != evaluated(params, state, cfg.override("compat=current"))

"""Every public function with each of its arguments replaced by something else: it says what it wanted, and no more."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nest_fn
from nest_fn import Config
from nest_fn.errors import NestError
from nest_fn.interop import nemo

AUDIO, LENGTHS = torch.zeros(2, 8000), torch.tensor([8000, 4000])
BATCH = {"audio": AUDIO, "audio_len": LENGTHS, "noisy_audio": AUDIO, "noisy_audio_len": LENGTHS}
MEL, FRAMES = torch.zeros(2, 80, 48), torch.tensor([48, 30])
KEY = nest_fn.key(0)
NOT_TOLD = {"train", "apply_mask"}  # as everywhere in Python, anything is true or false


@functools.cache
def model() -> tuple[Any, Any, Config]:
    cfg = Config.preset("tiny", ["encoder.n_layers=1"])
    return (*nest_fn.init(KEY, cfg), cfg)


@functools.cache
def module() -> Any:
    return nest_fn.PureTorchSSLModel.from_params(*model())


def calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A good call of every public function."""
    params, state, cfg = model()
    optimizer = nest_fn.create_optimizer(module(), cfg)
    whole = {"params": params, "state": state, "batch": BATCH, "cfg": cfg, "key": KEY}
    return {
        "init": (nest_fn.init, {"key": KEY, "cfg": cfg}),
        "abstract": (nest_fn.abstract, {"cfg": cfg}),
        "encode": (nest_fn.encode, {"params": params, "state": state, "features": MEL, "lengths": FRAMES, "cfg": cfg,
                                    "key": KEY, "rows": torch.arange(2)}),
        "forward": (nest_fn.forward, whole | {"mask": None}),
        "loss": (nest_fn.loss, whole | {"mask": None}),
        "loss_sum": (nest_fn.loss_sum, whole),
        "quantize": (nest_fn.quantize, {"state": state, "features": MEL, "cfg": cfg}),
        "features": (nest_fn.features, {"params": params, "state": state, "audio": AUDIO, "lengths": LENGTHS,
                                        "cfg": cfg, "layers": [0]}),
        "log_mel": (nest_fn.log_mel, {"audio": AUDIO, "audio_len": LENGTHS, "cfg": cfg.preprocessor, "key": KEY}),
        "key": (nest_fn.key, {"seed": 0}),
        "fold_in": (nest_fn.fold_in, {"key": KEY, "i": 1}),
        "split": (nest_fn.split, {"key": KEY, "n": 2}),
        "save": (nest_fn.save, {"path": "model", "params": params, "state": state, "cfg": cfg, "step": 0}),
        "save_file": (nest_fn.save_file, {"path": "model.pt", "params": params, "state": state, "cfg": cfg, "step": 0}),
        "load": (nest_fn.load, {"path": "model.pt"}),
        "summary": (nest_fn.summary, {"params": params}),
        "create_optimizer": (nest_fn.create_optimizer, {"model": module(), "cfg": cfg}),
        "create_scheduler": (nest_fn.create_scheduler, {"optimizer": optimizer, "cfg": cfg}),
        "Config.preset": (Config.preset, {"name": "tiny", "overrides": []}),
        "Config.from_dict": (Config.from_dict, {"mapping": {}, "overrides": []}),
        "Config.from_yaml": (Config.from_yaml, {"path": "tiny.yaml", "overrides": []}),
        "to_state_dict": (nemo.to_state_dict, {"params": params, "state": state, "cfg": cfg}),
        "from_state_dict": (nemo.from_state_dict, {"mapping": nemo.to_state_dict(*model()), "cfg": cfg}),
        "training_step": (module().training_step, {"batch": BATCH}),
    }  # fmt: skip


def wrong() -> list[Any]:
    params, state, cfg = model()
    return [
        None, "tiny", 7, -1, 2.5, float("nan"), True, [], {}, b"x", object(), np.zeros((2, 8000)), torch.zeros(3), cfg,
        params, state, "a\nb\0", [1, "x"], {"encoder": {"layers": []}, "decoder": {}},
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(calls()))
def test_it_says_what_it_wanted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    function, good = calls()[name]
    (tmp_path / "tiny.yaml").write_text("num_classes: 64\n")
    nest_fn.save_file("model.pt", *model())
    for argument in good.keys() - NOT_TOLD:
        for value in wrong():
            try:
                function(**good | {argument: value})
            except (TypeError, ValueError, NestError) as error:
                told = str(error)
                assert told and len(told) < 2000, (argument, value)
                assert "object has no attribute" not in told and "not supported between" not in told, (argument, told)


def test_every_public_function_is_here() -> None:
    public = {name for name in nest_fn.__all__ if inspect.isfunction(getattr(nest_fn, name))}
    assert public <= calls().keys(), public - calls().keys()

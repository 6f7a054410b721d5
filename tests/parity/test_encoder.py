"""The encoder against the reference's stored runs: outputs, gradients, batch-norm statistics, in train and eval."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn.config import Config
from nest_fn.interop import nemo
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.tree import fill, flatten
from nest_fn.model import encode
from tests.reference_cases import Case, load, names

CASES = [name for name in names("encoder_") if name != "encoder_errors"]


def config_of(case: Case) -> Config:
    settings = case.config["encoder"]
    return Config.from_dict({"preprocessor": {"features": settings["feat_in"]}, "encoder": settings})


def run(case: Case, train: bool) -> tuple[torch.Tensor, torch.Tensor, Any, Any, Any, torch.Tensor]:
    cfg = config_of(case)
    weights = {f"encoder.{name}": value for name, value in case.group("weights").items()}
    params, state = nemo.from_state_dict(weights, cfg, parts=("encoder",))
    leaves = {path: leaf.requires_grad_() for path, leaf in flatten(params).items()}
    x = case.tensors["in/audio_signal"].clone().requires_grad_()
    y, lengths, new_state = encode(fill(params, leaves), state, x, case.tensors["in/length"], cfg, train=train)
    valid = valid_mask(lengths, y.shape[2])[:, None]
    target = (y * case.tensors["in/grad_weight"][:, :, : y.shape[2]] * valid).sum()
    grads = torch.autograd.grad(target, [x, *leaves.values()])
    return y, lengths, dict(zip(leaves, grads[1:], strict=True)), new_state, cfg, grads[0]


def relative(ours: torch.Tensor, theirs: torch.Tensor, scale: float | None = None) -> float:
    """Largest difference over the largest value (of this tensor, or the given scale)."""
    return float((ours - theirs).abs().max() / (scale or theirs.abs().max().clamp(min=1e-30)))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_encoder(name: str, mode: str) -> None:
    case = load(name)
    if f"out_{mode}/outputs" not in case.tensors:
        stored = case.group("out_train")  # no batch norm, no dropout: eval equals train
        train = False
    else:
        stored, train = case.group(f"out_{mode}"), mode == "train"
    y, lengths, grads, state, cfg, x_grad = run(case, train)
    y = y.detach()
    assert torch.equal(lengths, stored["length"])
    assert y.shape == stored["outputs"].shape
    assert relative(y, stored["outputs"]) < 1e-5
    # Without batch norm eval equals train; with it, only whole cases hold the gradients of eval.
    batch_norm = f"out_{mode}/outputs" in case.tensors
    theirs = case.group("grads_eval" if batch_norm and not train else "grads")
    if theirs:
        assert relative(x_grad, theirs["@input"]) < 2e-5
        check_gradients(grads, theirs, case, cfg, "train" if train else "eval")
    if train and case.group("after"):
        check_statistics(state, case, cfg)


def check_gradients(grads: dict[str, Any], theirs: dict[str, Any], case: Case, cfg: Config, mode: str) -> None:
    floors = case.config["fp32_vs_fp64"]
    floor = floors.get(mode, floors["train"])
    assert {n for n in theirs if not n.startswith("@")} == set(dict_names(grads, cfg))
    for name, ours in dict_names(grads, cfg).items():
        # The largest float32 error of the reference itself bounds what a comparison can mean.
        bound = 3 * floor["grad_params_worst_abs"] + 1e-5 * float(theirs[name].abs().max())
        assert float((ours - theirs[name]).abs().max()) <= bound, name


def dict_names(grads: dict[str, torch.Tensor], cfg: Config) -> dict[str, torch.Tensor]:
    """Gradients under the reference's names, encoder-relative; tied tensors under their first name."""
    renamed = nemo.rename(grads, cfg)
    return {name.removeprefix("encoder."): leaf for name, leaf in renamed.items()}


def check_statistics(state: Any, case: Case, cfg: Config) -> None:
    ours = {
        n.removeprefix("encoder."): leaf for n, leaf in nemo.rename(flatten({"encoder": state["encoder"]}), cfg).items()
    }
    theirs = case.group("after")
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert relative(ours[name].to(torch.float64), value.to(torch.float64)) < 1e-5 or torch.equal(
            ours[name], value
        ), name

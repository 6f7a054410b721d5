"""The encoder against the reference's float64 runs, in train and eval: outputs, gradients, batch-norm statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nest_fn.config import Config
from nest_fn.interop import nemo
from nest_fn.layers.lengths import valid_mask
from nest_fn.layers.tree import fill, flatten
from nest_fn.model import encode
from tests.parity.rounding import Leaves, beyond, sensitivity
from tests.reference_cases import Case, exact, exact_names

CASES = exact_names("encoder_")
TOLERANCE = 1e-12  # relative, see ``scale_of``


def config_of(case: Case) -> Config:
    settings = case.config["encoder"]
    return Config.from_dict({"preprocessor": {"features": settings["feat_in"]}, "encoder": settings})


def run(case: Case, train: bool, given: Leaves | None = None) -> Leaves:
    """Outputs, lengths, gradients of params and input under the reference's names, and statistics.

    ``given``, ``in/...`` and ``weights/...``, replaces the case's own tensors and sets the precision.
    """
    cfg, tensors = config_of(case), case.tensors if given is None else given
    weights = {f"encoder.{name}": value for name, value in case._replace(tensors=tensors).group("weights").items()}
    params, state = nemo.from_state_dict(weights, cfg, parts=("encoder",))
    leaves = {path: leaf.requires_grad_() for path, leaf in flatten(params).items()}
    x = tensors["in/audio_signal"].clone().requires_grad_()
    y, lengths, new_state = encode(fill(params, leaves), state, x, case.tensors["in/length"], cfg, train=train)
    valid = valid_mask(lengths, y.shape[2])[:, None]
    target = (y * tensors["in/grad_weight"][:, :, : y.shape[2]] * valid).sum()
    grads = dict(zip(("@input", *leaves), torch.autograd.grad(target, [x, *leaves.values()]), strict=True))
    found = {"outputs": y.detach(), "grads/@input": grads.pop("@input")}
    found |= {f"grads/{name}": leaf for name, leaf in relative_names(grads, cfg).items()}
    statistics = relative_names(flatten({"encoder": new_state["encoder"]}), cfg)
    return found | {f"after/{name}": leaf for name, leaf in statistics.items() if leaf.is_floating_point()}


def relative_names(leaves: Leaves, cfg: Config) -> Leaves:
    """Leaves under the reference's names, encoder-relative; tied tensors under their first name."""
    return {name.removeprefix("encoder."): leaf for name, leaf in nemo.rename(leaves, cfg).items()}


def modes(case: Case) -> list[str]:
    """Both, or train alone where nothing distinguishes them: no batch norm, no dropout."""
    return ["train", "eval"] if "out_eval/outputs" in case.tensors else ["train"]


def scale_of(value: torch.Tensor, gradients: float = 0.0) -> float:
    """What an error is relative to: a tensor's largest value, for a gradient at least 1e-3 of the largest of all.

    A gradient that is zero in exact arithmetic (of the key's bias, of a bias before batch norm) is a sum of terms as
    large as the largest, and is compared with that.
    """
    own = float(value.abs().max())
    return max(own, 1e-3 * gradients, 1e-30) if own > 1e-9 * gradients else gradients


def errors(case: Case, mode: str) -> dict[str, float]:
    """Each stored tensor's largest difference from ours, relative."""
    ours = run(case, train=mode == "train")
    wanted: dict[str, Any] = {"outputs": case.tensors[f"out_{mode}/outputs"]}
    wanted |= {f"grads/{k}": v for k, v in case.group("grads" if mode == "train" else "grads_eval").items()}
    if mode == "train":
        wanted |= {f"after/{name}": value for name, value in case.group("after").items() if value.is_floating_point()}
        assert wanted.keys() == ours.keys()
    largest = max((float(x.abs().max()) for name, x in wanted.items() if name.startswith("grads/")), default=0.0)
    found = {}
    for name, value in wanted.items():
        assert ours[name].shape == value.shape and ours[name].dtype == torch.float64, name
        scale = scale_of(value, largest if name.startswith("grads/") else 0.0)
        found[name] = float((ours[name] - value).abs().max()) / scale
    return found


@pytest.mark.parametrize("name", CASES)
def test_encoder(name: str) -> None:
    case = exact(name)
    for mode in modes(case):
        found = errors(case, mode)
        assert {key: error for key, error in found.items() if error > TOLERANCE} == {}, mode


@pytest.mark.parametrize("name", CASES)
def test_lengths(name: str) -> None:
    case = exact(name)
    cfg = config_of(case)
    weights = {f"encoder.{key}": value for key, value in case.group("weights").items()}
    params, state = nemo.from_state_dict(weights, cfg, parts=("encoder",))
    _, lengths, _ = encode(params, state, case.tensors["in/audio_signal"], case.tensors["in/length"], cfg)
    assert torch.equal(lengths, case.tensors["out_train/length"])


@pytest.mark.parametrize("name", CASES)
def test_encoder_in_float32(name: str) -> None:
    """No further from our float64 than rounding of inputs and weights moves that."""
    case = exact(name)
    given = {key: value for key, value in case.tensors.items() if key.startswith(("in/", "weights/"))}
    for mode in modes(case):

        def ours(leaves: Leaves, train: bool = mode == "train") -> Leaves:
            return run(case, train, leaves)

        wanted, worst = sensitivity(ours, given)
        single = ours({key: x.float() if x.is_floating_point() else x for key, x in given.items()})
        assert single["outputs"].dtype == torch.float32
        frames = single["outputs"][:, 0].numel()
        assert {key: share for key, share in beyond(single, wanted, worst, frames).items() if share > 1} == {}, mode

"""The table of ``docs/parity.md``: ``python -m tests.parity.report``. Largest errors over all cases at hand.

It measures with the tests' own functions and asserts nothing; the tests say what passes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from nest_fn import forward
from nest_fn.decoder import log_probs
from nest_fn.frontend import log_mel
from nest_fn.interop.nemo import rename
from nest_fn.layers.tree import flatten
from nest_fn.masking import apply_mask
from nest_fn.quantizer import quantize_features
from tests.parity import test_decoder_loss as decoder_tests
from tests.parity import test_encoder as encoder_tests
from tests.parity import test_end_to_end as end_tests
from tests.parity import test_masking as masking_tests
from tests.parity import test_preprocessor as preprocessor_tests
from tests.parity import test_quantizer as quantizer_tests
from tests.reference_cases import all_names, load, names

Row = tuple[str, float]  # what was compared, its error


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.double()).abs().max())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return largest(a, b) / max(float(b.abs().max()), 1e-30)


def preprocessor(name: str) -> Iterator[Row]:
    case = load(name)
    got, _ = log_mel(case.tensors["in/audio"], case.tensors["in/length"], preprocessor_tests.config_of(case))
    wanted = case.tensors["out/features"]
    for row in range(len(got)):
        silent = row % 4 == preprocessor_tests.NEAR_SILENT
        scale = max(1.0, float(wanted.abs().max()))
        yield f"features{', near-silent rows' if silent else ''}", largest(got[row], wanted[row]) / scale


def quantizer(name: str) -> Iterator[Row]:
    case = load(name)
    state, cfg = quantizer_tests.setup(case)
    got, wanted = quantize_features(state, case.tensors["in/input_signal"], cfg), case.tensors["out/xid"]
    clear = case.tensors["out/margin"].reshape(wanted.shape) > 1e-5
    yield "tokens that differ where the margin allows", float((got != wanted)[clear].sum())


def masking_apply(name: str) -> Iterator[Row]:
    t = load(name).tensors
    masked = apply_mask(t["in/input_feats"], t["in/mask"], t["weights/mask_embedding"])
    yield "masked features", largest(masked, t["out/masked_feats"])


def masking_statistics(name: str) -> Iterator[Row]:
    case = load(name)
    for length in case.config["lengths"]:
        ours = masking_tests.masks(name, length).double().mean(0)[:length]
        theirs = case.tensors[f"out/T{length}/prob_frame_masked"].double()[:length]
        p = (ours + theirs) / 2
        deviation = (2 * p * (1 - p) / masking_tests.DRAWS).sqrt().clamp(min=1e-9)
        yield "frame by frame, standard errors", float(((ours - theirs).abs() / deviation)[p > 1e-6].max())


def encoder(name: str) -> Iterator[Row]:
    case = load(name)
    for mode in ("train", "eval"):
        if f"out_{mode}/outputs" not in case.tensors:
            continue
        y, _, grads, state, cfg, x_grad = encoder_tests.run(case, mode == "train")
        yield "outputs, relative", relative(y, case.tensors[f"out_{mode}/outputs"])
        theirs = case.group("grads" if mode == "train" else "grads_eval")
        if theirs:
            yield "gradient of the input, relative", relative(x_grad, theirs["@input"])
            floor = case.config["fp32_vs_fp64"].get(mode, case.config["fp32_vs_fp64"]["train"])["grad_params_worst_abs"]
            for key, grad in encoder_tests.dict_names(grads, cfg).items():
                bound = 3 * floor + 1e-5 * float(theirs[key].abs().max())
                yield "gradients of parameters, share of the bound", largest(grad, theirs[key]) / bound
        if mode == "train":
            ours = encoder_tests.dict_names(flatten({"encoder": state["encoder"]}), cfg)
            for key, value in case.group("after").items():
                yield "batch-norm statistics, relative", relative(ours[key], value)


def decoder_loss(name: str) -> Iterator[Row]:
    case = load(name)
    leaves, targets, mask, cfg = decoder_tests.parts(case)
    scores = log_probs(*decoder_tests.split(leaves), cfg)
    yield "log-probabilities", largest(scores, case.tensors["out/log_probs"])
    if name == decoder_tests.UNEQUAL or case.config["loss_is_nan"]:
        return
    for form in ("reference", "fast"):
        loss = decoder_tests.loss_of(form, leaves, targets, mask, cfg)
        yield "loss", largest(loss, case.tensors["out/loss"])
        (grad,) = torch.autograd.grad(loss, leaves["encoded"])
        yield "gradient, relative", relative(grad, case.tensors["grads/@encoder_output"].transpose(1, 2))


def end_to_end(name: str) -> Iterator[Row]:
    case, cfg, params, state, batch = end_tests.setup(name)
    mask = case.tensors["in/masks"][0]
    output, _ = forward(params, state, batch, cfg, train=True, mask=mask)
    yield "log-probabilities", largest(output.log_probs, case.tensors["out/log_probs"])
    yield "tokens that differ", float((output.tokens != case.tensors["out/tokens"]).sum())
    value, grads, new_state = end_tests.gradients(params, state, batch, cfg, mask)
    yield "loss, relative", relative(value, case.tensors["out/loss"])
    floor = 3 * case.config["fp32_vs_fp64"]["grads_worst_abs"]
    ours = rename({path: grad for path, grad in grads.items() if grad is not None}, cfg)
    for key, grad in case.group("grads").items():
        bound = 2e-5 * float(grad.abs().max()) + floor
        yield "gradients, share of the bound", largest(ours[key], grad) / bound
    statistics = rename(flatten(new_state), cfg)
    for key, leaf in case.group("after_forward1").items():
        yield "batch-norm statistics", largest(statistics[key], leaf)
    for dtype, stored in ((torch.float32, "losses"), (torch.float64, "losses_float64")):
        wanted = case.tensors[f"out/{stored}"].double().flatten()
        losses = end_tests.five_losses(name, dtype)[0]
        yield f"{stored} of five steps, relative", float(((losses - wanted).abs() / wanted).max())


MEASURES: dict[str, Callable[[str], Iterator[Row]]] = {
    "preprocessor": preprocessor,
    "quantizer": quantizer,
    "masking_apply": masking_apply,
    "masking_statistics": masking_statistics,
    "encoder": encoder,
    "decoder_loss": decoder_loss,
    "end_to_end": end_to_end,
}


def main() -> None:
    print("| kind | cases | compared | largest error |\n|---|---|---|---|")
    for kind, measure in MEASURES.items():
        cases = [
            name for name, of in all_names().items() if of == kind and "errors" not in name and name in names(name)
        ]
        errors: dict[str, float] = {}
        for name in cases:
            for what, error in measure(name):
                errors[what] = max(errors.get(what, 0.0), error)
        for index, (what, error) in enumerate(errors.items()):
            head = f"{kind} | {len(cases)}" if index == 0 else " | "
            print(f"| {head} | {what} | {error:.2g} |", flush=True)


if __name__ == "__main__":
    main()

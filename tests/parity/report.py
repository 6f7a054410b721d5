"""The table of ``docs/parity.md``: ``python -m tests.parity.report``. Largest errors over all cases at hand.

It measures with the tests' own functions and asserts nothing; the tests say what passes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from nest_fn.frontend import log_mel
from nest_fn.masking import apply_mask
from nest_fn.quantizer import quantize_features
from tests.parity import test_decoder_loss as decoder_tests
from tests.parity import test_encoder as encoder_tests
from tests.parity import test_end_to_end as end_tests
from tests.parity import test_masking as masking_tests
from tests.parity import test_preprocessor as preprocessor_tests
from tests.parity import test_quantizer as quantizer_tests
from tests.parity.rounding import EPS32, beyond, double, sensitivity
from tests.reference_cases import all_names, exact, exact_names, load, names

Row = tuple[str, float]  # what was compared, its error


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.double()).abs().max())


def preprocessor(name: str) -> Iterator[Row]:
    case = exact(name)
    audio, length, cfg = case.tensors["in/audio"], case.tensors["in/length"], preprocessor_tests.config_of(case)
    got, wanted = log_mel(audio, length, cfg)[0], case.tensors["out/features"]
    yield "features, relative to the largest above 1", largest(got, wanted) / max(1.0, float(wanted.abs().max()))
    single, bound = log_mel(audio.float(), length, cfg)[0], preprocessor_tests.bound(case, EPS32)
    yield "float32, share of the bound", float(((single.double() - got).abs() / bound.clamp(min=1e-300)).max())


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
    case = exact(name)
    for mode in encoder_tests.modes(case):
        for key, error in encoder_tests.errors(case, mode).items():
            yield (
                {"outputs": "outputs, relative", "after": "batch-norm statistics, relative"}.get(
                    key.partition("/")[0], "gradient of the input, relative" if "@" in key else "gradients, relative"
                ),
                error,
            )


def decoder_loss(name: str) -> Iterator[Row]:
    case = load(name)
    leaves, _, _, cfg = decoder_tests.parts(case)
    wanted, worst = sensitivity(lambda given: decoder_tests.scores(given, cfg), leaves)
    yield (
        "log-probabilities (float32), share of the bound",
        max(beyond({"log_probs": case.tensors["out/log_probs"]}, wanted, worst).values()),
    )
    if name == decoder_tests.UNEQUAL or case.config["loss_is_nan"]:
        return
    for form in ("reference", "fast"):
        ours = {key: double(leaf) for key, leaf in leaves.items()}
        wanted, worst = sensitivity(lambda given, form=form: decoder_tests.loss_and_gradients(form, case, given), ours)
        yield (
            "loss and gradients (float32), share of the bound",
            max(beyond(decoder_tests.stored(case), wanted, worst).values()),
        )


def end_to_end(name: str) -> Iterator[Row]:
    run = end_tests.setup(name)
    told = {"log_probs": "log-probabilities, relative", "loss": "loss, relative", "tokens": "tokens that differ"}
    told |= {"lengths": "lengths that differ", "after": "batch-norm statistics, relative"}
    for key, error in end_tests.first_step(run).items():
        yield told.get(key.partition("/")[0], "gradients, relative"), error
    found = end_tests.after_five_steps(run)
    yield "losses of five AdamW steps, relative", found["losses"] * end_tests.TOLERANCE
    yield (
        "parameters after them, share of the bound",
        max(x for key, x in found.items() if key not in ("losses", "learning_rates")),
    )


MEASURES: dict[str, Callable[[str], Iterator[Row]]] = {
    "preprocessor": preprocessor,
    "quantizer": quantizer,
    "masking_apply": masking_apply,
    "masking_statistics": masking_statistics,
    "encoder": encoder,
    "decoder_loss": decoder_loss,
    "end_to_end": end_to_end,
}


EXACT = ("preprocessor", "encoder", "end_to_end")  # compared in float64


def main() -> None:
    print("| kind | cases | compared | largest error |\n|---|---|---|---|")
    for kind, measure in MEASURES.items():
        cases = [
            name
            for name, of in all_names().items()
            if of == kind and "errors" not in name and name in (exact_names if kind in EXACT else names)(name)
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

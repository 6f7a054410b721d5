"""Analyses of the loss as a function of parameters: gradients, curvature, chance, paths between models."""

from __future__ import annotations

from typing import Any

import torch

from nest_fn.analysis import curvature, gradients, noise_scale, paths, randomness
from nest_fn.layers import random
from nest_fn.layers.tree import count, flatten
from nest_fn.layers.types import Tensor

from .result import Picture, Result, rows_of
from .subject import Subject

_STEPS, _STARTS = 12, 2  # of Lanczos
_CURVE_STEPS, _CURVE_RATE = 50, 1e-3  # of the curve between two models
_POINTS = tuple(index / 10 for index in range(11))


def analyse_gradients(subject: Subject) -> Result:
    """Norms of the gradients of single utterances, cosines between them, and the gradient noise scale."""
    params, state, cfg = subject.model
    found = [
        gradients.per_example_norms(params, state, one.batch, cfg, key=subject.key, chunk=subject.chunk())
        for one in subject.batches
    ]
    norm, tokens = (torch.cat([getattr(one, name) for one in found]).cpu() for name in ("norm", "tokens"))
    per_token = norm / tokens.clamp(min=1)
    by_module = gradients.by_module(
        {path: torch.stack([one.squared[path].sum() for one in found]).sum() for path in found[0].squared}
    )
    total = torch.stack(list(by_module.values())).sum()
    shares = {name: float(value / total) for name, value in by_module.items()}
    seconds = torch.cat([one.batch["audio_len"] for one in subject.batches]).cpu() / cfg.sample_rate
    arrays = {"norm": norm, "tokens": tokens, "seconds": seconds}
    names = [name for one in subject.batches for name in one.names]
    summary = {
        "utterances": len(names), "norm_per_token": _spread_of(per_token), "share_of_squared_norm": shares,
        "noise_scale": _noise_scale(subject),
        "largest": [(names[row], float(per_token[row])) for row in per_token.argsort(descending=True)[:5].tolist()],
    }  # fmt: skip
    pictures = [
        Picture("gradient_norms", "points", "Gradient norm of each utterance", "seconds", "norm per masked token",
                seconds.tolist(), {"utterances": per_token.tolist()}),
        Picture("gradient_shares", "bars", "Share of the squared gradient norm", "", "share", list(shares),
                {"share": list(shares.values())}),
    ]  # fmt: skip
    cosines = _cosines(subject)
    if cosines is not None:
        arrays["cosines"] = cosines
        pictures.append(Picture("gradient_cosines", "map", "Cosines between utterances' gradients", "utterance",
                                "utterance", list(range(len(cosines))), rows_of(cosines)))  # fmt: skip
    return Result(analyse_gradients.__doc__ or "", summary, arrays, tuple(pictures))


def _spread_of(values: Tensor) -> dict[str, float]:
    quantiles = torch.quantile(values.double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return {"mean": float(values.mean()), **dict(zip(("p10", "median", "p90"), quantiles, strict=True))}


def _noise_scale(subject: Subject) -> dict[str, float] | None:
    """The mean of both estimates over batches, and their ratio, in utterances; None without a batch of two."""
    params, state, cfg = subject.model
    held = 4 * count(params)
    found = []
    for one in subject.batches:
        chunk = subject.chunk(held, 4 * max(leaf.numel() for leaf in flatten(params).values()))
        try:
            made = noise_scale.noise_scale_of_examples(params, state, one.batch, cfg, key=subject.key, chunk=chunk)
            found.append((made, _curved(subject, one.batch)))
        except ValueError:  # a batch of one row, or without a mask
            continue
    if not found:
        return None
    number = len(found)
    variance, squared = (sum(getattr(one, name) for one, _ in found) / number for name in ("variance", "squared_norm"))
    noise, signal = (sum(getattr(one, name) for _, one in found) / number for name in ("noise", "signal"))
    return {
        "utterances": variance / squared if squared > 0 else float("nan"), "variance": variance,
        "squared_norm": squared, "utterances_in_curvature": noise / signal if min(noise, signal) > 0 else float("nan"),
        "noise_in_curvature": noise, "gradient_in_curvature": signal, "batches": number,
    }  # fmt: skip


def _curved(subject: Subject, batch: Any) -> noise_scale.CurvedNoiseScale:
    params, state, cfg = subject.model
    chunk = subject.chunk(6 * 4 * count(params))
    return noise_scale.curved_noise_scale_of_examples(params, state, batch, cfg, key=subject.key, chunk=chunk)


def _cosines(subject: Subject) -> Tensor | None:
    """Of the first batch that fits the memory whole, ``[B, B]``; None if none does."""
    params, state, cfg = subject.model
    largest = 4 * max(leaf.numel() for leaf in flatten(params).values())
    for one in subject.batches:
        if len(one.names) <= subject.chunk(more_per_row=largest):
            dots = gradients.gradient_dots(params, state, one.batch, cfg, key=subject.key)
            return gradients.cosines(torch.stack(list(dots.values())).sum(dim=0)).cpu()
    return None


def analyse_curvature(subject: Subject) -> Result:
    """Largest eigenvalues and spectral density of the Hessian, of Gauss-Newton, sharpness, Fisher by module."""
    params, state, cfg = subject.model
    batch, chunk = subject.batches[0].batch, subject.chunk(4 * _STEPS * count(params))
    lanczos_key, density_key, fisher_key = random.split(random.fold_in(subject.key, 1), 3)

    def hessian(v: Any) -> Any:
        return curvature.hessian_vector(params, state, batch, cfg, v, key=subject.key, chunk=chunk)

    def gauss_newton(v: Any) -> Any:
        return curvature.gauss_newton_vector(params, state, batch, cfg, v, key=subject.key, chunk=chunk)

    size, product = count(params), curvature.as_product(params, hessian)
    top = curvature.top_eigenvalues(product, size, key=lanczos_key, steps=_STEPS)
    of_gauss_newton = curvature.top_eigenvalues(
        curvature.as_product(params, gauss_newton), size, key=lanczos_key, steps=_STEPS
    )
    spectrum = curvature.spectral_density(product, size, key=density_key, steps=_STEPS, starts=_STARTS)
    fisher = curvature.fisher_diagonal(params, state, batch, cfg, key=fisher_key, chunk=chunk)
    traces = gradients.by_module({path: leaf.sum()[None] for path, leaf in flatten(fisher).items()})
    low, high = float(spectrum.nodes.min()), float(spectrum.nodes.max())
    width = max((high - low) / 100, 1e-12)
    grid = torch.linspace(low - 5 * width, high + 5 * width, 500, dtype=torch.float64)
    density = spectrum.density(grid, width)
    rise = curvature.ascent_sharpness(params, state, batch, cfg, key=subject.key, chunk=chunk)
    summary = {
        "hessian": {"largest": top.values, "within": top.bounds,
                    "trace_estimate": float((spectrum.nodes * spectrum.weights).sum()) / _STARTS * size},
        "gauss_newton": {"largest": of_gauss_newton.values, "within": of_gauss_newton.bounds},
        "rise_by_a_step_of_0.05_uphill": float(rise),
        "fisher_trace": {name: float(value) for name, value in traces.items()},
        "utterances": len(subject.batches[0].names),
    }  # fmt: skip
    picture = Picture("spectral_density", "lines", "Spectral density of the Hessian", "eigenvalue", "log10 density",
                      grid.tolist(), {"density": density.clamp(min=1e-12).log10().tolist()})  # fmt: skip
    arrays = {"nodes": spectrum.nodes, "weights": spectrum.weights, "grid": grid, "density": density,
              "hessian_largest": top.values.cpu(), "gauss_newton_largest": of_gauss_newton.values.cpu()}  # fmt: skip
    return Result(analyse_curvature.__doc__ or "", summary, arrays, (picture,))


def analyse_randomness(subject: Subject) -> Result:
    """What the training loss owes to mask, dropout, added noise and, with --against, to the parameters."""
    one, cfg = subject.batches[0], subject.model.cfg
    rows = min(len(one.names), max(1, subject.chunk() // 4))
    noises = [{name: leaf[:rows] for name, leaf in mixed.items()} for mixed in (one.batch, one.remixed)]
    models = [subject.model] if subject.against is None else [subject.model, subject.against]
    masks, dropouts = random.split(random.fold_in(subject.key, 2), 8).split(4)
    grid = randomness.loss_grid(
        randomness.stack([model.params for model in models]), randomness.stack([model.state for model in models]),
        {name: torch.stack([mixed[name] for mixed in noises]) for name in noises[0]}, cfg,
        masks=masks, dropouts=dropouts, chunk=1,
    ).cpu()  # fmt: skip
    found = randomness.variance_components(grid)
    total = sum(max(value, 0.0) for value in found.components.values()) + max(found.rest, 0.0)
    shares = {name: max(value, 0.0) / total if total > 0 else 0.0 for name, value in found.components.items()}
    shares["interactions"] = max(found.rest, 0.0) / total if total > 0 else 0.0
    summary = {"mean": found.mean, "variance": found.components, "interactions": found.rest, "share": shares,
               "utterances": rows, "axes": list(randomness.FACTORS), "levels": list(grid.shape)}  # fmt: skip
    picture = Picture("causes_of_variance", "bars", "What the loss owes to chance", "", "share of the variance",
                      list(shares), {"share": list(shares.values())})  # fmt: skip
    return Result(analyse_randomness.__doc__ or "", summary, {"loss": grid}, (picture,))


def analyse_path(subject: Subject) -> Result:
    """The loss on the line, and on a trained curve, to --against or to the run's oldest checkpoint.

    Batch statistics are computed anew at every point.
    """
    other = subject.against or subject.load(subject.earlier[0][1])
    (params, state, cfg), batches = subject.model, [one.batch for one in subject.batches]
    curve = paths.loss_along_line(
        (params, state), (other.params, other.state), batches[0], cfg, _POINTS, key=subject.key, statistics=batches,
        chunk=subject.chunk(),
    )  # fmt: skip
    made = paths.connect(
        (params, state), (other.params, other.state), batches, cfg, key=random.fold_in(subject.key, 4),
        steps=_CURVE_STEPS, lr=_CURVE_RATE,
    )  # fmt: skip
    round_it = paths.loss_along_curve(
        (params, state), made.middle, (other.params, other.state), batches[0], cfg, _POINTS, key=subject.key,
        statistics=batches, chunk=subject.chunk(),
    )  # fmt: skip
    line, bent = (one._replace(loss=one.loss.cpu()) for one in (curve, round_it))
    summary = {"at": line.at, "loss": line.loss, "barrier": line.barrier, "loss_on_curve": bent.loss,
               "barrier_on_curve": bent.barrier, "steps_of_curve": _CURVE_STEPS,
               "to": "against" if subject.against else f"step {subject.earlier[0][0]}"}  # fmt: skip
    picture = Picture("line", "lines", "Loss between two models", "from this model (0) to the other (1)", "nats",
                      list(line.at), {"line": line.loss.tolist(), "trained curve": bent.loss.tolist()})  # fmt: skip
    arrays = {"at": torch.tensor(line.at), "loss": line.loss, "loss_on_curve": bent.loss, "curve": made.loss.cpu()}
    return Result(analyse_path.__doc__ or "", summary, arrays, (picture,))

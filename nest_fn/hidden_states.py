"""Looking into a trained model: what its blocks make of audio."""

from __future__ import annotations

from collections.abc import Sequence

from nest_fn.files.quoting import shown
from nest_fn.layers.types import Params, State, Tensor

from .arguments import check_trees
from .config import Config
from .encoder import encode_frames, subsample_features
from .frontend import log_mel


def features(
    params: Params, state: State, audio: Tensor, lengths: Tensor, cfg: Config, layers: Sequence[int] | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Outputs of the blocks in ``layers``, each ``[B, T, D]``, and lengths in encoder frames ``[B]``.

    ``audio [B, N]``, ``lengths`` in samples. Layers count from 0, or from the end if negative; None means all. Always
    in evaluation mode: no dropout, running statistics, so that a row does not depend on its batch. Frames beyond a
    length hold values, not zeros.
    """
    check_trees("features", cfg, params, state, "params.encoder.subsampling", "state.encoder.layers")
    chosen = layer_numbers(cfg.encoder.n_layers, layers)
    mel, frames = log_mel(audio, lengths, cfg.preprocessor)
    x, short = subsample_features(params["encoder"], mel, frames, cfg.encoder)
    encoded = encode_frames(params["encoder"], state["encoder"], x, short, cfg.encoder, layers=sorted(set(chosen)))
    made = dict(zip(sorted(set(chosen)), encoded.outputs, strict=True))
    return tuple(made[layer] for layer in chosen), encoded.lengths


def layer_numbers(n_layers: int, layers: Sequence[int] | None) -> list[int]:
    """Layers as numbers from 0. Raises ``ValueError`` for one that is not there, ``TypeError`` for what is none."""
    if layers is None:
        return list(range(n_layers))
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"features: layers are numbers, as [0, -1], or None for all; got {shown(layer)}.")
        if not -n_layers <= layer < n_layers:
            raise ValueError(
                f"features: there is no layer {layer}; the encoder has {n_layers}, 0 to {n_layers - 1} or negative."
            )
    return [layer % n_layers for layer in layers]

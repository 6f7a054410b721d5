"""Hidden states of a trained encoder: the outputs of its blocks for audio (reference 8)."""

from __future__ import annotations

from collections.abc import Sequence

from nest_fn.files.quoting import shown
from nest_fn.layers.types import Params, State, Tensor

from .arguments import check_trees
from .config import Config
from .config.model import EncoderConfig
from .encoder import encode_frames, first_reduced_layer, subsample_features
from .frontend import log_mel


def features(
    params: Params, state: State, audio: Tensor, lengths: Tensor, cfg: Config, layers: Sequence[int] | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Outputs of the blocks ``layers``, each ``[B, T, D]``, and lengths ``[B]`` in encoder frames.

    ``audio`` is ``[B, N]``, ``lengths`` ``[B]`` in samples. Layers are numbered from 0, negative ones from the end;
    None means all. The encoder runs in evaluation mode (no dropout, running statistics), so that a row does not depend
    on its batch. Padded frames are not zeroed (Q23). Raises ``TypeError`` or ``ValueError`` for wrong arguments, such
    as layers before and after a reduction of the frames, whose lengths differ (``layers_by_rate``).
    """
    check_trees("features", cfg, params, state, "params.encoder.subsampling", "state.encoder.layers")
    chosen = layer_numbers(cfg.encoder.n_layers, layers)
    reduced = are_reduced(cfg.encoder, chosen)
    mel, frames = log_mel(audio, lengths, cfg.preprocessor)
    x, short = subsample_features(params["encoder"], mel, frames, cfg.encoder)
    encoded = encode_frames(params["encoder"], state["encoder"], x, short, cfg.encoder, layers=sorted(set(chosen)))
    made = dict(zip(sorted(set(chosen)), encoded.outputs, strict=True))
    return tuple(made[layer] for layer in chosen), encoded.lengths if reduced else short


def layers_by_rate(cfg: EncoderConfig) -> list[list[int]]:
    """All layers, in one list or, where the encoder reduces its frames on the way, in two, each of one length."""
    split = first_reduced_layer(cfg)
    return [part for part in (list(range(split)), list(range(split, cfg.n_layers))) if part]


def are_reduced(cfg: EncoderConfig, layers: Sequence[int]) -> bool:
    """Whether ``layers``, numbered from 0, have the frames after the reduction. Raises ``ValueError`` if some do."""
    split = first_reduced_layer(cfg)
    reduced = {layer >= split for layer in layers}
    if len(reduced) > 1:
        raise ValueError(
            f"features: layers from {split} on have 1 frame where those before have {cfg.reduction_factor} "
            f"(encoder.reduction), and do not fit together; choose some of 0 to {split - 1}, or some from {split} on."
        )
    return True in reduced


def layer_numbers(n_layers: int, layers: Sequence[int] | None) -> list[int]:
    """Layers numbered from 0. Raises ``ValueError`` for a layer that does not exist, ``TypeError`` if not an int."""
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

"""Conversion between the reference's tensor names and ours (reference 9.1).

Ours are the dotted paths of the trees ``params`` and ``state``; the reference's are the keys of a ``state_dict``.
Values do not change, only names and the trailing axes of 1x1 convolutions, which are linear layers here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nest_fn.arguments import check_config, check_trees
from nest_fn.config import Config
from nest_fn.layers.tree import fill, flatten
from nest_fn.layers.types import Params, State, Tensor
from nest_fn.mel import make_tables
from nest_fn.model import abstract

PARTS = ("encoder", "decoder", "quantizer", "masking")

_LAYER = {
    "norm_attention": "norm_self_att",
    "attention.query": "self_attn.linear_q",
    "attention.key": "self_attn.linear_k",
    "attention.value": "self_attn.linear_v",
    "attention.output": "self_attn.linear_out",
    "attention.position": "self_attn.linear_pos",
    "attention.content_bias": "self_attn.pos_bias_u",
    "attention.position_bias": "self_attn.pos_bias_v",
    "attention.global_query": "self_attn.global_q",
    "attention.global_key": "self_attn.global_k",
    "attention.global_value": "self_attn.global_v",
    "conv.pointwise1": "conv.pointwise_conv1",
    "conv.depthwise": "conv.depthwise_conv",
    "conv.norm": "conv.batch_norm",
    "conv.pointwise2": "conv.pointwise_conv2",
}
_TIED = {"content_bias": "pos_bias_u", "position_bias": "pos_bias_v"}

# Names of the reference to ignore: constants that follow from the config, and copies of other tensors.
_INERT = re.compile(
    r"preprocessor\.featurizer\.(window|fb)|encoder\.pos_enc\.pe|decoder_ssl\..*|loss\..*|spec_augmentation\..*"
    r"|pre_encoder\..*|encoder\.pre_encode\.masking\..*"
)


def from_state_dict(mapping: Mapping[str, Any], cfg: Config, parts: Sequence[str] = PARTS) -> tuple[Params, State]:
    """Convert the reference's ``state_dict`` (tensors or arrays) to params and state.

    ``parts`` selects parts of the model, e.g. ``("encoder",)``. Values are copied; codebooks stay float64. Constants
    and duplicates that the reference stores (including ``decoder_ssl.*``) are ignored. Raises ``TypeError`` if
    ``mapping`` is not a mapping, ``ValueError`` listing all names that are missing, unknown or of another shape.
    """
    check_config("from_state_dict", cfg)
    if not isinstance(mapping, Mapping):
        raise TypeError(f"from_state_dict: want tensors by name, got a {type(mapping).__name__}.")
    trees = _abstract(cfg, parts)
    wanted = flatten(trees[0]) | flatten(trees[1])
    problems, leaves, used = [], {}, set()
    for path, leaf in wanted.items():
        names = _reference_names(path, cfg)
        name = next((name for name in names if name in mapping), None)
        used.update(names)
        if name is None:
            if path.endswith("num_batches_tracked"):
                leaves[path] = torch.zeros((), dtype=torch.int64)
            else:
                problems.append(f"'{names[0]}' {list(_reference_shape(path, leaf))} is missing")
            continue
        value = torch.as_tensor(mapping[name]).detach().clone()
        if value.numel() != leaf.numel() or tuple(value.shape) != _reference_shape(path, leaf):
            problems.append(f"'{name}' is {list(value.shape)}, the config wants {list(_reference_shape(path, leaf))}")
            continue
        leaves[path] = value.reshape(leaf.shape)
    unknown = [name for name in mapping if name not in used and not _INERT.fullmatch(name) and _belongs_to(name, parts)]
    problems += [f"'{name}' has no place in this config" for name in unknown]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ValueError(f"state_dict: {len(problems)} names do not fit the config: {shown}")
    params, state = (fill(tree, leaves) for tree in trees)
    return params, state


def to_state_dict(params: Params, state: State, cfg: Config) -> dict[str, Tensor]:
    """Convert params and state to the reference's ``state_dict``, with its constants and duplicates.

    Tensors are not copied. Raises ``TypeError`` or ``ValueError`` for wrong arguments.
    """
    check_trees("to_state_dict", cfg, params, state, "params.encoder", "state.encoder")
    tables = make_tables(cfg.preprocessor)
    made: dict[str, Tensor] = {
        "preprocessor.featurizer.window": tables.window,
        "preprocessor.featurizer.fb": tables.filters[None],
    }
    return made | rename(flatten(params) | flatten(state), cfg, copies=True)


def rename(leaves: Mapping[str, Tensor], cfg: Config, copies: bool = False) -> dict[str, Tensor]:
    """Rename leaves (values, gradients, statistics) from our paths to the reference's names and shapes.

    ``copies`` adds the other names under which the reference stores shared tensors.
    """
    renamed = {}
    for path, leaf in leaves.items():
        names = _reference_names(path, cfg)
        renamed.update({name: leaf.reshape(_reference_shape(path, leaf)) for name in (names if copies else names[:1])})
    return renamed


def _abstract(cfg: Config, parts: Sequence[str]) -> tuple[Params, State]:
    """The trees of ``abstract(cfg)``, restricted to ``parts``."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"state_dict: no part is called '{unknown[0]}'; the parts are {', '.join(PARTS)}.")
    params, state = ({part: tree[part] for part in tree if part in parts} for tree in abstract(cfg))
    return params, state


def _belongs_to(name: str, parts: Sequence[str]) -> bool:
    theirs = {"encoder": "encoder.", "decoder": "decoder.", "quantizer": "quantizer.", "masking": "mask_processor."}
    return len(parts) == len(PARTS) or any(name.startswith(theirs[part]) for part in parts)


def _reference_names(path: str, cfg: Config) -> list[str]:
    """The reference's names of one of our leaves, the main one first."""
    part, rest = path.split(".", 1)
    if part == "quantizer":
        return ["quantizer." + rest.replace("projection.", "proj.")]
    if part == "decoder":
        return [f"decoder.decoder_layers.0.{rest}"]
    if part == "masking":
        names = ["mask_processor.mask_embedding"]
        if cfg.mask_position == "post_conv":
            names += ["pre_encoder.masking.mask_embedding", "encoder.pre_encode.masking.mask_embedding"]
        return names
    kind, *_ = rest.split(".")
    if kind == "subsampling":
        inner = _subsampling_name(rest.removeprefix("subsampling."), cfg.encoder.subsampling, cfg.encoder.feat_in)
        if cfg.mask_position != "post_conv":
            return [f"encoder.pre_encode.{inner}"]
        return [f"encoder.pre_encode.pre_encode.{inner}", f"pre_encoder.pre_encode.{inner}"]
    if kind == "reduction":
        inner = _subsampling_name(rest.removeprefix("reduction."), "striding", cfg.encoder.d_model)
        return [f"encoder.reduction_subsampling.reduction_enc.{inner}"]
    if kind == "biases":
        theirs = _TIED[rest.removeprefix("biases.")]
        return [f"encoder.layers.{layer}.self_attn.{theirs}" for layer in range(cfg.encoder.n_layers)]
    if kind == "out":
        return [f"encoder.out_proj.{rest.removeprefix('out.')}"]
    return [f"encoder.{_layer_name(rest)}"]


def _layer_name(path: str) -> str:
    _, index, inner = path.split(".", 2)
    for ours, theirs in _LAYER.items():
        if inner == ours or inner.startswith(ours + "."):
            inner = theirs + inner[len(ours) :]
            break
    return f"layers.{index}.{inner}"


def _subsampling_name(path: str, kind: str | None, features: int | None) -> str:
    """``stages.1.pointwise.weight -> conv.3.weight``: the reference numbers its layers, including activations."""
    if path.startswith("out."):
        stacking = kind is not None and kind.startswith("stacking")
        leaf = path.removeprefix("out.")
        return leaf if not kind else f"{'proj_out' if stacking else 'out'}.{leaf}"
    if path.startswith("norm."):
        return f"pre_norm.{path.removeprefix('norm.')}"
    _, stage, layer, leaf = path.split(".")
    number = int(stage)
    if kind == "vggnet":
        index = 5 * number + (0 if layer == "conv1" else 2)
    elif kind == "striding":
        index = 2 * number
    else:
        index = {"conv": 0, "depthwise": 3 * number - 1, "pointwise": 3 * number}[layer]
    return f"conv.{index}.{leaf}"


def _reference_shape(path: str, leaf: Tensor) -> tuple[int, ...]:
    """The reference's shape of a leaf: 1x1 convolutions have one or two more axes."""
    if path.endswith("weight") and ("conv.pointwise" in path or path == "decoder.weight"):
        return (*leaf.shape, 1)
    if path.endswith("pointwise.weight"):
        return (*leaf.shape, 1, 1)
    return tuple(leaf.shape)

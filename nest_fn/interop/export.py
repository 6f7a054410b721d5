"""Export of the encoder to a file that runs without this library: ``torch.export`` programs (.pt2), ONNX (.onnx).

    program = export_encoder(params, state, cfg, "encoder.pt2")
    encoded, lengths = program.module()(features, feature_len)

The graph is the encoder in evaluation mode, from log-mel features or from audio. Its weights are constants of the
graph, named by their dotted paths (``params.layers.0.norm_out.weight``). Batch size and length are dynamic: masks and
positions are computed inside the graph for the given length.
"""

from __future__ import annotations

import dataclasses
import io
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from nest_fn.config import Config
from nest_fn.config.model import PreprocessorConfig
from nest_fn.encoder import LOCAL, encode
from nest_fn.errors import ExportError
from nest_fn.extras import load_extra
from nest_fn.files.atomic import atomic_write
from nest_fn.frontend import log_mel
from nest_fn.layers.tree import fill
from nest_fn.layers.types import Params, State, Tensor
from nest_fn.mel import Tables, make_tables

Source = Literal["features", "audio"]
SUFFIXES = (".pt2", ".onnx")
_ATOL = 1e-5  # tolerance between graph and eager, whose kernels may sum in another order


class Widths(NamedTuple):
    """Widths ``F`` of features that a dynamic graph accepts: multiples of ``multiple``, at least ``least`` (frames)."""

    least: int
    multiple: int


def widths(cfg: Config) -> Widths:
    """Constraint on the width ``F`` of a dynamic graph. Most encoders accept any width of at least two encoder frames.

    If a layer pads its input (stacking, VGG's pooling, blocks of local attention), whether it pads is fixed in the
    graph, so that only widths are accepted that need no padding.
    """
    encoder = cfg.encoder
    factor = encoder.subsampling_factor if encoder.subsampling else 1
    factor *= encoder.reduction_factor if encoder.reduction else 1
    local = encoder.self_attention_model == LOCAL
    if local:
        window = max(encoder.att_context_size[0])
        reach = 1 + encoder.global_tokens * encoder.global_tokens_spacing // window
        return Widths(factor * window * (reach + 1), factor * window)
    if encoder.subsampling in ("stacking", "stacking_norm", "vggnet"):
        return Widths(2 * factor, factor)
    return Widths(factor + 1, 1)


def export_encoder(
    params: Params, state: State, cfg: Config, path: str | Path | None = None, dynamic: bool = True, *,
    source: Source = "features",
) -> ExportedProgram:  # fmt: skip
    """Export the encoder in evaluation mode as an ``ExportedProgram``; save it to ``path`` (.pt2) if one is given.

    ``source="features"``: ``features [B, M, F], lengths [B] (frames)``; ``source="audio"``: ``audio [B, N], lengths [B]
    (samples)``; both -> ``encoded [B, D, T], lengths [B]`` in encoder frames. With ``dynamic``, ``B`` and the length
    are dynamic, ``F`` within ``widths(cfg)``; otherwise they are fixed at 1 and at 10 seconds or slightly more. From
    audio, frames are padded to a multiple of both ``pad_to`` and ``widths(cfg).multiple``.

    The program is on the parameters' device. Before it is returned, its output is compared with that of the eager
    encoder, with ``dynamic`` at shapes other than the traced one. Raises ``ExportError`` if they differ, or if the
    encoder cannot be traced with these settings.
    """
    if path is not None:
        check_target(path, ".pt2")
    encoder = _Encoder(params, state, cfg, source).eval()
    inputs = encoder.example(2 if dynamic else 1, 1)
    try:
        with _without_exporter_warnings():
            program = torch.export.export(
                encoder, inputs, dynamic_shapes=_dynamic_shapes(cfg, source) if dynamic else None,
                prefer_deferred_runtime_asserts_over_guards=dynamic,
            )  # fmt: skip
    except Exception as error:  # the exporter's errors have no common base class
        raise ExportError(
            f"export: this encoder cannot be traced from {source}{' with a free length' if dynamic else ''}: "
            f"{_first_line(error)} Try dynamic=False{', or the features' if source == 'audio' else ''}."
        ) from error
    _compare(program, encoder, [(1, 2), (3, 3)] if dynamic else [(1, 1)])
    if path is not None:
        content = io.BytesIO()  # PyTorch's own file writer aborts the process if the disk is full
        with _without_exporter_warnings():
            torch.export.save(program, content)
        with atomic_write(path, len(content.getbuffer())) as temporary:
            temporary.write_bytes(content.getbuffer())
    return program


def export_onnx(
    path: str | Path, params: Params, state: State, cfg: Config, dynamic: bool = True, *, source: Source = "features"
) -> None:
    """Export the graph of ``export_encoder`` as ONNX to ``path``.

    Inputs are ``features`` (or ``audio``) and ``lengths``, outputs ``encoded`` and ``encoded_lengths``. Needs the extra
    ``export``. Raises ``ExportError``.
    """
    check_target(path, ".onnx")
    program = export_encoder(params, state, cfg, dynamic=dynamic, source=source)
    try:
        with _without_exporter_warnings():
            made = torch.onnx.export(
                program, dynamo=True, verbose=False,
                input_names=[source, "lengths"], output_names=["encoded", "encoded_lengths"],
            )  # fmt: skip
            assert made is not None
            with atomic_write(path, 0) as temporary:
                made.save(temporary)
    except (RuntimeError, TypeError, ValueError, ImportError, AttributeError) as error:
        raise ExportError(f"{path}: cannot be written as ONNX: {_first_line(error)} Try .pt2.") from error


def check_target(path: str | Path, suffix: str | None = None) -> str:
    """Check the suffix of a file to write and return it.

    Raises ``ExportError`` for an unknown suffix and for a package that is not installed.
    """
    found = Path(path).suffix
    wanted = SUFFIXES if suffix is None else (suffix,)
    if found not in wanted:
        raise ExportError(f"{path}: cannot be exported as '{found}'; choose {' or '.join(wanted)}.")
    try:
        for package in ("onnx", "onnxscript") if found == ".onnx" else ():
            load_extra(package)
    except ImportError as error:
        raise ExportError(f"{path}: {error}, or write .pt2.") from error
    return found


class _Encoder(nn.Module):
    """The pure function ``encode`` as the module that the exporter requires; it only holds the trees."""

    def __init__(self, params: Params, state: State, cfg: Config, source: Source) -> None:
        super().__init__()
        if source not in ("features", "audio"):
            raise ExportError(f"export: source '{source}' is unknown; choose features or audio.")
        self.params, self.state = _buffer_module(params["encoder"]), _buffer_module(state["encoder"])
        self.trees, self.cfg, self.source = (params["encoder"], state["encoder"]), cfg, source
        self.tables: Any = None
        if source == "audio":
            made = make_tables(cfg.preprocessor, next(self.buffers()).device)
            self.tables = _buffer_module({name: leaf for name, leaf in made._asdict().items() if leaf is not None})

    def forward(self, signal: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        params = fill(self.trees[0], dict(self.params.named_buffers()))
        state = fill(self.trees[1], dict(self.state.named_buffers()))
        if self.source == "audio":
            tables = Tables(**dict(self.tables.named_buffers()))
            signal, lengths = _padded_log_mel(signal, lengths, self.cfg, tables)
        encoded, lengths, _ = encode(params, state, signal, lengths, self.cfg.encoder)
        return encoded, lengths

    def example(self, batch: int, scale: int) -> tuple[Tensor, Tensor]:
        """Example inputs of an accepted shape, longer for a larger ``scale``, whose rows differ in length."""
        device = next(self.buffers()).device
        least, multiple = widths(self.cfg)
        cfg = self.cfg.preprocessor
        frames = -(-max(1000, 2 * least) * scale // multiple) * multiple
        shape: tuple[int, ...] = (batch, self.cfg.encoder.feat_in or 0, frames)
        if self.source == "audio":
            shape = (batch, frames * cfg.hop_length)
        # Any values will do; a sine needs no random generator.
        signal = torch.arange(math.prod(shape), device=device, dtype=torch.float32).mul(0.37).sin().reshape(shape)
        lengths = shape[-1] - torch.arange(batch, device=device) * (shape[-1] // (2 * batch))
        return signal, lengths


def _buffer_module(tree: Any) -> nn.Module:
    """Convert a tree to nested modules whose buffers have the same dotted paths."""
    module = nn.Module()
    children = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for name, child in children:
        if isinstance(child, Tensor):
            module.register_buffer(str(name), child.detach())
        else:
            module.add_module(str(name), _buffer_module(child))
    return module


def _padded_log_mel(audio: Tensor, lengths: Tensor, cfg: Config, tables: Tables) -> tuple[Tensor, Tensor]:
    """``log_mel``, padded with ``index_select``, so that the graph does not depend on whether there is padding."""
    settings: PreprocessorConfig = dataclasses.replace(cfg.preprocessor, pad_to=0)
    features, lengths = log_mel(audio, lengths, settings, tables=tables)
    multiple = math.lcm(max(cfg.preprocessor.pad_to, 1), widths(cfg).multiple)
    frames = features.shape[2]
    frame = torch.arange((frames + multiple - 1) // multiple * multiple, device=audio.device)
    padded = features.index_select(2, frame.clamp(max=frames - 1))
    return torch.where(frame < frames, padded, settings.pad_value), lengths


def _dynamic_shapes(cfg: Config, source: Source) -> tuple[dict[int, Any], dict[int, Any]]:
    """Dynamic axes of the two inputs, with their bounds."""
    batch = Dim("batch", min=1)
    if source == "audio":  # the exporter infers the minimum width
        return {0: batch, 1: Dim.AUTO}, {0: batch}
    least, multiple = widths(cfg)
    if multiple == 1:
        return {0: batch, 2: Dim("frames", min=least)}, {0: batch}
    return {0: batch, 2: multiple * Dim("blocks", min=least // multiple)}, {0: batch}


def _compare(program: ExportedProgram, encoder: _Encoder, shapes: list[tuple[int, int]]) -> None:
    """Run program and encoder at several shapes. Raises ``ExportError`` if their results differ."""
    module = program.module()
    for batch, scale in shapes:
        inputs = encoder.example(batch, scale)
        with torch.no_grad():
            encoded, lengths = encoder(*inputs)
            try:
                made, made_lengths = module(*inputs)
            except (RuntimeError, AssertionError) as error:  # a guard on the shape
                raise ExportError(
                    f"export: the graph refuses inputs {list(inputs[0].shape)}, so its length is not free: "
                    f"{_first_line(error)} Use dynamic=False."
                ) from error
        worst = (made - encoded).abs().max()
        if not torch.equal(lengths, made_lengths) or not torch.allclose(made, encoded, atol=_ATOL, rtol=_ATOL):
            raise ExportError(
                f"export: the graph is {float(worst):.1e} off eager at inputs {list(inputs[0].shape)}, at most "
                f"{_ATOL} was wanted; please report these settings."
            )


@contextmanager
def _without_exporter_warnings() -> Iterator[None]:
    """Suppress deprecation warnings inside the exporter, which do not concern the model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
        yield


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
    return line if line.endswith(".") else f"{line}."

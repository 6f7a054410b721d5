"""``nest-fn extract`` and ``nest-fn tokenize``: write a trained model's features or tokens, one file per utterance.

The model runs in evaluation mode, so that an utterance's features do not depend on its batch. Files are written
atomically; a second run of the same command writes only the missing ones, and a run with another model, manifest or
setting is refused (``nest_fn.files.outputs``). ``index.jsonl`` maps utterances to files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from nest_fn.decoder import logits
from nest_fn.extras import load_extra
from nest_fn.files.atomic import anything, atomic_write
from nest_fn.files.outputs import abandon, begin, claim, finish
from nest_fn.frontend import log_mel
from nest_fn.hidden_states import are_reduced, features, layer_numbers
from nest_fn.interop.convert import model_digest
from nest_fn.layers.tree import device_of
from nest_fn.layers.types import Tensor
from nest_fn.model import quantize
from nest_fn.recording.windows import Piece, encoder_frames, recording_features
from nest_fn.train.data.dataset import Dataset
from nest_fn.train.errors import MemoryExhausted, UsageError, is_out_of_memory
from nest_fn.version import versions

from .inference import ALONE, Job, Model, Utterances, not_finite, utterances
from .recordings import Recording, StopAsked, joined, recordings, until_stopped, window_settings
from .settings import lasting_settings, model_alone

Arrays = dict[str, NDArray[Any]]
FORMATS = ("npy", "npz", "safetensors")
INDEX = "index.jsonl"
_NO_TOKEN = -1  # where scores are not finite
_BLOCK = 1 << 22  # numbers that are looked at together


class Make(NamedTuple):
    """What is made of a batch, row by row, and of the pieces of a recording of so many frames, joined in a folder."""

    of_batch: Callable[[Tensor, Tensor], Iterator[Arrays]]
    of_recording: Callable[[Iterator[Piece], int, Path], Arrays]
    layers: Sequence[int]


def extract(
    model: Model, dataset: Dataset, out: Path, *, layers: Sequence[int] | None = None,
    weights: Sequence[float] | None = None, level: str = "frame", form: str = "npy", overwrite: bool = False,
    job: Job = ALONE,
) -> Iterator[str]:  # fmt: skip
    """Write features ``[layers, T, D]``, or for ``level="utterance"`` their means ``[layers, D]``; yields file names.

    With ``weights``, one per layer, the weighted sum over the layers is written instead: ``[T, D]`` or ``[D]``. Frames
    are 80 ms at subsampling factor 8. Raises ``UsageError``, ``DataError``, ``OutputError``.
    """
    try:
        chosen = layer_numbers(model.cfg.encoder.n_layers, layers)
        are_reduced(model.cfg.encoder, chosen)
    except ValueError as error:
        raise UsageError(f"extract: {error}") from error
    if weights is not None and len(weights) != len(chosen):
        raise UsageError(f"extract: {len(weights)} weights for {len(chosen)} layers; give one a layer")

    mixture = None if weights is None else torch.tensor(weights)

    def of_batch(audio: Tensor, lengths: Tensor) -> Iterator[Arrays]:
        audio, lengths = audio.to(device_of(model.params)), lengths.to(device_of(model.params))
        made, frames = features(model.params, model.state, audio, lengths, model.cfg, chosen)
        for row, count in enumerate(frames.tolist()):
            each = torch.stack([layer[row, :count].float().cpu() for layer in made])
            yield {"features": _mixed(each.mean(dim=1) if level == "utterance" else each, mixture).numpy()}

    def of_recording(pieces: Iterator[Piece], frames: int, folder: Path) -> Arrays:
        stacks = (torch.stack([layer.float().cpu() for layer in piece.frames]) for piece in pieces)
        if level == "utterance":
            total = sum((stack.double().sum(dim=1) for stack in stacks), torch.zeros(()))
            return {"features": _mixed((total / frames).float(), mixture).numpy()}
        parts = ([_mixed(stack, mixture).numpy()] for stack in stacks)
        return {"features": joined(parts, 1 if mixture is None else 0, frames, folder)[0]}

    facts = {"command": "extract", "layers": chosen, "weights": weights, "level": level}
    return _write_all(model, dataset, out, form, Make(of_batch, of_recording, chosen), facts, overwrite, job)


def tokenize(
    model: Model, dataset: Dataset, out: Path, *, form: str = "npz", overwrite: bool = False, job: Job = ALONE
) -> Iterator[str]:
    """Write ``quantizer`` int64 ``[T, K]``, the targets of training, and ``decoder``, the model's predictions of them.

    Raises ``DataError``, ``OutputError``.
    """

    cfg = model.cfg

    def of_frames(mel: Tensor, last: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
        tokens = quantize(model.state, mel, cfg)
        tokens = tokens if tokens.ndim == 3 else tokens[..., None]
        scores = logits(model.params["decoder"], last, cfg.decoder)
        guesses = scores.argmax(dim=-2).masked_fill(~torch.isfinite(scores).all(dim=-2), _NO_TOKEN)
        return tokens.cpu().numpy(), guesses.cpu().numpy()

    def of_batch(audio: Tensor, lengths: Tensor) -> Iterator[Arrays]:
        audio, lengths = audio.to(device_of(model.params)), lengths.to(device_of(model.params))
        mel, _ = log_mel(audio, lengths, cfg.preprocessor)
        (last,), frames = features(model.params, model.state, audio, lengths, cfg, [-1])
        tokens, guesses = of_frames(mel, last)
        for row, count in enumerate(frames.tolist()):
            yield {"quantizer": tokens[row, :count], "decoder": guesses[row, :count]}

    def of_recording(pieces: Iterator[Piece], frames: int, folder: Path) -> Arrays:
        def parts() -> Iterator[list[NDArray[Any]]]:
            for piece in pieces:
                count = piece.frames[0].shape[0]
                missing = count * cfg.frames_per_token - piece.mel.shape[2]
                mel = F.pad(piece.mel, (0, missing), value=cfg.preprocessor.pad_value)
                yield [array[0, :count] for array in of_frames(mel, piece.frames[0][None])]

        return dict(zip(("quantizer", "decoder"), joined(parts(), 0, frames, folder), strict=True))

    if model.cfg.mask_position == "post_conv":
        raise UsageError("tokenize: under post_conv tokens are made of the subsampled signal; extract features instead")
    made = Make(of_batch, of_recording, [cfg.encoder.n_layers - 1])
    return _write_all(model, dataset, out, form, made, {"command": "tokenize"}, overwrite, job)


@torch.no_grad()
def _write_all(
    model: Model, dataset: Dataset, out: Path, form: str, make: Make, facts: Mapping[str, Any], overwrite: bool,
    job: Job,
) -> Iterator[str]:  # fmt: skip
    """Write this rank's missing files, batch by batch; then rank 0 writes the index, unless a stop was asked for."""
    if form not in FORMATS:
        raise UsageError(f"extract: no format is called '{form}'; use one of {', '.join(FORMATS)}")
    made_of = {
        "model": model_digest(model.params, model.state, model_alone(model.cfg)),
        "data": dataset.manifest.digest,
    }
    origin = {**facts, "format": form, **made_of, **lasting_settings(model.cfg), **versions()}
    origin |= window_settings(model.cfg, dataset)
    place = claim(out, origin, folder=True, inputs=dataset.manifest.files, overwrite=overwrite)
    job.ranks.any(False)  # every rank has judged the folder as it was
    names, existed = _names(dataset, form), out.exists()
    if job.ranks.is_main:
        begin(place, [*names, INDEX])
    job.ranks.any(False)
    try:
        for index, arrays in _made(model, dataset, out, names, make, job):
            if not _all_finite(arrays):
                raise not_finite(dataset, index)
            _write(out / names[index], arrays, form)
            yield names[index]
    except Exception:
        if job.ranks.is_single:
            abandon(place, made=not existed)
        raise
    if not job.ranks.any(job.stopped()) and job.ranks.is_main:
        _write_index(dataset, out, names)
        finish(place, [*names, INDEX])
    job.ranks.any(False)


def _made(
    model: Model, dataset: Dataset, out: Path, names: Sequence[str], make: Make, job: Job
) -> Iterator[tuple[int, Arrays]]:
    """The arrays of this rank's utterances whose files are missing: those in batches, then those too long for one."""
    for batch in utterances(dataset, job):
        missing = [row for row, index in enumerate(batch.number.tolist()) if not (out / names[index]).exists()]
        if missing:
            made = _explain_oom(make.of_batch, batch, missing, dataset.sample_rate)
            yield from zip(batch.number[missing].tolist(), made, strict=True)
    for recording in recordings(dataset, device_of(model.params), job):
        if not (out / names[recording.number]).exists():
            with suppress(StopAsked):
                yield recording.number, _of_recording(model, dataset, out, recording, make, job)


def _of_recording(
    model: Model, dataset: Dataset, out: Path, recording: Recording, make: Make, job: Job
) -> Arrays:  # fmt: skip
    seconds = dataset.config.batch_seconds
    try:
        pieces = recording_features(
            model.params, model.state, recording.read, recording.samples, model.cfg, make.layers, seconds
        )
        frames = encoder_frames(recording.samples, model.cfg, are_reduced(model.cfg.encoder, make.layers))
        return make.of_recording(
            until_stopped(pieces, frames, recording.samples / dataset.sample_rate, job), frames, out
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhausted(
            f"out of memory in windows of {seconds:g} s or what the attention context needs; lower --batch-seconds. "
            "What was written stays, and the same command goes on from there."
        ) from None


def _write_index(dataset: Dataset, out: Path, names: Sequence[str]) -> None:
    """The manifest's lines with the file of each; paths of audio are absolute, so that they hold in this folder too."""
    lines = []
    for index, name in enumerate(names):
        fields, audio = dict(dataset.manifest.fields(index)), dataset.manifest.lasting_name(index)
        if audio is not None:
            fields.pop("audio_filename", None)
            fields["audio_filepath"] = audio
        lines.append({**fields, "feature_filepath": name})
    with atomic_write(out / INDEX, 0, replaces=anything) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _mixed(each: Tensor, mixture: Tensor | None) -> Tensor:
    """The sum over layers, the first axis, with weights ``[L]``; without them, all layers."""
    return each if mixture is None else torch.einsum("l,l...->...", mixture.to(each.dtype), each)


def _all_finite(arrays: Arrays) -> bool:
    """Whether no number is NaN or infinite, or a token that stands for such."""
    blocks = (array.reshape(-1)[at : at + _BLOCK] for array in arrays.values() for at in range(0, array.size, _BLOCK))
    return all(np.isfinite(block).all() if block.dtype.kind == "f" else (block > _NO_TOKEN).all() for block in blocks)


def _explain_oom(
    make: Callable[[Tensor, Tensor], Iterator[Arrays]], batch: Utterances, rows: list[int], sample_rate: int
) -> Iterator[Arrays]:
    """What ``make`` makes of some rows; out of memory becomes ``MemoryExhausted`` that names the batch."""
    shape = batch.audio.shape
    try:
        yield from make(batch.audio[rows], batch.lengths[rows])
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhausted(
            f"out of memory in a batch of {shape[0]} x {shape[1] / sample_rate:.2f} s; lower --batch-seconds or "
            "--max-batch-size. What was written stays, and the same command goes on from there."
        ) from None


def _names(dataset: Dataset, form: str) -> list[str]:
    """A file name for each utterance: its index in the manifest, and the end of its audio file's name."""
    digits = len(str(max(len(dataset.manifest) - 1, 0)))
    names = []
    for index in range(len(dataset.manifest)):
        stem = Path(dataset.manifest.relative_path(index)).stem
        safe = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in stem)[-80:]
        names.append(f"{index:0{digits}d}_{safe}.{form}")
    return names


def _write(path: Path, arrays: Mapping[str, NDArray[Any]], form: str) -> None:
    size = sum(array.nbytes for array in arrays.values())
    with atomic_write(path, size) as temporary, open(temporary, "wb") as file:
        if form == "npz":
            np.savez(file, **arrays)  # type: ignore[arg-type]
        elif form == "npy":
            np.save(file, np.stack(list(arrays.values())) if len(arrays) > 1 else next(iter(arrays.values())))
        else:
            file.write(_safetensors(arrays))


def _safetensors(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    try:
        load_extra("safetensors")
        from safetensors.numpy import save
    except ImportError as error:
        raise UsageError(f"extract: {error}") from error
    return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))

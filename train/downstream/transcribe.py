"""``nest-fn transcribe``: the texts of audio files by a fine-tuned recogniser, with the times of their tokens.

Each line of the result is the manifest's own, with ``text`` the recognised one, the given one as ``reference``, and
``tokens`` with start and end in seconds: a manifest that every command reads. Lines found so far are kept beside the
output until it is finished, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch

from nest_fn.files.appending import append_whole
from nest_fn.files.atomic import remove
from nest_fn.files.inputs import read_plain
from nest_fn.files.outputs import Place, written
from nest_fn.layers.tree import device_of
from nest_fn.layers.types import Tensor
from nest_fn.recording.windows import encoder_frames, over_windows
from nest_fn.train.ctc.decode import Decoder, Hypothesis
from nest_fn.train.ctc.model_files import Recogniser
from nest_fn.train.ctc.recogniser import cast, feature_log_probs, token_log_probs
from nest_fn.train.ctc.scores import Errors, count_errors
from nest_fn.train.data.dataset import Dataset
from nest_fn.train.errors import CheckpointError, MemoryExhausted, is_out_of_memory

from .inference import ALONE, Job, Utterances, not_finite, utterances
from .recordings import Recording, StopAsked, recordings, until_stopped
from .settings import seconds_per_frame


@torch.no_grad()
def transcribe(
    made: Recogniser, dataset: Dataset, decode: Decoder, *, done: Mapping[int, Any] | None = None,
    job: Job = ALONE,
) -> Iterator[tuple[int, dict[str, Any]]]:  # fmt: skip
    """Index in the manifest and line of every utterance that is not ``done``, the longest first.

    The model is in evaluation mode: an utterance's text does not depend on its batch, but for rounding. Raises
    ``DataError`` and ``MemoryExhausted``.
    """
    precision = made.cfg.trainer.precision
    made = made._replace(
        params={**made.params, "encoder": cast(made.params["encoder"], precision)}, head=cast(made.head, precision)
    )
    for batch in utterances(dataset, job):
        rows = [row for row, index in enumerate(batch.number.tolist()) if index not in (done or {})]
        if rows:
            for row, found in zip(rows, _recognised(made, dataset, batch, rows, decode), strict=True):
                index = int(batch.number[row])
                yield index, _line(made, dataset, index, found)
    for recording in recordings(dataset, device_of(made.head), job):
        if recording.number not in (done or {}):
            with suppress(StopAsked):
                hypothesis = _recognised_recording(made, dataset, recording, decode, job)
                yield recording.number, _line(made, dataset, recording.number, hypothesis)


def finished_lines(found: Mapping[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines in the manifest's order."""
    return [found[index] for index in sorted(found)]


def rates(lines: list[dict[str, Any]]) -> tuple[Errors, int]:
    """Errors over the lines whose text was given, and their number."""
    pairs = [(str(line["text"]), line["reference"]) for line in lines if isinstance(line.get("reference"), str)]
    pairs = [(mine, right) for mine, right in pairs if right.strip()]
    return count_errors(pairs), len(pairs)


class FoundLines:
    """Lines found so far, in a hidden file beside the output; its first line is the output's origin."""

    def __init__(self, place: Place) -> None:
        self._path = place.path.with_name(f".{place.path.name}.part")
        self._origin = {"written_by": "nest_fn", "origin": place.origin}

    def read(self) -> dict[int, dict[str, Any]]:
        """Lines by index in the manifest; none if the file is of another origin, and then it is begun anew."""
        try:
            raw = read_plain(self._path).split(b"\n")[:-1]  # what follows the last newline is not whole
            lines = [json.loads(line) for line in raw]
        except (OSError, ValueError):
            lines = []
        if not lines or lines[0] != self._origin:
            remove(self._path)
            return {}
        return {int(line["index"]): line["line"] for line in lines[1:]}

    def add(self, index: int, line: Mapping[str, Any]) -> None:
        """Keep one line. Raises ``CheckpointError`` if it cannot be written."""
        try:
            if not self._path.exists():
                append_whole(self._path, (json.dumps(self._origin) + "\n").encode())
            append_whole(self._path, (json.dumps({"index": index, "line": line}) + "\n").encode())
        except OSError as error:
            raise CheckpointError(f"{self._path}: {error.strerror}; the lines before are kept.") from error

    def finish(self, place: Place, lines: list[dict[str, Any]]) -> None:
        """Write the output, and remove the file of its lines."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with written(place, len(text)) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogatepass")
        remove(self._path)


def _recognised(
    made: Recogniser, dataset: Dataset, batch: Utterances, rows: list[int], decode: Decoder
) -> list[Hypothesis]:
    device = device_of(made.head)
    given = {
        "audio": batch.audio[rows].to(device), "audio_len": batch.lengths[rows].to(device),
        "utterance": batch.hashes[rows].to(device),
    }  # fmt: skip
    try:
        log_probs, lengths, _ = token_log_probs(made.params, made.head, made.state, given, made.cfg, made.design)
        return decode(log_probs, lengths.tolist())
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        seconds = batch.audio.shape[1] / dataset.sample_rate
        raise MemoryExhausted(
            f"out of memory in a batch of {len(rows)} x {seconds:.2f} s; lower data.batch_seconds or "
            "data.max_batch_size. What was found stays, and the same command goes on from there."
        ) from None


def _recognised_recording(
    made: Recogniser, dataset: Dataset, recording: Recording, decode: Decoder, job: Job
) -> Hypothesis:
    """What is said in a recording too long for a batch: its windows' log-probabilities are joined, then decoded."""

    def encode(mel: Tensor, frames: Tensor) -> tuple[Tensor, ...]:
        log_probs, _, _ = feature_log_probs(made.params, made.head, made.state, mel, frames, made.cfg, made.design)
        return (log_probs.cpu(),)

    frames = encoder_frames(recording.samples, made.cfg)
    pieces = over_windows(encode, recording.read, recording.samples, made.cfg, dataset.config.batch_seconds)
    told = until_stopped(pieces, frames, recording.samples / dataset.sample_rate, job)
    log_probs = torch.cat([piece.frames[0] for piece in told])
    (found,) = decode(log_probs[None], [len(log_probs)])
    return found


def _line(made: Recogniser, dataset: Dataset, index: int, found: Hypothesis) -> dict[str, Any]:
    if not math.isfinite(found.score):
        raise not_finite(dataset, index)
    seconds = seconds_per_frame(made.cfg)
    fields = dict(dataset.manifest.fields(index))
    audio = dataset.manifest.lasting_name(index)
    if audio is not None:
        fields.pop("audio_filename", None)
        fields["audio_filepath"] = audio
    fields["duration"] = float(dataset.manifest.duration[index])
    if "text" in fields:
        fields["reference"] = fields.pop("text")
    tokens = [
        {"token": made.tokenizer.token(number), "start": round(first * seconds, 3), "end": round(last * seconds, 3)}
        for number, (first, last) in zip(found.numbers, found.frames, strict=True)
    ]
    text = made.tokenizer.decode(found.numbers)
    return {**fields, "text": text, "score": round(found.score, 4), "tokens": tokens}

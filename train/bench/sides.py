"""A step side by side: processes of this library, eager or compiled, and of a peer, asked in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from nest_fn.train.errors import UsageError

from .workload import Case, Shape

_ENCODER = (
    "n_layers", "d_model", "n_heads", "subsampling", "subsampling_factor", "subsampling_conv_channels",
    "ff_expansion_factor", "self_attention_model", "xscaling", "untie_biases", "conv_kernel_size", "conv_norm_type",
    "dropout", "dropout_pre_encoder", "dropout_emb", "dropout_att",
)  # fmt: skip
"""Settings of the encoder that both sides have by the same name."""
_STEPS = 2  # a turn
Figures = dict[str, Any]
PEER = Path(__file__).with_name("peer_nemo.py")


class Machine(NamedTuple):
    """Where the sides run."""

    device: str = "cpu"
    threads: int = 1


class Side:
    """A process that answers a line of JSON with a line of JSON."""

    def __init__(
        self, command: Sequence[str], settings: dict[str, Any], machine: Machine, environment: Mapping[str, str]
    ) -> None:
        # How long threads spin, ``nest-fn`` has set for all sides alike.
        threads = {"OMP_NUM_THREADS": str(machine.threads)}
        words = [*command, json.dumps(settings | machine._asdict())]
        self.name = command[0]
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - a pipe that nobody reads would fill up
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True,
            env={**os.environ, **threads, **environment},
        )  # fmt: skip
        self.about = self._read()

    def steps(self, shape: Shape, count: int) -> dict[str, Any]:
        """Let it make ``count`` steps. Raises ``UsageError`` with its last words if it cannot."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({**shape._asdict(), "steps": count}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what ended it comes with the answer
        return self._read()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.said):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.said.seek(0)
            last = self.said.read().strip().splitlines()[-1:] or ["no word"]
            self.close()
            raise UsageError(f"bench: {self.name} ended with {code}: {last[0][:400]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def ours(case: Case, machine: Machine, *, compiled: bool = False, cache: str | None = None) -> Side:
    """This library's side; ``cache`` is a folder for what the compiler makes, else its usual one is used."""
    folder = {} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    settings = {"preset": case.preset, "overrides": case.overrides, "compiled": compiled}
    return Side([sys.executable, "-W", "ignore", "-m", "nest_fn.train.bench.server"], settings, machine, folder)


def nemo(case: Case, machine: Machine, python: str) -> Side:
    """NeMo's side, by an interpreter that has ``nemo_toolkit``."""
    return Side([python, "-W", "ignore", str(PEER)], peer_settings(case), machine, {})


def peer_settings(case: Case) -> dict[str, Any]:
    """The sizes of a configuration by NeMo's names. Raises ``UsageError`` if NeMo's step has another form."""
    cfg = case.config()
    if cfg.preprocessor.sample_rate != cfg.sample_rate or cfg.mask_position != "pre_conv":
        raise UsageError(f"bench: {case} is not NeMo's pre_conv step; leave --peer out, or choose nest_small.")
    encoder = {name: getattr(cfg.encoder, name) for name in _ENCODER}
    return {
        "sample_rate": cfg.sample_rate, "features": cfg.preprocessor.features, "classes": cfg.num_classes,
        "books": cfg.num_books, "code_dim": cfg.code_dim, "block_size": cfg.masking.block_size,
        "mask_prob": cfg.masking.mask_prob, "precision": cfg.trainer.precision,
        "encoder": encoder | {"att_context_size": list(cfg.encoder.att_context_size[0])},
    }  # fmt: skip


@contextmanager
def closing(sides: dict[str, Side]) -> Iterator[dict[str, Side]]:
    """Sides that are ended with the block, those included that come in later."""
    try:
        yield sides
    finally:
        for side in sides.values():
            side.close()


def compare(
    case: Case, machine: Machine, rounds: int, *, compiled: bool = False, peer_python: str | None = None
) -> Figures:
    """Seconds of a step for each side over ``rounds`` turns, after one that does not count.

    Every round asks each side for two steps, so that what disturbs the machine disturbs all of them. Raises
    ``UsageError`` if a side ends.
    """
    sides = {"nest_fn": ours(case, machine)}
    with closing(sides):
        if compiled:
            sides["nest_fn, compiled"] = ours(case, machine, compiled=True)
        if peer_python is not None:
            sides["NeMo"] = nemo(case, machine, peer_python)
        warm = {name: side.steps(case.shape, _STEPS) for name, side in sides.items()}
        turns = [{name: side.steps(case.shape, _STEPS) for name, side in sides.items()} for _ in range(rounds)]
        return {name: _summary(case, side, warm[name], [turn[name] for turn in turns]) for name, side in sides.items()}


def _summary(case: Case, side: Side, warm: Figures, turns: Sequence[Figures]) -> Figures:
    seconds = [taken for turn in turns for taken in turn["seconds"]]
    least, median = min(seconds), statistics.median(seconds)
    return {
        **side.about, "least": least, "median": median, "steps": len(seconds), "first_step": warm["seconds"][0],
        "audio_seconds_a_second": case.shape.audio / least, "peak_bytes": turns[-1]["peak_bytes"],
        "first_loss": warm["losses"][0], "last_loss": turns[-1]["losses"][-1],
    }  # fmt: skip


def told(case: Case, found: Figures, flops: float, gemm: float) -> Iterator[str]:
    """Lines of a report. ``flops`` are of a step, ``gemm`` is the machine's rate in FLOP/s."""
    yield f"step, {case}"
    for name, of in found.items():
        yield (
            f"  {name:<20}{of['least'] * 1e3:9.1f} ms  (median {of['median'] * 1e3:.1f}), "
            f"{of['audio_seconds_a_second']:,.0f} audio-s/s, {flops / of['least'] / gemm:.0%} of the matrix product's "
            f"rate, peak {of['peak_bytes'] / 1e9:.2f} GB, loss {of['first_loss']:.3f} -> {of['last_loss']:.3f}"
        )
    if "NeMo" in found:
        mine = min((of for name, of in found.items() if name != "NeMo"), key=lambda of: float(of["least"]))
        yield (
            f"  NeMo / nest_fn: least {found['NeMo']['least'] / mine['least']:.2f}, "
            f"median {found['NeMo']['median'] / mine['median']:.2f}"
        )

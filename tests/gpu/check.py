"""Does every kernel of the compiled training step compile for an H100? Asked on a machine without a GPU.

    make gpu-check                                           # 8, 33 and 60 rows of 20 s
    make gpu-check ARGS="--rows 256 --seconds 8 -c nest_small encoder.n_layers=1"
    make gpu-check ARGS="--bytes"                            # memory traffic by part, and no machine code

The parts of the step are compiled as the trainer compiles them, for compute capability 9.0, with shapes alone. Inductor
writes its Triton kernels, and each of their configurations goes through Triton and ptxas. Nothing is run. A refused
kernel is told with the project's lines that it comes from. Exit code 0: all compile; 1: something is refused.

Other than on a device: matrix products are never padded (there a measurement decides); cuBLAS, cuDNN and cuFFT are
calls, not kernels; the kernels for sizes left free, from the second shape on, are not made. One layer stands for all.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    """The command."""
    args = _options()
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as home:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{home}/inductor", "TRITON_CACHE_DIR": f"{home}/triton"}
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        return _check(args, Path(home))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-c", "--config", default="nest_large")
    parser.add_argument("--rows", default="8,33,60", help="rows of a batch; several by commas")
    parser.add_argument("--seconds", type=float, default=20.0, help="width of a batch")
    parser.add_argument("--parts", default="", help="only these, by commas: mixing,conformer block")
    parser.add_argument("--bytes", action="store_true", help="count what is read and written; make no machine code")
    parser.add_argument("--list", type=int, default=0, metavar="N", help="with --bytes: a part's N largest kernels")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    return parser.parse_args()


def _check(args: argparse.Namespace, home: Path) -> int:
    from nest_fn.config import Config

    from .generate import Collector
    from .machine_code import compile_kernels, compile_own, different
    from .pretend import pretend

    pretend()
    started, collector = time.monotonic(), Collector(tuple(filter(None, args.parts.split(","))))
    depth = Config.preset(args.config, args.overrides).encoder.n_layers
    cfg = Config.preset(args.config, ["trainer.precision=bf16", "encoder.n_layers=1", *args.overrides])
    for rows in map(int, args.rows.split(",")):
        collector.traffic.clear()
        collector.generate(cfg, rows, args.seconds)
        if args.bytes:
            _tell_traffic(collector, rows * args.seconds, depth, cfg.encoder.n_layers, args.list)
    refused, written = list(collector.refused), time.monotonic() - started
    if not args.bytes:
        made = compile_kernels(different(collector.kernels), home, args.jobs)
        refused += compile_own()
        refused += [one.refusal for one in made if one.refusal is not None]
        print(
            f"{len(collector.kernels)} kernels at {args.rows} rows, {len(made)} different, "
            f"{sum(len(one.told) for one in made)} configurations; written in {written:.0f} s, "
            f"compiled in {time.monotonic() - started - written:.0f} s"
        )
    for line in refused:
        print(f"REFUSED: {line}")
    print(f"{len(refused)} refused")
    return 1 if refused else 0


def _tell_traffic(collector: object, audio: float, depth: int, layers: int, listed: int) -> None:
    """MB an audio-second by part, and of a whole step."""
    total = 0.0
    for graph, one in collector.traffic.items():  # type: ignore[attr-defined]
        times = one.times * (depth / layers if graph.startswith("conformer block") else 1)
        total += times * (one.read + one.written)
        print(
            f"{graph:28s} read {one.read / audio / 1e6:7.2f}  written {one.written / audio / 1e6:7.2f} MB an "
            f"audio-second, {one.kernels} kernels, {one.calls} calls, {times:g} times"
        )
        for read, written, what in sorted(one.largest, key=lambda entry: -entry[0] - entry[1])[:listed]:
            print(f"    {read / audio / 1e6:.3f} + {written / audio / 1e6:.3f}  {what}")
    print(f"{depth} layers: {total / audio / 1e6:.1f} MB an audio-second, without casts and the optimizer")


if __name__ == "__main__":
    sys.exit(main())

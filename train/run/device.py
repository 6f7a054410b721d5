"""The device of a run: which one, whether its step is compiled, and how a CPU keeps memory.

Activations of a step are tens of megabytes each. By default glibc maps every such block anew and gives it back, and the
kernel clears its pages at each first touch: a tenth of a training step on a CPU. Kept in the heap, they are reused.
"""

from __future__ import annotations

import ctypes
import sys

import torch

from nest_fn.config import Config
from nest_fn.train.distributed.launch import Job
from nest_fn.train.errors import UsageError

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MEBIBYTE = 1 << 20


def choose_device(name: str, job: Job | None = None) -> torch.device:
    """``auto`` is CUDA where available, one device a rank. Raises ``UsageError`` if the device does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and job is not None and not job.ranks.is_single:
        name = f"cuda:{job.local_rank}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"trainer.device is {name}, this machine has {torch.cuda.device_count()} CUDA devices; "
                         "nest-fn doctor shows them")  # fmt: skip
    return device


def prepare_device(cfg: Config, job: Job | None = None) -> torch.device:
    """The device that ``trainer.device`` names, with the process set up for it. Raises ``UsageError``."""
    device = choose_device(cfg.trainer.device, job)
    check_precision(cfg.trainer.precision, device)
    if device.type == "cuda" and job is not None and not job.ranks.is_single:
        torch.cuda.set_device(device)  # NCCL wants to know
    if cfg.trainer.threads > 0:
        torch.set_num_threads(cfg.trainer.threads)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def is_compiled(cfg: Config, device: torch.device) -> bool:
    """``auto`` compiles where CUDA is; on a CPU eager is as fast and starts at once."""
    return cfg.trainer.compile == "on" or (cfg.trainer.compile == "auto" and device.type == "cuda")


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ``UsageError`` for bf16 on a CPU without instructions for it, where a step takes up to 8 times as long.

    docs/performance.md, "bfloat16 on a CPU". Processors that are not x86 do not tell, and are let through.
    """
    if precision != "bf16" or device.type != "cpu":
        return
    able = torch.cpu.get_capabilities()
    if able.get("architecture") == "x86_64" and not (able.get("avx512_bf16") or able.get("amx_bf16")):
        raise UsageError(
            f"trainer.precision=bf16 on {able.get('cpu_name', 'this CPU')}, which has no instructions for bfloat16 "
            "(AVX512_BF16, AMX): a step would take several times as long; set trainer.precision=fp32"
        )


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to reuse large blocks; whether it took the settings. For the whole process."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * _MEBIBYTE))
    return all(mallopt(name, value) == 1 for name, value in settings)

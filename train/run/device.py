"""Memory of a CPU run: freed blocks are kept for the next step.

Activations of a step are tens of megabytes each. By default glibc maps every such block anew and gives it back, and the
kernel clears its pages at each first touch: a tenth of a training step on a CPU. Kept in the heap, they are reused.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_MEBIBYTE = 1 << 20


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to reuse large blocks; whether it was there and listened. For the whole process."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 * _MEBIBYTE))
    return all(mallopt(name, value) == 1 for name, value in settings)

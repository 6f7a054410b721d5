"""Run a command for which mode bits hold, even if root runs it: ``python tests/unprivileged.py COMMAND...``

Root writes into read-only folders by capabilities; those leave the bounding set here, and ``exec`` drops them for good.
"""

from __future__ import annotations

import ctypes
import os
import sys

REFUSED = 77  # exit code: root may not give its capabilities up here
_PR_CAPBSET_DROP = 24
_CAPABILITIES = (1, 2, 3)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER of linux/capability.h


def command_prefix() -> list[str]:
    """What to write before a command."""
    return [sys.executable, os.path.abspath(__file__)]


def _give_up() -> bool:
    """Whether mode bits will hold after ``exec``."""
    if os.geteuid() != 0:
        return True
    if not sys.platform.startswith("linux"):
        return False
    prctl = ctypes.CDLL(None).prctl
    return all(prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) == 0 for capability in _CAPABILITIES)


if __name__ == "__main__":
    if not _give_up():
        sys.exit(REFUSED)
    os.execvp(sys.argv[1], sys.argv[1:])

"""Processes that do not survive the one that started them, whatever ends it.

Linux sends a signal when the parent is gone (PR_SET_PDEATHSIG). Elsewhere a server sees the end of its input; a run
that goes on nevertheless holds its lease, which keeps a second writer out until it is done.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End this process by SIGKILL as soon as its parent is gone; at once if it is gone already.

    Args:
        parent: process id of the parent as it was when it started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)

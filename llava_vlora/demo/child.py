"""Becomes the command of a step: ``python child.py LOCK PARENT COMMAND...``; run as a file, it imports nothing heavy.

A step must not go on when what started it was killed, and the same step of the next run must not write to its folder
before it has ended. The lock is held by the command itself and by all processes that it forks.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import time
from collections.abc import Sequence

_PATIENCE = 60.0
#: Linux' prctl(2): the signal to get when the parent has died.
_PR_SET_PDEATHSIG = 1


def become(lock: str, parent: int, command: Sequence[str]) -> None:
    """Wait for the lock, tie this process to its parent's life, and turn into the command; returns never."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit("What started this step has ended before it began.")
    held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    end = time.monotonic() + _PATIENCE
    while not _locked(held):
        if time.monotonic() > end:
            holder = os.read(held, 20).decode() or "unknown"
            raise SystemExit(
                f"Process {holder} of an earlier run still works on this step; end it."
            )
        time.sleep(0.2)
    os.truncate(held, 0)
    os.write(held, str(os.getpid()).encode())
    os.set_inheritable(held, True)
    os.execvp(command[0], list(command))


def _locked(held: int) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


if __name__ == "__main__":
    become(sys.argv[1], int(sys.argv[2]), sys.argv[3:])

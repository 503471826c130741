"""How a process ends that has trained together with others: without the interpreter's shutdown.

Threads of PyTorch's collective operations may ask for the interpreter's lock while it shuts down, which aborts the
process after all its work is done. Its launcher then reports a failed run, and other machines wait for it in vain.
"""

from __future__ import annotations

import atexit
import os
import sys


class _State:
    finished = False


def prepare() -> None:
    """Be the last exit handler; to be called before others are registered, in a process that does nothing else."""
    atexit.register(_leave)


def finished() -> None:
    """The work is done: after all exit handlers, end with code 0."""
    _State.finished = True


def _leave() -> None:
    if _State.finished:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

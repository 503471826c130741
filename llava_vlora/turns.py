"""Who may use a live decoder now: many readers at once, or one writer that changes its weights.

Merging an image into the weights changes the model for every thread. So calls that only read the weights
share the decoder, and a merge has it alone; nobody waits where nobody merges.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from .errors import MergeError, WeightsError

_log = logging.getLogger(__name__)
#: Seconds after which a waiting thread says whom it waits for.
_PATIENCE = 30.0


class Turns:
    """A lock with shared and exclusive use, first come first served; a thread may share it repeatedly."""

    def __init__(self) -> None:
        """A free lock."""
        self._changed = threading.Condition()
        self._readers: dict[int, int] = {}
        self._writer: int | None = None
        self._waiting = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Use the weights as they are; waits while another thread has the decoder alone."""
        me = threading.get_ident()
        with self._changed:
            # A writer that waits goes first, or a steady stream of readers would starve it; a thread that
            # reads already must not queue behind it, or both would wait for ever.
            if self._writer != me and me not in self._readers:
                self._wait(lambda: self._writer is None and not self._waiting)
            self._readers[me] = self._readers.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Change the weights; waits until no other thread uses them.

        Raises:
            MergeError: This thread has the decoder alone already.
            WeightsError: This thread is inside a call that shares the decoder; it would wait for itself.
        """
        me = threading.get_ident()
        with self._changed:
            if self._writer == me:
                raise MergeError(
                    "An image is merged into the model already; close that merged() first."
                )
            if me in self._readers:
                raise WeightsError(
                    "The model's weights cannot be changed from inside one of its own calls; enter merged() "
                    "before generate() or forward()."
                )
            self._waiting += 1
            try:
                self._wait(lambda: self._writer is None and not self._readers)
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            self._writer = me
        try:
            yield
        finally:
            with self._changed:
                self._writer = None
                self._changed.notify_all()

    @property
    def mine(self) -> bool:
        """Whether this thread has the decoder alone."""
        return self._writer == threading.get_ident()

    @property
    def busy(self) -> bool:
        """Whether another thread uses the decoder or waits for it."""
        me = threading.get_ident()
        with self._changed:
            return bool(
                self._waiting or self._writer not in (None, me) or self._readers.keys() - {me}
            )

    def _wait(self, free: Callable[[], bool]) -> None:
        while not self._changed.wait_for(free, timeout=_PATIENCE):
            _log.warning(
                "Still waiting for the language model: it is in use by %s.",
                "merged() in another thread" if self._writer else f"{len(self._readers)} calls",
            )


_TURNS: WeakKeyDictionary[nn.ModuleList, Turns] = WeakKeyDictionary()
_LOCK = threading.Lock()


def turns(layers: nn.ModuleList) -> Turns:
    """The lock of a decoder, found by its list of layers."""
    with _LOCK:  # every forward pass asks, so no lock is made where there is one
        found = _TURNS.get(layers)
        if found is None:
            found = _TURNS[layers] = Turns()
        return found

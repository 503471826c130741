"""The order of samples, remembered so that a continued run sees what the unbroken one would have seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Order:
    """The random state from which the running epoch's order was drawn.

    Samplers draw from PyTorch's global generator, or from one of their own that accelerate seeds by the epoch, at the
    start of each epoch. A run that is continued in the middle of an epoch has another state by then (accelerate counts
    from epoch 0 again), so the one of the checkpoint is put back while the order is drawn.
    """

    def __init__(self) -> None:
        """Nothing drawn yet."""
        self._current: dict[str, Tensor] | None = None
        self._replay: dict[str, Tensor] | None = None

    def save(self, path: Path) -> None:
        """Write the state; no file where no order was drawn."""
        if self._current is not None:
            torch.save(self._current, path)

    def load(self, path: Path) -> None:
        """Draw the next orders from the state in a file, if there is one, until :meth:`replayed`."""
        if path.is_file():
            self._replay = torch.load(path, map_location="cpu", weights_only=True)

    def replayed(self) -> None:
        """Training goes on: later epochs draw for themselves."""
        self._replay = None

    def draw(self, sampler: Any, indices: Callable[[], Iterator[Any]]) -> list[Any]:
        """All indices of one epoch."""
        own = getattr(sampler, "generator", None)
        if self._replay is None:
            self._current = {"torch": torch.get_rng_state()}
            if hasattr(sampler, "epoch"):
                self._current["epoch"] = torch.tensor(sampler.epoch)
            if own is not None:
                self._current["own"] = own.get_state()
            return list(indices())
        self._current = self._replay
        before = torch.get_rng_state()
        torch.set_rng_state(self._replay["torch"])
        if "epoch" in self._replay:
            sampler.epoch = int(self._replay["epoch"])
        if own is not None and "own" in self._replay:
            own.set_state(self._replay["own"])
        drawn = list(indices())
        torch.set_rng_state(before)
        return drawn


def remember(loader: Any, order: Order) -> None:
    """Let the sampler of a data loader, as accelerate prepared it, draw through ``order``."""
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    sampler = batches.sampler
    kind = type(sampler)

    def __iter__(self: Any) -> Iterator[Any]:
        return iter(order.draw(self, lambda: kind.__iter__(self)))

    # Not a wrapper around it: accelerate chooses by the class of a sampler what it does with it.
    sampler.__class__ = type(kind.__name__, (kind,), {"__iter__": __iter__})

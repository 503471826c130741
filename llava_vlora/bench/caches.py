"""Key-value caches: tuples in old transformers, an object in new ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def _tensors(past: Any) -> list[Tensor]:
    if hasattr(past, "to_legacy_cache"):
        past = past.to_legacy_cache()
    return [t for layer in past for t in layer]


def cache_bytes(past: Any) -> int:
    """Bytes of a key-value cache."""
    return sum(t.numel() * t.element_size() for t in _tensors(past))


def widened(past: Any, batch: int) -> Any:
    """The cache of one row for ``batch`` rows."""
    if hasattr(past, "batch_repeat_interleave"):
        past.batch_repeat_interleave(batch)
        return past
    return tuple(tuple(t.repeat_interleave(batch, dim=0) for t in layer) for layer in past)


def shorten(past: Any, length: int) -> None:
    """Forget all but the first ``length`` tokens; a cache of tuples was never written to."""
    if hasattr(past, "crop"):
        past.crop(length)

"""A model that answers from images cut to a rank, as a cache of that rank keeps them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ..cache import PerceptionCache
from ..errors import ConfigError, listing
from ..generators import KINDS, kind_of
from ..integration.api import Loaded
from ..integration.checkpoint import Checkpoint
from .benchmarking import Variant


def of_rank(checkpoint: Checkpoint | None, rank: int) -> Variant:
    """The change for ``--vlora-rank``.

    Args:
        checkpoint: The model's folder; None of a name on the hub, of which nothing is known before it is loaded.
        rank: Vectors that are kept of an image.

    Raises:
        ConfigError: The model has no generator, or one whose images have no rank.
    """
    kind = None if checkpoint is None else kind_of(checkpoint.config)
    able = [name for name, row in KINDS.items() if row.generator.caches_rank]
    if checkpoint is not None and kind is None:
        what = "the public code's" if checkpoint.vlora else "no"
        raise ConfigError(
            f"--vlora-rank {rank}: {checkpoint.path} has {what} generator; the images of {listing(able)} have a rank."
        )
    if kind is not None and not kind.generator.caches_rank:
        raise ConfigError(
            f"--vlora-rank {rank}: images of {kind.name!r} have no rank to cut; those of {listing(able)} have."
        )
    return Variant(f"rank{rank}", f"images of rank {rank}", partial(_cut, rank))


@contextmanager
def _cut(rank: int, loaded: Loaded) -> Iterator[None]:
    generator = getattr(loaded.model, "generator", None)
    if generator is None:
        raise ConfigError(f"--vlora-rank {rank}: the model has no generator.")
    like = generator.like
    blank = torch.zeros(1, generator.num_patches, generator.visual_dim).to(like)
    with torch.no_grad():
        generator.shorten(generator.latents(blank), rank)  # a rank that does not fit is named now
    before = loaded.model.perception_cache
    cache = loaded.model.perception_cache = PerceptionCache(rank=rank)
    try:
        yield
    finally:
        loaded.model.perception_cache = before
        if cache.misses:
            print(
                f"llava_vlora: rank {rank} leaves out up to {cache.lost_share:.3g} of an image's sum of squares.",
                file=sys.stderr,
            )

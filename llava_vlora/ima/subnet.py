"""alpha-SubNet: the weights that the masks of several tasks or modalities share (arXiv 2405.16700, section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError, IMAError
from .linears import Place
from .masks import MaskSet, pack
from .scores import Scores
from .selecting import Group, make_mask


@dataclass(frozen=True)
class SubNet:
    """How sparse the common part of masks is."""

    min_votes: int
    masks: int
    sparsities: tuple[float, ...]
    """Of the masks."""
    sparsity: float
    """Over the pruned linear layers."""
    model_sparsity: float
    """Over the whole language model."""
    independent_sparsity: float
    """That masks of these densities would give over the linear layers if they were independent."""


def alpha_subnet(
    masks: Sequence[MaskSet], *, min_votes: int | None = None
) -> tuple[MaskSet, SubNet]:
    """Keep what at least ``min_votes`` masks keep.

    Masks of :meth:`~.masks.MaskSet.load` are read one matrix at a time.

    Args:
        masks: Of one model.
        min_votes: All masks by default, which is the paper's; 1 keeps what any mask keeps.

    Raises:
        ConfigError: ``min_votes`` is not from 1 to the number of masks.
        IMAError: There is no mask, or masks are of different models.
    """
    if not masks:
        raise IMAError("There are no masks to combine.")
    first, *others = masks
    for other in others:
        first.check_same(other)
    votes = len(masks) if min_votes is None else min_votes
    if not 1 <= votes <= len(masks):
        raise ConfigError(f"min_votes is {votes}; give 1 to {len(masks)}, the number of masks.")
    packed: dict[Place, Tensor] = {}
    expected = 0.0
    for place in first.shapes:
        packed[place] = _vote(masks, place, votes)
        densities = [mask.density(place) for mask in masks]
        expected += (1 - _at_least(densities, votes)) * first.size(place)
    about = {"subnet": {"min_votes": votes, "of": [dict(mask.about) for mask in masks]}}
    found = MaskSet(packed, dict(first.shapes), first.probe, first.parameters, about)
    total = sum(map(found.size, found.shapes))
    sparsities = tuple(mask.sparsity for mask in masks)
    return found, SubNet(
        votes, len(masks), sparsities, found.sparsity, found.model_sparsity, expected / total
    )


def matched(
    subnet: MaskSet, scores: Mapping[str, Scores], *, group: Group = "row"
) -> dict[str, MaskSet]:
    """Masks of other scores that prune as much as a subnetwork does, to compare it with.

    Args:
        subnet: The mask whose sparsity over linear layers is aimed at.
        scores: By a name: magnitude, random, one task's Wanda scores, ...
        group: As in :func:`~.selecting.make_mask`; ``layer`` misses the sparsity by less than one weight a layer,
            ``row`` by less than one a row.
    """
    return {name: make_mask(s, subnet.sparsity, group=group) for name, s in scores.items()}


def _vote(masks: Sequence[MaskSet], place: Place, votes: int) -> Tensor:
    bits = masks[0].packed[place].clone()
    if votes in (1, len(masks)):
        join = torch.Tensor.bitwise_or_ if votes == 1 else torch.Tensor.bitwise_and_
        for mask in masks[1:]:
            join(bits, mask.packed[place])
        return bits
    counts = torch.zeros(masks[0].shapes[place], dtype=torch.int16)
    for mask in masks:
        counts += mask.kept(place)
    return pack(counts >= votes)


def _at_least(densities: Sequence[float], votes: int) -> float:
    """Probability that at least ``votes`` of independent events happen."""
    exactly = [1.0]
    for p in densities:
        before, after = [*exactly, 0.0], [0.0, *exactly]
        exactly = [b * (1 - p) + a * p for b, a in zip(before, after, strict=True)]
    return math.fsum(exactly[votes:])

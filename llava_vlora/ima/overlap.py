"""Overlap of masks: do two tasks or modalities activate the same weights (arXiv 2405.16700, section 4)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from ..errors import IMAError
from .linears import Place
from .masks import MaskSet, popcount


@dataclass(frozen=True)
class Agreement:
    """Intersection over union of kept weights, beside what chance gives."""

    iou: float
    chance: float
    """Of independent masks with the same densities p and q: ``p q / (p + q - p q)``; ``q / (2 - q)`` where equal."""
    normalised: float | None
    """0 at chance, 1 at the best that the densities allow, ``min(p, q) / max(p, q)``, which is 1 where they are equal;
    None where chance is the best, as for a mask that keeps all."""


@dataclass(frozen=True)
class Overlap:
    """Overlap of two masks by linear layer and on average."""

    places: dict[str, Agreement]
    """By ``<block>.<module>``."""
    blocks: dict[int, Agreement]
    """Mean over the layers of a block."""
    mean: Agreement
    """Mean over blocks."""
    pooled: Agreement
    """Of all weights as one set."""


@dataclass(frozen=True)
class Pairs:
    """Overlap of each two of several masks."""

    names: tuple[str, ...]
    overlaps: dict[str, Overlap]
    """By ``<name> / <other name>``, in the order of the names."""

    def between(self, first: str, second: str) -> Overlap:
        """The overlap of two masks, given in any order."""
        found = self.overlaps.get(f"{first} / {second}")
        return self.overlaps[f"{second} / {first}"] if found is None else found


def mask_iou(first: MaskSet, second: MaskSet, *, without: MaskSet | None = None) -> Overlap:
    """Overlap of the weights that two masks keep; one matrix is read at a time.

    Wanda's scores have the weight's magnitude in common, so their masks overlap beyond chance whatever was read.

    Args:
        first: A mask.
        second: Another one of the same model.
        without: Leave out what this mask keeps, such as that of magnitudes; chance is then that of the rest.

    Raises:
        IMAError: The masks are of different models, or both keep nothing of a layer.
    """
    for other in (second, without):
        if other is not None:
            first.check_same(other)
    places: dict[str, Agreement] = {}
    by_block: dict[int, list[Agreement]] = {}
    totals = (0, 0, 0, 0)
    for place in first.shapes:
        counts = _counts(first, second, without, place)
        found = _agreement(counts, f"{place[1]!r} of block {place[0]}")
        places[f"{place[0]}.{place[1]}"] = found
        by_block.setdefault(place[0], []).append(found)
        totals = _sum(totals, counts)
    blocks = {number: _mean(found) for number, found in by_block.items()}
    return Overlap(places, blocks, _mean(list(blocks.values())), _agreement(totals, "the model"))


def pairwise_iou(masks: Mapping[str, MaskSet], *, without: MaskSet | None = None) -> Pairs:
    """Overlap of each two masks; ``without`` and errors as for :func:`mask_iou`."""
    found = {
        f"{a} / {b}": mask_iou(masks[a], masks[b], without=without)
        for a, b in combinations(masks, 2)
    }
    return Pairs(tuple(masks), found)


def chance_iou(p: float, q: float) -> float:
    """Expected overlap of independent masks that keep shares ``p`` and ``q``, not both 0."""
    return p * q / (p + q - p * q)


#: Weights kept by both masks, the first, the second; all weights.
_Counts = tuple[int, int, int, int]


def _counts(first: MaskSet, second: MaskSet, without: MaskSet | None, place: Place) -> _Counts:
    one, other, size = first.packed[place], second.packed[place], first.size(place)
    if without is not None:
        rest = ~without.packed[place]
        one, other, size = one & rest, other & rest, size - without.count(place)
    return popcount(one & other), popcount(one), popcount(other), size


def _sum(first: _Counts, second: _Counts) -> _Counts:
    return (
        first[0] + second[0],
        first[1] + second[1],
        first[2] + second[2],
        first[3] + second[3],
    )


def _agreement(counts: _Counts, where: str) -> Agreement:
    both, one, other, size = counts
    if not one + other:
        raise IMAError(f"Both masks keep nothing of {where}: their overlap is undefined.")
    iou = both / (one + other - both)
    chance = chance_iou(one / size, other / size)
    best = min(one, other) / max(one, other)
    # At densities of 0 or 1 the two are one number, up to rounding.
    known = best - chance > 1e-12
    return Agreement(iou, chance, (iou - chance) / (best - chance) if known else None)


def _mean(found: Sequence[Agreement]) -> Agreement:
    known = [one.normalised for one in found if one.normalised is not None]
    return Agreement(
        fmean(one.iou for one in found),
        fmean(one.chance for one in found),
        fmean(known) if known else None,
    )

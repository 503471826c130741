"""From scores to masks: exactly so many weights with the lowest scores are pruned.

Equal scores are pruned in the order of the inputs, then outputs, then layers. Scores are made anew whenever they are
read, a slice of one matrix at a time, so that neither they nor booleans of a whole model are ever in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, IMAError, listing
from .linears import Place
from .masks import MaskSet, pack
from .scores import Scores

#: Within what the scores of weights are compared: an output row, one matrix, or all matrices.
Group = Literal["row", "layer", "global"]
_GROUPS = ("row", "layer", "global")
#: Scores that are sorted at once.
_SLICE = 1 << 22
#: A float32 that is not negative is ordered as its bits are; half of them at a time are counted.
_HALF = 16


def make_mask(
    scores: Scores,
    sparsity: float | None = None,
    *,
    group: Group = "row",
    pattern: str = "unstructured",
) -> MaskSet:
    """Keep the weights with the highest scores.

    Args:
        scores: From :mod:`~.scores` or :mod:`~.wanda`.
        sparsity: Share of weights to prune; of a group of n weights, ``floor(n * sparsity)`` are.
        group: Within what scores are compared. Wanda compares within an output row (arXiv 2306.11695, section 3).
        pattern: ``unstructured``, or ``n:m`` such as ``2:4``: of every m inputs in a row the best n are kept, which
            gives the sparsity.

    Raises:
        ConfigError: The sparsity, group or pattern is unknown, or a width is no multiple of m.
        IMAError: A score is not finite.
    """
    if group not in _GROUPS:
        raise ConfigError(f"{group!r} is no group of weights; choose from {listing(_GROUPS)}.")
    if pattern == "unstructured":
        if sparsity is None or not 0 <= sparsity < 1:
            raise ConfigError(f"The sparsity is {sparsity}; give a share from 0 to less than 1.")
        packed = _unstructured(scores, sparsity, group)
    else:
        best, of = _pattern(pattern)
        if sparsity not in (None, 1 - best / of):
            raise ConfigError(
                f"The pattern {pattern} prunes {1 - best / of:.4g} of the weights, not {sparsity}; leave the sparsity "
                "out."
            )
        _check_widths(scores, of)
        sparsity, group = 1 - best / of, "row"
        packed = {p: _packed(scores, p, partial(_best_of, best=best, of=of)) for p in scores.shapes}
    about = {**scores.about, "sparsity": sparsity, "group": group, "pattern": pattern}
    return MaskSet(packed, scores.shapes, scores.probe, scores.parameters, about)


def _pattern(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise ConfigError(
            f"{text!r} is no pattern; give 'unstructured', or n:m with n kept of m, such as 2:4."
        )
    return int(match[1]), int(match[2])


def _check_widths(scores: Scores, of: int) -> None:
    for (number, path), (_, width) in scores.shapes.items():
        if width % of:
            raise ConfigError(
                f"{path!r} of block {number} reads {width} inputs, which is no multiple of {of}; take another pattern."
            )


def _unstructured(scores: Scores, sparsity: float, group: Group) -> dict[Place, Tensor]:
    if group == "row":
        return {
            place: _packed(scores, place, partial(_best_of_row, pruned=_floor(width * sparsity)))
            for place, (_, width) in scores.shapes.items()
        }
    groups = [[place] for place in scores.shapes] if group == "layer" else [list(scores.shapes)]
    packed: dict[Place, Tensor] = {}
    for places in groups:
        total = sum(math.prod(scores.shapes[place]) for place in places)
        cut = _Cut(scores, places, _floor(total * sparsity))
        packed |= {place: _packed(scores, place, cut.kept) for place in places}
    return packed


def _floor(count: float) -> int:
    """Whole weights; 0.7 * 10 is 7, also in floating point."""
    return math.floor(count + 1e-6)


def _packed(scores: Scores, place: Place, choose: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([pack(choose(part)).cpu() for part in _slices(scores, place)])


def _slices(scores: Scores, place: Place) -> Iterator[Tensor]:
    """The scores of some rows after the other; ``IMAError`` where one is not finite."""
    rows = max(1, _SLICE // scores.shapes[place][1])
    for start in range(0, scores.shapes[place][0], rows):
        part = scores.of(place, slice(start, start + rows))
        if not bool(part.isfinite().all()):
            raise IMAError(
                f"A score of {place[1]!r} in block {place[0]} is not finite; the model's weights are damaged."
            )
        yield part


def _best_of_row(scores: Tensor, pruned: int) -> Tensor:
    worst = scores.sort(dim=-1, stable=True).indices[..., :pruned]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, worst, False)


def _best_of(scores: Tensor, best: int, of: int) -> Tensor:
    return _best_of_row(scores.view(len(scores), -1, of), of - best).flatten(1)


class _Cut:
    """The score below which weights of a group are pruned, with how many of those equal to it."""

    def __init__(self, scores: Scores, places: Iterable[Place], pruned: int) -> None:
        # Two rounds of counting find the score of a given rank among any number of them, exactly.
        places = list(places)
        size = 1 << _HALF
        counts = sum(
            torch.bincount((b >> _HALF).flatten(), minlength=size) for b in _bits(scores, places)
        )
        high, before = _rank(counts, pruned)
        counts = sum(
            torch.bincount(b[(b >> _HALF) == high] & (size - 1), minlength=size)
            for b in _bits(scores, places)
        )
        low, within = _rank(counts, pruned - before)
        self._cut = (high << _HALF) | low
        self._ties = pruned - before - within

    def kept(self, scores: Tensor) -> Tensor:
        """What to keep of the next slice; slices must come in order."""
        bits = scores.view(torch.int32)
        equal = bits == self._cut
        ties = equal.flatten().nonzero().flatten()[: self._ties]
        self._ties -= len(ties)
        kept = (bits >= self._cut).flatten()
        kept[ties] = False
        return kept.view_as(equal)


def _bits(scores: Scores, places: Iterable[Place]) -> Iterator[Tensor]:
    for place in places:
        for part in _slices(scores, place):
            yield part.view(torch.int32)


def _rank(counts: Tensor | int, rank: int) -> tuple[int, int]:
    """The bin that holds the element of this rank, counted from 0, and how many are in bins before it."""
    assert isinstance(counts, Tensor)
    sums = counts.cumsum(0)
    found = int((sums <= rank).sum())
    return found, int(sums[found - 1]) if found else 0

"""Views: what takes the place of perceptual tokens in a model that has none; results name the view they are of.

VLoRA (arXiv 2405.20339) puts no visual tokens into the sequence. What an image does is seen as the change that it
makes to the states of the text (counterfactual), as what perceptual weights add at a module (stream), or as the
directions that they read and write (basis). Numbers of two views are never comparable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from torch import Tensor

from ..errors import IMAError, listing
from ..weights import PerceptualWeights
from .layout import Batch, View


@dataclass(frozen=True)
class Cell:
    """One quantity at one place, over the examples."""

    block: int
    """Counted from 1, as in :mod:`~.states`."""
    place: str
    """A weight type or a state of :data:`~.states.POINTS`."""
    mean: float
    std: float | None
    """Standard deviation over the examples (population); None for what is defined by all of them together."""
    count: int
    """Examples, images or pairs of them."""
    chance: float | None = None
    """What random directions give, where there is such a level."""


@dataclass(frozen=True)
class Measured:
    """One quantity of one view."""

    view: View
    quantity: str
    cells: tuple[Cell, ...]

    def at(self, block: int, place: str) -> Cell:
        """One cell.

        Raises:
            IMAError: There is none.
        """
        for cell in self.cells:
            if (cell.block, cell.place) == (block, place):
                return cell
        raise IMAError(f"{self.quantity!r} was not measured at {place!r} of block {block}.")

    @property
    def places(self) -> tuple[str, ...]:
        """Where it was measured."""
        return tuple(dict.fromkeys(cell.place for cell in self.cells))

    def mean(self, place: str) -> float:
        """Mean over the blocks of one place, such as the IMA score of the paper's figure 9.

        Raises:
            IMAError: Nothing was measured there.
        """
        return fmean(cell.mean for cell in self._of(place))

    def chance(self, place: str) -> float | None:
        """Mean level of chance over the blocks of one place, where there is one.

        Raises:
            IMAError: Nothing was measured there.
        """
        levels = [cell.chance for cell in self._of(place) if cell.chance is not None]
        return fmean(levels) if levels else None

    def _of(self, place: str) -> list[Cell]:
        found = [cell for cell in self.cells if cell.place == place]
        if not found:
            raise IMAError(f"{self.quantity!r} was not measured at {place!r}.")
        return found


class Viewed(Protocol):
    """Whatever names its view."""

    @property
    def view(self) -> str:
        """The view."""


def same_view(results: Iterable[Viewed]) -> str:
    """The one view of several results that are to be compared.

    Raises:
        IMAError: There are several views, or no results.
    """
    views = dict.fromkeys(result.view for result in results)
    if len(views) != 1:
        raise IMAError(
            f"Results of the views {listing(views)} cannot be compared: each measures another thing. "
            "Compare models within one view."
            if views
            else "There are no results to compare."
        )
    return next(iter(views))


@dataclass
class _Sums:
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Of the deviations from the mean."""
    chance: float | None = None

    def cell(self, block: int, place: str) -> Cell:
        spread = (self.squares / self.count) ** 0.5
        chance = None if self.chance is None else self.chance / self.count
        return Cell(block, place, self.mean, spread, self.count, chance)


class Running:
    """Means and standard deviations over examples, in one pass.

    Args:
        view: The view of all that is added.
    """

    def __init__(self, view: View) -> None:
        """Empty."""
        self._view = view
        self._sums: dict[str, dict[tuple[int, str], _Sums]] = {}

    def add(
        self, quantity: str, block: int, place: str, value: float, chance: float | None = None
    ) -> None:
        """One example's value.

        Args:
            quantity: Its name.
            block: Counted from 1.
            place: Weight type or state.
            value: The value.
            chance: What random directions give on average.
        """
        sums = self._sums.setdefault(quantity, {}).setdefault((block, place), _Sums())
        # Welford's update: a difference of large sums would lose the small spread of a steady quantity.
        sums.count += 1
        step = value - sums.mean
        sums.mean += step / sums.count
        sums.squares += step * (value - sums.mean)
        sums.chance = None if chance is None else (sums.chance or 0.0) + chance

    def results(self) -> tuple[Measured, ...]:
        """A result for each quantity, cells by block.

        Raises:
            IMAError: No example was added.
        """
        if not self._sums:
            raise IMAError("There is no example to measure.")
        return tuple(
            Measured(
                self._view,
                quantity,
                tuple(own[key].cell(*key) for key in sorted(own, key=lambda key: key[0])),
            )
            for quantity, own in self._sums.items()
        )


def perceptual_weights(batch: Batch) -> PerceptualWeights:
    """The weights of a batch in which every example shows an image.

    Raises:
        IMAError: The batch has visual tokens or no image, or an example has none.
    """
    if batch.weights is None:
        raise IMAError(
            f"Example {batch.names[0]} shows no perceptual weights: this view is for VLoRA models that look at an "
            "image. Models with visual tokens are analysed by their tokens."
        )
    if len(batch.weights) != len(batch):
        raise IMAError(f"{len(batch)} examples, but {len(batch.weights)} rows of weights.")
    for name, present in zip(batch.names, batch.weights.present.tolist(), strict=True):
        if not present:
            raise IMAError(f"Example {name} has no image, which this view is about; leave it out.")
    return batch.weights


def cosine(first: Tensor, second: Tensor, what: str) -> Tensor:
    """Cosine of matching rows ``[t, d]`` -> ``[t]``.

    Raises:
        IMAError: A row is zero and has no direction, or is not finite; ``what`` says which.
    """
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    if not bool(norms.isfinite().all()):
        raise IMAError(
            f"{what}, or what it is compared with, is not finite; load the model in bfloat16 or float32."
        )
    if not bool((norms > 0).all()):
        raise IMAError(
            f"{what} is zero at a token, so it has no direction to compare. Either the generator is untrained, or "
            "the dtype is too coarse: load the model in float32."
        )
    cosines: Tensor = (first * second).sum(-1) / norms
    return cosines

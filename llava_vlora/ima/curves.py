"""Statistics of a stream of examples in one pass, and the curves over blocks that they end as."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, IMAError
from .layout import View
from .states import Example


@dataclass(frozen=True)
class Curve:
    """One number for each block."""

    of: Mapping[str, str | int | bool]
    """What the numbers are: statistic, point, kind of tokens and so on."""
    layers: tuple[int, ...]
    """Blocks from 1, 0 for what the first block reads."""
    mean: tuple[float, ...]
    std: tuple[float, ...] | None
    """Standard deviation (of the population) over what the mean is taken of; None where it was not measured."""
    count: int
    """Examples or pairs of examples behind each mean."""

    @property
    def average(self) -> float:
        """Mean over the blocks."""
        return sum(self.mean) / len(self.mean)


class Moments:
    """Mean and spread of vectors of numbers that arrive in groups; memory does not grow."""

    def __init__(self) -> None:
        """Nothing seen."""
        self.count = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in ``[k, ...]``, k observations (updating formula of Chan, Golub and LeVeque 1983)."""
        values = values.detach().to("cpu", torch.float64)
        count, mean = len(values), values.mean(0)
        squares = (values - mean).square().sum(0)
        whole = self.count + count
        away = mean - self._mean
        self._squares = self._squares + squares + away.square() * (self.count * count / whole)
        self._mean = self._mean + away * (count / whole)
        self.count = whole

    @property
    def mean(self) -> list[float]:
        """Of each number, flattened."""
        return [float(v) for v in self._mean.flatten()]

    @property
    def std(self) -> list[float]:
        """Of each number, flattened; 0 for a single observation."""
        return [math.sqrt(max(0.0, float(v)) / self.count) for v in self._squares.flatten()]

    def curve(self, layers: Sequence[int], **of: str | int | bool) -> Curve:
        """The curve of vectors that have one number for each block."""
        return Curve(of, tuple(layers), tuple(self.mean), tuple(self.std), self.count)


class Statistic(Protocol):
    """What is computed in one pass."""

    def update(self, example: Example) -> None:
        """Take in one example."""


def feed(examples: Iterable[Example], *statistics: Statistic) -> None:
    """Show each example to several statistics, so that one forward pass serves all.

    Raises:
        IMAError: There is no example.
    """
    seen = False
    for example in examples:
        seen = True
        for statistic in statistics:
            statistic.update(example)
    if not seen:
        raise IMAError("There is no example to analyse.")


class Layers:
    """The blocks that a statistic reads, those it is given or all that the first example has, in one view."""

    def __init__(self, point: str, layers: Sequence[int] | None = None) -> None:
        """For one point of the blocks."""
        self.point = point
        self._layers = None if layers is None else tuple(layers)
        self._view: View | None = None

    def of(self, example: Example) -> tuple[int, ...]:
        """Numbers of the blocks, ascending unless given.

        Raises:
            IMAError: The example has no state of the point, or is of another view than those before.
        """
        self.check_view(example)
        if self._layers is None:
            self._layers = tuple(sorted(n for point, n in example.states if point == self.point))
        if not self._layers:
            raise IMAError(f"No state {self.point!r} was collected for example {example.name}.")
        return self._layers

    def check_view(self, example: Example) -> None:
        """Check that an example is of the view of those before.

        Raises:
            IMAError: It is not.
        """
        self._view = self._view or example.view
        if example.view != self._view:
            raise IMAError(
                f"Example {example.name} is of the view {example.view!r}, others are of {self._view!r}; what two views "
                "give cannot be compared."
            )

    @property
    def view(self) -> str:
        """The view of the examples; that of perceptual tokens where there was none."""
        return self._view or "tokens"

    @property
    def known(self) -> tuple[int, ...]:
        """The same after the first example.

        Raises:
            IMAError: There was none.
        """
        if not self._layers:
            raise IMAError("There is no example to analyse.")
        return self._layers

    def apart(self, step: int) -> list[int]:
        """The blocks l of which block l + ``step`` is there too.

        Raises:
            ConfigError: There is none, or ``step`` is not positive.
        """
        if step < 1:
            raise ConfigError(f"The step is {step}; states are compared 1 or more blocks apart.")
        found = [n for n in self.known if n + step in self.known]
        if not found:
            raise ConfigError(
                f"No two of the blocks {list(self.known)} are {step} apart; leave {step} out of the steps, or collect "
                "more blocks."
            )
        return found


def pool(curves: Sequence[Curve], **of: str | int | bool) -> Curve:
    """One curve of what several, such as those of data sets, are taken of, each observation counted once.

    Raises:
        IMAError: The curves are of different blocks or views, or there is none.
    """
    if len({(c.layers, c.of.get("view")) for c in curves}) != 1:
        raise IMAError("Curves can be pooled if they are of the same blocks and of one view.")
    counts = torch.tensor([c.count for c in curves], dtype=torch.float64)
    shares = counts / counts.sum()
    means = torch.tensor([c.mean for c in curves], dtype=torch.float64)
    mean = shares @ means
    std = None
    if all(c.std is not None for c in curves):
        within = torch.tensor([c.std for c in curves], dtype=torch.float64).square()
        std = tuple((shares @ (within + (means - mean).square())).sqrt().tolist())
    return Curve(of, curves[0].layers, tuple(mean.tolist()), std, int(counts.sum()))

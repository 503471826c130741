"""How a score of models goes with a metric of theirs, told with the caution that few points need."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import IMAError
from ..evaluation.statistics import Interval

#: Fewer points correlate by chance: 3 in a row make 1 or -1 one time in three.
_LEAST = 4
#: Up to this many points all orders are tried: 9! is 362,880.
_ALL_ORDERS = 9


@dataclass(frozen=True)
class Coefficient:
    """One correlation coefficient."""

    value: float
    p_value: float
    """Two-sided permutation test: share of the orders of the metric with a coefficient at least as far from 0."""
    leave_one_out: Interval
    """Lowest and highest value with one point left out."""


@dataclass(frozen=True)
class Correlation:
    """Of a score and a metric of the same models."""

    names: tuple[str, ...]
    """The points."""
    pearson: Coefficient
    spearman: Coefficient
    """Of ranks; equal values share their mean rank."""
    exact: bool
    """Whether the p-values are of all orders, not of a sample."""
    undefined_without: tuple[str, ...]
    """Points without which all others have one score or one metric, so that nothing is left to correlate."""

    @property
    def n(self) -> int:
        """Number of points."""
        return len(self.names)


def correlate(
    scores: Mapping[str, float],
    metrics: Mapping[str, float],
    *,
    seed: int = 0,
    draws: int = 100_000,
) -> Correlation:
    """Pearson's and Spearman's correlation of a score and a metric.

    Args:
        scores: Model -> score.
        metrics: The same models -> metric.
        seed: Of the orders drawn.
        draws: Orders drawn where there are more than 9 points; the observed one counts among them, so that p is never
            0 (Phipson and Smyth 2010).

    Raises:
        IMAError: A model is in one of the two alone, a value is not finite, there are fewer than 4 points, or all
            scores or metrics are equal.
    """
    alone = sorted(scores.keys() ^ metrics.keys())
    if alone:
        side = "metric" if alone[0] in scores else "score"
        raise IMAError(f"{alone[0]} has no {side}; give both for every point, or leave it out.")
    names = tuple(scores)
    if len(names) < _LEAST:
        raise IMAError(
            f"{len(names)} points say nothing about a correlation; give at least {_LEAST}."
        )
    x = np.array([scores[name] for name in names], dtype=float)
    y = np.array([metrics[name] for name in names], dtype=float)
    for what, values in (("score", x), ("metric", y)):
        if not np.isfinite(values).all():
            raise IMAError(
                f"The {what} of {names[int(np.argmin(np.isfinite(values)))]} is not finite."
            )
        if _constant(values):
            raise IMAError(f"Every {what} is {values[0]:g}: nothing varies that could correlate.")
    orders = _orders(len(names), seed, draws)
    exact = len(names) <= _ALL_ORDERS
    found = [_coefficient(x, y, read, orders, exact) for read in (_same, _ranks)]
    lost = tuple(
        name
        for i, name in enumerate(names)
        if _constant(np.delete(x, i)) or _constant(np.delete(y, i))
    )
    return Correlation(names, found[0], found[1], exact, lost)


def _coefficient(
    x: np.ndarray,
    y: np.ndarray,
    read: Callable[[np.ndarray], np.ndarray],
    orders: np.ndarray,
    exact: bool,
) -> Coefficient:
    a, b = _standard(read(x)), _standard(read(y))
    value = float(a @ b)
    # Values that are equal but for the order of addition are equal.
    extreme = int((np.abs(b[orders] @ a) >= abs(value) - 1e-9).sum())
    p = extreme / len(orders) if exact else (extreme + 1) / (len(orders) + 1)
    others = []
    for i in range(len(x)):
        rest = np.delete(x, i), np.delete(y, i)
        if not any(_constant(r) for r in rest):
            others.append(float(_standard(read(rest[0])) @ _standard(read(rest[1]))))
    return Coefficient(value, p, Interval(min(others), max(others)))


def _orders(n: int, seed: int, draws: int) -> np.ndarray:
    if n <= _ALL_ORDERS:
        return np.array(list(itertools.permutations(range(n))), dtype=np.int8)
    draw = np.random.default_rng(seed)
    return draw.permuted(np.tile(np.arange(n, dtype=np.int16), (draws, 1)), axis=1)


def _standard(values: np.ndarray) -> np.ndarray:
    away = values - values.mean()
    return np.asarray(away / math.sqrt(float(away @ away)))


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[place])


def _constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())

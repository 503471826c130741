"""Uncertainty of accuracies and of differences between models that answer the same questions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

#: Sums that differ by no more are equal but for the order of addition.
_SAME = 1e-9


@dataclass(frozen=True)
class Interval:
    """A confidence interval; both ends belong to it."""

    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Exact McNemar test of two models on the same questions."""

    only_first: int
    """Questions that only the first model answers correctly."""
    only_second: int
    """Questions that only the second model answers correctly."""
    p_value: float
    """Two-sided probability of a split at least this uneven if both models were equally good."""


#: Of clusters, from which the bootstrap says something about a figure that is no mean.
_FEWEST = 6


def wilson_interval(successes: float, total: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927); sound near 0, near 1 and for few trials.

    Raises:
        ValueError: ``total`` is not positive, or ``successes`` lies outside ``0..total``.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} of {total} is not a proportion.")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / total
    shrink = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # Rounding must not push an end past the proportion when that is exactly 0 or 1.
    return Interval(max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Exact McNemar test: a two-sided sign test on the questions where the models disagree.

    Args:
        first: For each question, whether the first model is right.
        second: The same for the second model, in the same order.

    Raises:
        ValueError: The two differ in length.
    """
    pairs = list(zip(first, second, strict=True))
    only_first = sum(1 for a, b in pairs if a and not b)
    only_second = sum(1 for a, b in pairs if b and not a)
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    # Integers of any size divide exactly, where 2.0 ** discordant would overflow.
    return PairedTest(only_first, only_second, min(1.0, 2 * tail / 2**discordant))


def format_p(p: float) -> str:
    """A p-value for readers: never an exact zero."""
    return "< 0.0001" if p < 0.0001 else f"= {p:.4f}" if p < 0.01 else f"= {p:.2f}"


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that any false one of them has the usual chance (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    found, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        found[i] = largest
    return found


def clustered_mean(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Bootstrap interval (percentile) of a mean over clusters.

    Questions about one image tend to stand or fall together, which tests of single questions ignore; resampling
    whole images keeps that dependence.

    Args:
        values: One for each question.
        clusters: For each question, what it shares with others, such as its image.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.
        confidence: Share of the samples inside the interval.
    """
    sums, sizes = _by_cluster(values, clusters)
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        chosen = draw.integers(len(sums), size=len(sums))
        means[i] = sums[chosen].sum() / sizes[chosen].sum()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def credit_interval(
    values: Sequence[float], clusters: Sequence[Hashable], *, seed: int
) -> tuple[Interval, str]:
    """95 % interval of the mean of values from 0 to 1, and its name.

    Wilson's where values are 0 or 1 and each has a cluster of its own; else the bootstrap over clusters. Clusters that
    are all alike, or one alone, leave nothing to draw from: there it is Wilson's with a cluster as one trial, the
    widest that dependence within clusters allows.

    Args:
        values: One for each question.
        clusters: For each question, what it shares with others, such as its image.
        seed: Seed of the resampling.
    """
    count = len(set(clusters))
    if set(values) <= {0.0, 1.0} and count == len(values):
        return wilson_interval(sum(values), count), "Wilson"
    found = clustered_mean(values, clusters, seed=seed)
    if found.high - found.low > _SAME:
        return found, "bootstrap over images"
    mean = min(1.0, sum(values) / len(values))
    return wilson_interval(mean * count, count), "Wilson over images"


def clustered_figure(
    figure: Callable[[Sequence[float]], float],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    resamples: int = 500,
    confidence: float = 0.95,
) -> Interval | None:
    """The same interval of any figure of weighted questions; None where it never changes, and of few clusters.

    Args:
        figure: Of the weights of all questions, how often each was drawn.
        clusters: For each question, what it shares with others, such as its image.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.
        confidence: Share of the samples inside the interval.
    """
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(c, len(places)) for c in clusters])
    if len(places) < _FEWEST:
        return None
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        drawn = np.bincount(draw.integers(len(places), size=len(places)), minlength=len(places))
        found.append(figure(drawn[index].astype(float).tolist()))
    if min(found) == max(found):
        return None
    low, high = np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def clustered_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """The same interval of ``mean(first) - mean(second)`` of two models on the same questions, in the same order."""
    return clustered_mean(
        _differences(first, second),
        clusters,
        seed=seed,
        resamples=resamples,
        confidence=confidence,
    )


def paired_permutation(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    flips: int = 10_000,
) -> float:
    """Two-sided p-value of a permutation test of two models on the same questions.

    If both were equally good, either could have given the answers about an image: the sign of each cluster's
    difference is drawn at random. All signs are tried where there are at most ``flips`` of them; else the observed
    one counts among the drawn, so that p is never 0 (Phipson and Smyth 2010).

    Args:
        first: Credit of the first model for each question.
        second: That of the second, in the same order.
        clusters: For each question, what it shares with others, such as its image.
        seed: Seed of the signs.
        flips: Number of draws.
    """
    sums, _ = _by_cluster(_differences(first, second), clusters)
    sums = sums[sums != 0]
    observed = abs(sums.sum()) - _SAME
    if 2 ** min(len(sums), 60) <= flips:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(sums))))
        return float((abs(signs @ sums) >= observed).mean())
    draw = np.random.default_rng(seed)
    extreme = 0
    for _ in range(flips):
        extreme += abs(sums[draw.random(len(sums)) < 0.5].sum() * 2 - sums.sum()) >= observed
    return float((extreme + 1) / (flips + 1))


def detectable_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    power: float = 0.8,
    level: float = 0.05,
) -> float | None:
    """Smallest true difference that a test at ``level`` would find with probability ``power``.

    ``(z_(1 - level/2) + z_power)`` standard errors of the mean difference, which these answers give: it depends on
    the number of questions and on how often the two models differ. The error allows for clusters (sum over clusters
    of the squared sums of residuals). None where that says nothing: there are so few clusters that no answers would
    give a paired test a p-value below ``level``, or all differences are alike.
    """
    values = _differences(first, second)
    sums, sizes = _by_cluster(values, clusters)
    error = np.sqrt(((sums - sizes * np.mean(values)) ** 2).sum()) / len(values)
    if 2.0 ** (1 - len(sums)) > level or error < _SAME:
        return None
    normal = NormalDist()
    return float((normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)) * error)


def _differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [float(a) - float(b) for a, b in zip(first, second, strict=True)]


def _by_cluster(
    values: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values and their number in each cluster."""
    places: dict[Hashable, int] = {}
    index = [places.setdefault(c, len(places)) for c in clusters]
    if len(index) != len(values) or not index:
        raise ValueError(f"{len(values)} values, {len(index)} clusters.")
    return np.bincount(index, weights=values), np.bincount(index)

"""Uncertainty of accuracies and of differences between models that answer the same questions."""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist


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


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
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
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    discordant = only_first + only_second
    tail = sum(math.comb(discordant, i) for i in range(min(only_first, only_second) + 1))
    # Integers of any size divide exactly, where 2.0 ** discordant would overflow.
    return PairedTest(only_first, only_second, min(1.0, 2 * tail / 2**discordant))


def clustered_difference(
    first: Sequence[bool],
    second: Sequence[bool],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """Bootstrap interval (percentile) of ``accuracy(first) - accuracy(second)`` over clusters.

    Questions about one image tend to stand or fall together, which McNemar's test ignores;
    resampling whole images keeps that dependence.

    Args:
        first: For each question, whether the first model is right.
        second: The same for the second model, in the same order.
        clusters: For each question, what it shares with others, such as its image.
        seed: Seed of the resampling.
        resamples: Number of bootstrap samples.
        confidence: Share of the samples inside the interval.
    """
    gains: dict[Hashable, tuple[int, int]] = {}
    for a, b, cluster in zip(first, second, clusters, strict=True):
        gain, size = gains.get(cluster, (0, 0))
        gains[cluster] = (gain + int(a) - int(b), size + 1)
    groups = list(gains.values())
    draw = random.Random(seed)
    means = []
    for _ in range(resamples):
        sample = draw.choices(groups, k=len(groups))
        means.append(sum(gain for gain, _ in sample) / sum(size for _, size in sample))
    means.sort()
    cut = round((1 - confidence) / 2 * (resamples - 1))
    return Interval(means[cut], means[-1 - cut])

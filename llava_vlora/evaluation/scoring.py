"""Accuracies of answer files and tests between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ..sceneqa import score
from .files import Question
from .statistics import Interval, PairedTest, clustered_difference, mcnemar_exact, wilson_interval

OVERALL = "overall"


@dataclass(frozen=True)
class Accuracy:
    """Exact matches among the questions of one category."""

    correct: int
    total: int
    interval: Interval
    """Wilson, 95 %."""

    @property
    def share(self) -> float:
        """The accuracy as a fraction of one."""
        return self.correct / self.total


@dataclass(frozen=True)
class Comparison:
    """Two models on the same questions."""

    first: str
    second: str
    difference: float
    """Accuracy of the first minus accuracy of the second."""
    interval: Interval
    """95 % of the difference, by resampling images."""
    test: PairedTest


def is_correct(labels: Sequence[str], texts: Sequence[str]) -> list[bool]:
    """For each answer, whether it is the label apart from case and punctuation."""
    return [score(text, label) for text, label in zip(texts, labels, strict=True)]


def accuracies(questions: Sequence[Question], hits: Sequence[bool]) -> dict[str, Accuracy]:
    """Accuracy of every category in order of appearance, and of all questions."""
    groups: dict[str, list[bool]] = {}
    for question, hit in zip(questions, hits, strict=True):
        groups.setdefault(question.category, []).append(hit)
    groups[OVERALL] = list(hits)
    return {
        name: Accuracy(sum(group), len(group), wilson_interval(sum(group), len(group)))
        for name, group in groups.items()
    }


def comparisons(
    questions: Sequence[Question], hits: Mapping[str, Sequence[bool]], *, seed: int
) -> list[Comparison]:
    """Every pair of models on all questions."""
    images = [question.image for question in questions]
    found = []
    for first, second in combinations(hits, 2):
        a, b = hits[first], hits[second]
        interval = clustered_difference(a, b, images, seed=seed)
        difference = (sum(a) - sum(b)) / len(a)
        found.append(Comparison(first, second, difference, interval, mcnemar_exact(a, b)))
    return found

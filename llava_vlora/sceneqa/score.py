"""Scoring of SceneQA answers and the level that is reached without looking at the image."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_vlora.sceneqa.questions import Question
from llava_vlora.sceneqa.sizes import CATEGORIES, SceneQAError


@dataclass(frozen=True)
class BlindLevel:
    """What a model without the image reaches in one category (fractions of 1).

    Attributes:
        questions: number of test questions.
        chance: expected accuracy of a uniform guess among the answers that the form of the question
            leaves open: two for "left or right of", four for "where is".
        majority: accuracy of always giving the most frequent test answer.
        prior: accuracy of giving, to every question text, the answer that the training set gives
            most often; the strongest blind answer there is.
    """

    questions: int
    chance: float
    majority: float
    prior: float


def _normalise(text: str) -> str:
    """Lower case, punctuation dropped, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def score(prediction: str, label: str) -> bool:
    """Whether a prediction is the label, apart from case, punctuation and spacing."""
    return _normalise(prediction) == _normalise(label)


def blind_levels(train: Sequence[Question], test: Sequence[Question]) -> dict[str, BlindLevel]:
    """Measures, per category, what is reached from the questions and the answer statistics.

    Raises:
        SceneQAError: if a category is asked about that no training question has.
    """
    return group_levels(train, {c: [q for q in test if q.category == c] for c in CATEGORIES})


def group_levels(
    train: Sequence[Question], groups: Mapping[str, Sequence[Question]]
) -> dict[str, BlindLevel]:
    """Measures as :func:`blind_levels` does, per group of test questions of any categories."""
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_category: dict[str, Counter[str]] = defaultdict(Counter)
    by_form: dict[tuple[str, str], set[str]] = defaultdict(set)
    for question in train:
        by_form[question.category, question.template].add(question.answer)
        by_text[question.text][question.answer] += 1
        by_category[question.category][question.answer] += 1
    levels = {}
    for group, asked in groups.items():
        if not asked:
            continue
        for category in dict.fromkeys(q.category for q in asked):
            if not by_category[category]:
                raise SceneQAError(
                    f"no training question is about {category}, so its chance level is unknown; "
                    "write more training scenes"
                )
        guesses = [(by_text[q.text] or by_category[q.category]).most_common(1)[0][0] for q in asked]
        most = Counter(q.answer for q in asked).most_common(1)[0][1]
        levels[group] = BlindLevel(
            questions=len(asked),
            chance=sum(
                1 / len(by_form[q.category, q.template] or by_category[q.category]) for q in asked
            )
            / len(asked),
            majority=most / len(asked),
            prior=sum(g == q.answer for g, q in zip(guesses, asked, strict=True)) / len(asked),
        )
    return levels

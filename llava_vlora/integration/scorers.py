"""What LLaVA ships for scoring."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator


@functools.cache
def _evaluator() -> Any:
    return TextVQAAccuracyEvaluator()


def text_vqa_credit(text: str, answers: Sequence[str]) -> float:
    """What TextVQA gives an answer, from 0 to 1.

    Args:
        text: The model's answer.
        answers: Those of ten people.
    """
    evaluator = _evaluator()
    scores = evaluator._compute_answer_scores(answers)
    return float(scores.get(evaluator.answer_processor(text), 0.0))


def vqa_normalised(text: str) -> str:
    """An answer as VQA's servers want it: lower case, without articles and punctuation, numbers as digits."""
    return str(_evaluator().answer_processor(text))

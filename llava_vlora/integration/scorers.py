"""What LLaVA ships for scoring."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from llava.eval.m4c_evaluator import TextVQAAccuracyEvaluator

from ..errors import ConfigError


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


def run_scorer(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one of the scoring scripts in ``llava/eval`` as LLaVA ships it; whoever calls looks how it ended."""
    spec = importlib.util.find_spec(f"llava.eval.{name}")
    if spec is None or spec.origin is None:
        raise ConfigError(f"This LLaVA has no scorer llava.eval.{name}.")
    command = [sys.executable, spec.origin, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)

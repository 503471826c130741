"""LLaVA's own POPE scorer, run as LLaVA ships it.

It pairs answers and labels by position and divides by zero for a model that never says yes. So it is
given pairs, and that division becomes a result.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import VLoRAError
from .files import write_rows

_COUNTS = re.compile(r"^TP\tFP\tTN\tFN\t?\n(\d+)\t(\d+)\t(\d+)\t(\d+)$", re.MULTILINE)
_VALUE = re.compile(r"^(Accuracy|Precision|Recall|F1 score|Yes ratio): (\S+)$", re.MULTILINE)


class ScorerError(VLoRAError, RuntimeError):
    """LLaVA's scorer failed."""


@dataclass(frozen=True)
class PopeScore:
    """What the scorer prints; None where it divides by zero."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int
    accuracy: float
    precision: float | None
    recall: float | None
    f1: float | None
    yes_ratio: float


def pope_score(labels: Sequence[str], texts: Sequence[str]) -> PopeScore:
    """Score answers beside their labels.

    Args:
        labels: ``yes`` or ``no`` for each question.
        texts: Answers in the same order.

    Raises:
        ScorerError: The scorer fails for another reason than a model that never says yes.
    """
    from ..integration.scorers import run_scorer

    pairs = list(zip(labels, texts, strict=True))
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "labels" / "coco_pope_all.json", [{"label": x} for x, _ in pairs])
        ids = [{"question_id": i, "category": "all"} for i in range(len(pairs))]
        write_rows(folder / "questions.jsonl", ids)
        answers = [{"question_id": i, "text": text} for i, (_, text) in enumerate(pairs)]
        write_rows(folder / "answers.jsonl", answers)
        flags = ["--annotation-dir", folder / "labels", "--question-file"]
        flags += [folder / "questions.jsonl", "--result-file", folder / "answers.jsonl"]
        done = run_scorer("eval_pope", *flags)
    if done.returncode and "ZeroDivisionError" not in done.stderr:
        raise ScorerError(f"llava.eval.eval_pope failed:\n{done.stderr[-2000:]}")
    return parse_pope(done.stdout)


def parse_pope(output: str) -> PopeScore:
    """Read the scorer's output, which ends after the counts if a division by zero stopped it.

    Raises:
        ScorerError: There are no counts.
    """
    counts = _COUNTS.search(output)
    if counts is None:
        raise ScorerError(f"llava.eval.eval_pope printed no counts, but:\n{output[-2000:]}")
    tp, fp, tn, fn = (int(n) for n in counts.groups())
    printed = {name: float(value) for name, value in _VALUE.findall(output)}
    total = tp + fp + tn + fn
    return PopeScore(
        true_positive=tp,
        false_positive=fp,
        true_negative=tn,
        false_negative=fn,
        accuracy=printed.get("Accuracy", (tp + tn) / total),
        precision=printed.get("Precision"),
        recall=printed.get("Recall"),
        f1=printed.get("F1 score"),
        yes_ratio=printed.get("Yes ratio", (tp + fp) / total),
    )

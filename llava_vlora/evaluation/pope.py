"""LLaVA's own POPE scorer, run as LLaVA ships it.

It pairs answers and labels by position and divides by zero for a model that never says yes. So the
answers are checked and put in order first, and that division becomes a result.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ..errors import VLoRAError
from .files import read_answers, read_rows

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


def pope_score(questions: Path, annotations: Path, answers: Path) -> PopeScore:
    """Score the answers to the questions of one POPE category.

    Args:
        questions: POPE's question file.
        annotations: Folder with one ``coco_pope_<category>.json`` of labels.
        answers: Answer file with at least the answers to these questions, in any order.

    Raises:
        DataError: A question has no answer.
        ScorerError: The scorer fails for another reason than a model that never says yes.
    """
    labels = read_rows(next(iter(sorted(annotations.glob("*.json")))), ("question_id", "label"))
    rows = read_answers(answers, [row["question_id"] for row in labels], others=True)
    with TemporaryDirectory() as folder:
        ordered = Path(folder) / "answers.jsonl"
        ordered.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        module = "llava.eval.eval_pope"
        command = [sys.executable, "-m", "llava_vlora.run", module]
        command += ["--annotation-dir", str(annotations), "--question-file", str(questions)]
        command += ["--result-file", str(ordered)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "ZeroDivisionError" not in done.stderr:
        raise ScorerError(f"{module} failed on {answers}:\n{done.stderr[-2000:]}")
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

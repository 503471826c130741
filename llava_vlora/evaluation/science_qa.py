"""LLaVA's own ScienceQA scorer, run as LLaVA ships it.

It counts a lost answer as wrong and divides by zero where no question has an image. So it is given one answer for each
question, and asked for single questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from .files import read_json, write_json, write_rows
from .pope import ScorerError


def science_qa_credit(
    truths: Mapping[str, tuple[int, int]], texts: Mapping[str, str]
) -> dict[str, float]:
    """1 for each right answer, 0 for each wrong one.

    Args:
        truths: Index of the right choice and number of choices, by question.
        texts: Answers by question.

    Raises:
        ScorerError: The scorer failed.
    """
    from ..integration.scorers import run_scorer

    with TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "pid_splits.json", {"test": list(truths)})
        problems = {i: {"answer": a, "choices": ["?"] * n} for i, (a, n) in truths.items()}
        write_json(folder / "problems.json", problems)
        # The prompt tells the scorer which questions have an image; without any it fails.
        rows = [{"question_id": i, "text": texts[i], "prompt": "<image>"} for i in truths]
        write_rows(folder / "answers.jsonl", rows)
        flags = ["--base-dir", folder, "--result-file", folder / "answers.jsonl"]
        flags += ["--output-file", folder / "out.json", "--output-result", folder / "sums.json"]
        done = run_scorer("eval_science_qa", *flags)
        if done.returncode:
            raise ScorerError(f"llava.eval.eval_science_qa failed:\n{done.stderr[-2000:]}")
        found = read_json(folder / "out.json")
    right = {row["question_id"] for row in found["correct"]}
    return {i: float(i in right) for i in truths}

"""ScienceQA: school questions with choices; about half of the test split has an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluation.science_qa import science_qa_credit
from .base import (
    Benchmark,
    Figure,
    FilePicture,
    Id,
    Need,
    Sample,
    Score,
    by_category,
    percent,
    weighted,
)
from .tables import Row, distinct, json_file

_QUESTIONS = "llava_test_CQM-A.json"
_ASK = "Answer with the option's letter from the given choices directly."


class ScienceQA(Benchmark):
    """LLaVA's layout; its prompt asks for the letter."""

    name = "scienceqa"
    title = "ScienceQA"
    citation = "arXiv 2209.09513; scored by LLaVA's own llava/eval/eval_science_qa.py"
    folder = "scienceqa"
    max_new_tokens = 1024
    needs = (
        Need(_QUESTIONS, "LLaVA's questions", "eval.zip of LLaVA's docs/Evaluation.md", 4241),
        Need("problems.json", "answers", "github.com/lupantech/ScienceQA, data/scienceqa", 21208),
        Need("pid_splits.json", "splits", "github.com/lupantech/ScienceQA, data/scienceqa"),
        Need("images/test", "images of the test split", "ScienceQA's README, test.zip"),
    )

    def read(self, root: Path) -> list[Sample]:
        """The test split, with and without images."""
        here = root / self.folder
        problems = json_file(here / "problems.json", self.needs[1].what)
        split = json_file(here / "pid_splits.json", self.needs[2].what)["test"]
        path = here / _QUESTIONS
        rows = [
            Row(values, f"{path}, question {i}")
            for i, values in enumerate(json_file(path, self.needs[0].what))
        ]
        distinct(rows, "id")
        asked = {str(row["id"]) for row in rows}
        if asked != set(map(str, split)):
            raise DataError(
                f"{path} and the test split of {here / 'pid_splits.json'} have other questions: "
                f"{len(asked - set(split))} and {len(set(split) - asked)} of their own."
            )
        return [self._sample(row, problems, here) for row in rows]

    def _sample(self, row: Row, problems: Mapping[str, Any], here: Path) -> Sample:
        problem = problems.get(str(row["id"]))
        if problem is None:
            raise DataError(f"{row.place} (id {row['id']!r}) is not in problems.json.")
        image = row.values.get("image")
        text = row["conversations"][0]["value"].replace("<image>", "").strip()
        # LLaVA's file of answers keeps the slot in the prompt, by which its scorer tells questions with an image.
        slot = "<image>\n" if image else ""
        return Sample(
            row["id"],
            f"{text}\n{_ASK}",
            FilePicture(here / "images" / "test" / image) if image else None,
            str(problem.get("subject", "")),
            (problem["answer"], len(problem["choices"])),
            written=f"{slot}{text}\n{_ASK}",
        )

    def headline(self, samples: Sequence[Sample], credit: Mapping[Id, float]) -> Figure:
        """Accuracy of the questions with an image."""
        seen = [s for s in samples if s.image is not None]
        return lambda weights: weighted(seen, credit, weights)

    def expected(self, sample: Sample) -> str:
        """The right answer."""
        return "ABCDE"[sample.reference[0]]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Accuracy of the questions with an image, and of all, in percent."""
        truths = {str(s.id): s.reference for s in samples}
        found = science_qa_credit(truths, {str(s.id): answers[s.id] for s in samples})
        credit = {s.id: found[str(s.id)] for s in samples}
        seen = [s for s in samples if s.image is not None]
        metrics = {"IMG accuracy": percent(seen, credit), "accuracy": percent(samples, credit)}
        return Score(metrics, credit, by_category(samples, credit))

    def chance(self, samples: Sequence[Sample]) -> float:
        """Mean of 1 / choices over the questions with an image."""
        seen = [s for s in samples if s.image is not None]
        return float(100 * sum(1 / s.reference[1] for s in seen) / len(seen)) if seen else 0.0

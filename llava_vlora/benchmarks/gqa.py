"""GQA: questions made from scene graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .base import Id, Need, Sample, Score, by_category, percent
from .question_files import EVAL_ZIP, QuestionFile
from .tables import Row, json_file


class GQA(QuestionFile):
    """Test-dev, balanced."""

    name = "gqa"
    title = "GQA test-dev, balanced"
    citation = "arXiv 1902.09506; exact match, as in its eval.py after LLaVA's conversion"
    folder = "gqa"
    questions = "llava_gqa_testdev_balanced.jsonl"
    images = "data/images"
    _truth = "testdev_balanced_questions.json"
    needs = (
        Need(questions, "LLaVA's questions", EVAL_ZIP, 12578),
        Need(f"data/{_truth}", "answers", "cs.stanford.edu/people/dorarad/gqa, questions", 12578),
        Need(images, "images", "cs.stanford.edu/people/dorarad/gqa, images"),
    )

    def read(self, root: Path) -> list[Sample]:
        """The questions with their answers, which LLaVA's users have in one of two folders."""
        data = root / self.folder / "data"
        places = [data / self._truth, data / "questions1.2" / self._truth]
        found = next((path for path in places if path.is_file()), places[0])
        self._answers, self._file = json_file(found, self.needs[1].what), found
        return super().read(root)

    def reference(self, row: Row, here: Path) -> tuple[str, Any]:
        """Structural type and answer."""
        truth = self._answers.get(str(row["question_id"]))
        if truth is None:
            raise DataError(f"{row.place} asks {row['question_id']!r}, which {self._file} lacks.")
        return truth.get("types", {}).get("structural", ""), truth["answer"]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Accuracy in percent."""
        credit = {s.id: float(answers[s.id].rstrip(".").lower() == s.reference) for s in samples}
        return Score({"accuracy": percent(samples, credit)}, credit, by_category(samples, credit))

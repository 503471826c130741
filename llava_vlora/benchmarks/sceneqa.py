"""SceneQA: the rendered questions of this package, in the folder that its writer makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..sceneqa import dataset_files
from ..sceneqa import score as is_right
from .base import Id, Need, Sample, Score, by_category, percent
from .question_files import QuestionFile
from .tables import Row, distinct, json_file, json_lines

_FILES = dataset_files(Path())
_SOURCE = "llava_vlora.sceneqa.write_dataset; `llava-vlora demo` leaves one in its output folder"


class SceneQA(QuestionFile):
    """The held-out scenes; how many there are is up to whoever wrote them."""

    name = "sceneqa"
    title = "SceneQA"
    citation = "this package, llava_vlora/sceneqa; exact match apart from case and punctuation"
    folder = "sceneqa"
    questions = str(_FILES.test_questions)
    images = str(_FILES.image_folder)
    max_new_tokens = 16
    needs = (
        Need(questions, "questions", _SOURCE),
        Need(str(_FILES.test_answers), "answers", _SOURCE),
        Need(str(_FILES.statistics), "chance levels", _SOURCE),
        Need(images, "images", _SOURCE),
    )

    def read(self, root: Path) -> list[Sample]:
        """The questions, each about an object of a scene, with their labels."""
        files = dataset_files(root / self.folder)
        keys = ("question_id", "label", "category")
        rows = json_lines(files.test_answers, keys, self.needs[1].what)
        distinct(rows, "question_id")
        self._labels = {row["question_id"]: row for row in rows}
        blind = json_file(files.statistics, self.needs[2].what)["blind"]
        self._chance = {category: level["chance"] for category, level in blind.items()}
        samples = super().read(root)
        if len(samples) != len(rows):
            raise DataError(
                f"{files.test_answers} has {len(rows)} labels, {files.test_questions} {len(samples)} questions."
            )
        return samples

    def reference(self, row: Row, here: Path) -> tuple[str, Any]:
        """Category and label."""
        label = self._labels.get(row["question_id"])
        if label is None:
            raise DataError(f"{row.place} asks {row['question_id']!r}, which has no label.")
        if label["category"] not in self._chance:
            raise DataError(f"{label.place}: {label['category']!r} is no category of the data set.")
        return label["category"], label["label"]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Accuracy in percent."""
        credit = {s.id: float(is_right(answers[s.id], s.reference)) for s in samples}
        return Score({"accuracy": percent(samples, credit)}, credit, by_category(samples, credit))

    def chance(self, samples: Sequence[Sample]) -> float:
        """A guess among the answers that the form of each question leaves open, as the writer measured it."""
        asked = Counter(s.category for s in samples)
        return float(100 * sum(self._chance[c] * n for c, n in asked.items()) / len(samples))

"""SceneQA: the rendered questions of this package and its hard test, in the folder that its writer makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..sceneqa import dataset_files, hard_files
from ..sceneqa import score as is_right
from .base import Id, Need, Sample, Score, by_category, percent
from .question_files import QuestionFile
from .tables import Row, distinct, json_file, json_lines

_FILES = dataset_files(Path())
_HARD = hard_files(Path())
_SOURCE = "llava_vlora.sceneqa.write_dataset; `llava-vlora demo` leaves one in its output folder"


def _needs(questions: Path, answers: Path, source: str) -> tuple[Need, ...]:
    return (
        Need(str(questions), "questions", source),
        Need(str(answers), "answers", source),
        Need(str(_FILES.statistics), "chance levels", source),
        Need(str(_FILES.image_folder), "images", source),
    )


class SceneQA(QuestionFile):
    """The held-out scenes; how many there are is up to whoever wrote them."""

    name = "sceneqa"
    title = "SceneQA"
    citation = "this package, llava_vlora/sceneqa; exact match apart from case and punctuation"
    folder = "sceneqa"
    questions = str(_FILES.test_questions)
    images = str(_FILES.image_folder)
    max_new_tokens = 16
    needs = _needs(_FILES.test_questions, _FILES.test_answers, _SOURCE)

    def read(self, root: Path) -> list[Sample]:
        """The questions, each about an object of a scene, with their labels."""
        here = root / self.folder
        file, keys = here / self.needs[1].path, ("question_id", "label", "category")
        rows = json_lines(file, keys, self.needs[1].what)
        distinct(rows, "question_id")
        self._labels = {row["question_id"]: row for row in rows}
        blind = self.blind(json_file(here / self.needs[2].path, self.needs[2].what))
        self._chance = {category: level["chance"] for category, level in blind.items()}
        samples = super().read(root)
        if len(samples) != len(rows):
            raise DataError(
                f"{file} has {len(rows)} labels, {here / self.questions} {len(samples)} questions."
            )
        return samples

    def blind(self, statistics: Any) -> Any:
        """The levels without images among the statistics that the writer left."""
        return statistics["blind"]

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


class SceneQAHard(SceneQA):
    """Free positions, two-step relations and small digits, on scenes that no other test has."""

    name = "sceneqa-hard"
    title = "SceneQA hard"
    questions = str(_HARD.questions)
    needs = _needs(
        _HARD.questions,
        _HARD.answers,
        "llava_vlora.sceneqa.write_dataset, of a size with free positions such as small-free",
    )

    def blind(self, statistics: Any) -> Any:
        """Those of the hard categories."""
        return statistics["hard"]["blind"]

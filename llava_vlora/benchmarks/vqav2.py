"""VQAv2: short answers to questions about MSCOCO images; the server scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .base import Id, Need, Sample
from .question_files import EVAL_ZIP, ScoredElsewhere
from .tables import json_lines


class VQAv2(ScoredElsewhere):
    """Test-dev 2015."""

    name = "vqav2"
    title = "VQAv2 test-dev"
    citation = "arXiv 1612.00837"
    folder = "vqav2"
    questions = "llava_vqav2_mscoco_test-dev2015.jsonl"
    images = "test2015"
    where = "submit the upload file at eval.ai, challenge 830"
    _all = "llava_vqav2_mscoco_test2015.jsonl"
    needs = (
        Need(questions, "LLaVA's questions", EVAL_ZIP, 107394),
        Need(_all, "all questions of the test split, for the upload", EVAL_ZIP, 447793),
        Need(images, "images", "images.cocodataset.org/zips/test2015.zip", 81434),
    )

    def read(self, root: Path) -> list[Sample]:
        """The questions; the server wants a row for each of the larger test split too."""
        self._split = [
            row["question_id"]
            for row in json_lines(
                root / self.folder / self._all, ("question_id",), self.needs[1].what
            )
        ]
        return super().read(root)

    def upload(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> object:
        """Normalised answers, empty ones for what is not of test-dev."""
        from ..integration.scorers import vqa_normalised

        return [
            {"question_id": i, "answer": vqa_normalised(answers[i]) if i in answers else ""}
            for i in self._split
        ]

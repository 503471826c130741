"""SEED-Bench: multiple choice about images and the middle frames of videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .base import Id, Need, Sample, Score, by_category, percent
from .question_files import EVAL_ZIP, QuestionFile
from .tables import Row, json_file


class SeedBench(QuestionFile):
    """Questions about images and about the middle frames of videos."""

    name = "seed"
    title = "SEED-Bench"
    citation = "arXiv 2307.16125; the letter, as in LLaVA's convert_seed_for_submission.py"
    folder = "seed_bench"
    questions = "llava-seed-bench.jsonl"
    images = "."
    needs = (
        Need(questions, "LLaVA's questions", EVAL_ZIP, 19242),
        Need("SEED-Bench.json", "answers", "the data set AILab-CVC/SEED-Bench", 19242),
        Need("SEED-Bench-image", "images", "AILab-CVC/SEED-Bench, DATASET.md"),
        Need("SEED-Bench-video-image", "frames of videos", "LLaVA's extract_video_frames.py"),
    )

    def read(self, root: Path) -> list[Sample]:
        """The questions with type, kind and letter."""
        truth = json_file(root / self.folder / "SEED-Bench.json", self.needs[1].what)
        self._kinds = {number: name for name, number in truth["question_type"].items()}
        self._known = {str(q["question_id"]): q for q in truth["questions"]}
        return super().read(root)

    def reference(self, row: Row, here: Path) -> tuple[str, Any]:
        """Type of question; letter, and whether it is about an image or a video."""
        known = self._known.get(str(row["question_id"]))
        if known is None:
            raise DataError(
                f"{row.place} asks {row['question_id']!r}, which SEED-Bench.json lacks."
            )
        return self._kinds[known["question_type_id"]], (known["answer"], known["data_type"])

    def expected(self, sample: Sample) -> str:
        """The right answer."""
        return str(sample.reference[0])

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Accuracy of all, of images and of videos, in percent."""
        credit = {s.id: float(answers[s.id] == s.reference[0]) for s in samples}
        metrics = {"accuracy": percent(samples, credit)}
        for kind in ("image", "video"):
            asked = [s for s in samples if s.reference[1] == kind]
            if asked:
                metrics[f"{kind} accuracy"] = percent(asked, credit)
        return Score(metrics, credit, by_category(samples, credit))

    def chance(self, samples: Sequence[Sample]) -> float:
        """One of four."""
        return 25.0

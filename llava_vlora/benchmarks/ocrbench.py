"""OCRBench: reading of text in ten tasks; an answer counts if a right one stands in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .base import Benchmark, Figure, Id, Sample, Score, percent, weighted
from .image_tables import answers_of, image_table, picture, vlmevalkit
from .tables import Row

_FORMULAS = "Handwritten Mathematical Expression Recognition"
#: Task -> group.
TASKS = {
    "Regular Text Recognition": "Text Recognition",
    "Irregular Text Recognition": "Text Recognition",
    "Artistic Text Recognition": "Text Recognition",
    "Handwriting Recognition": "Text Recognition",
    "Digit String Recognition": "Text Recognition",
    "Non-Semantic Text Recognition": "Text Recognition",
    "Scene Text-centric VQA": "Scene Text-centric VQA",
    "Doc-oriented VQA": "Doc-oriented VQA",
    "Key Information Extraction": "Key Information Extraction",
    _FORMULAS: _FORMULAS,
}
_ALL = 1000


class OCRBench(Benchmark):
    """VLMEvalKit's table with the prompt of OCRBench's own script for LLaVA-1.5."""

    name = "ocrbench"
    title = "OCRBench"
    citation = "arXiv 2305.07895; prompt and scores as in its scripts/LLaVA1_5.py"
    folder = "ocrbench"
    ask = "Answer the question using a single word or phrase."
    needs = (vlmevalkit("OCRBench.tsv", _ALL, "e953d98a987cc6e26ef717b61260b778"),)

    def read(self, root: Path) -> list[Sample]:
        """All rows."""
        need = self.needs[0]
        rows = image_table(root / self.folder / need.path, ("answer", "category"), need.what)
        return [self._sample(row, rows) for row in rows.values()]

    def _sample(self, row: Row, rows: Mapping[str, Row]) -> Sample:
        if row["category"] not in TASKS:
            raise DataError(f"{row.place}: {row['category']!r} is no task of OCRBench.")
        prompt = f"{row['question']}\n{self.ask}"
        return Sample(
            row["index"], prompt, picture(row, rows), row["category"], tuple(answers_of(row))
        )

    def headline(self, samples: Sequence[Sample], credit: Mapping[Id, float]) -> Figure:
        """Right answers of as many questions as were asked."""
        return lambda weights: len(samples) * weighted(samples, credit, weights) / 100

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Number of right answers, of 1000 in the whole set, and in percent; the number in each group and task."""
        credit = {s.id: float(_right(answers[s.id], s)) for s in samples}
        breakdown: dict[str, float] = {}
        for group in dict.fromkeys(TASKS.values()):
            for name in (group, *(task for task in TASKS if TASKS[task] == group)):
                asked = [s for s in samples if name in (s.category, TASKS[s.category])]
                if asked:
                    breakdown[name] = sum(credit[s.id] for s in asked)
        notes = () if len(samples) == _ALL else (f"{len(samples)} of {_ALL} questions were asked",)
        metrics = {"score": sum(credit.values()), "percent": percent(samples, credit)}
        return Score(metrics, credit, breakdown, notes)


def _right(text: str, sample: Sample) -> bool:
    if sample.category == _FORMULAS:  # case counts, white space does not
        said = text.replace("\n", "").replace(" ", "")
        return any(a.replace("\n", "").replace(" ", "") in said for a in sample.reference)
    said = _line(text)
    return any(_line(answer) in said for answer in sample.reference)


def _line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")

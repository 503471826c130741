"""Benchmarks of LLaVA's suite that are one question file and a folder of images."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.files import write_text
from .base import Benchmark, FilePicture, Id, Sample, Score
from .tables import Row, distinct, json_lines

EVAL_ZIP = "eval.zip of LLaVA's docs/Evaluation.md"


class QuestionFile(Benchmark):
    """Questions in LLaVA's JSON lines."""

    questions: str
    images: str

    def read(self, root: Path) -> list[Sample]:
        """The questions, each with what :meth:`reference` knows of it."""
        here = root / self.folder
        rows = json_lines(
            here / self.questions, ("question_id", "image", "text"), self.needs[0].what
        )
        distinct(rows, "question_id")
        return [
            Sample(
                row["question_id"],
                row["text"],
                FilePicture(here / self.images / row["image"]),
                *self.reference(row, here),
            )
            for row in rows
        ]

    @abstractmethod
    def reference(self, row: Row, here: Path) -> tuple[str, Any]:
        """Category and reference of a question."""


class ScoredElsewhere(QuestionFile):
    """Scored by a server or a judge."""

    where: str

    def reference(self, row: Row, here: Path) -> tuple[str, Any]:
        """The image's name, which VizWiz' server wants."""
        return str(row.values.get("category", "")), row["image"]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """No score: it is given elsewhere."""
        return Score({}, notes=(self.where,))

    def upload(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> object:
        """What the server or judge reads as JSON; None where LLaVA's answer file serves."""
        return None

    def export(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], folder: Path, model: str
    ) -> list[Path]:
        """Write the upload file, if there is one."""
        value, path = self.upload(samples, answers), folder / f"{model}.upload.json"
        if value is None:
            return []
        write_text(path, json.dumps(value))
        return [path]

"""Benchmarks of LLaVA's suite that are one question file, a folder of images, and answers or a server elsewhere."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError
from .base import Benchmark, FilePicture, Id, Need, Sample, Score
from .tables import Row, distinct, json_file, json_lines

_EVAL_ZIP = "eval.zip of LLaVA's docs/Evaluation.md"


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


class _Elsewhere(QuestionFile):
    """Scored by a server or a judge."""

    where: str

    def reference(self, row: Row, here: Path) -> tuple[str, Any]:
        """The image's name, which VizWiz' server wants."""
        return str(row.values.get("category", "")), row["image"]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """No score: it is given elsewhere."""
        return Score({}, notes=(self.where,))


class VQAv2(_Elsewhere):
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
        Need(questions, "LLaVA's questions", _EVAL_ZIP, 107394),
        Need(_all, "all questions of the test split, for the upload", _EVAL_ZIP, 447793),
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

    def export(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], folder: Path, model: str
    ) -> list[Path]:
        """Normalised answers, empty ones for what is not of test-dev."""
        from ..integration.scorers import vqa_normalised

        rows = [
            {"question_id": i, "answer": vqa_normalised(answers[i]) if i in answers else ""}
            for i in self._split
        ]
        return [_write(folder / f"{model}.upload.json", rows)]


class VizWiz(_Elsewhere):
    """The test split."""

    name = "vizwiz"
    title = "VizWiz test"
    citation = "arXiv 1802.08218"
    folder = "vizwiz"
    questions = "llava_test.jsonl"
    images = "test"
    where = "submit the upload file at eval.ai, challenge 2185"
    needs = (
        Need(questions, "LLaVA's questions", _EVAL_ZIP, 8000),
        Need(images, "images", "vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip", 8000),
    )

    def export(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], folder: Path, model: str
    ) -> list[Path]:
        """Normalised answers by image."""
        from ..integration.scorers import vqa_normalised

        rows = [{"image": s.reference, "answer": vqa_normalised(answers[s.id])} for s in samples]
        return [_write(folder / f"{model}.upload.json", rows)]


class MMVet(_Elsewhere):
    """Open questions, scored by GPT-4."""

    name = "mm-vet"
    title = "MM-Vet"
    citation = "arXiv 2308.02490"
    folder = "mm-vet"
    questions = "llava-mm-vet.jsonl"
    images = "images"
    max_new_tokens = 1024
    where = "give the upload file to MM-Vet's notebook, which asks GPT-4"
    needs = (
        Need(questions, "LLaVA's questions", _EVAL_ZIP, 218),
        Need(images, "images", "github.com/yuweihao/MM-Vet, mm-vet.zip", 200),
    )

    def export(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], folder: Path, model: str
    ) -> list[Path]:
        """Answers by the names of the notebook."""
        rows = {f"v1_{s.id}": answers[s.id] for s in samples}
        return [_write(folder / f"{model}.upload.json", rows)]


class LLaVABench(_Elsewhere):
    """Open questions in the wild; the judge reads LLaVA's answer file as it is."""

    name = "llava-bench"
    title = "LLaVA-Bench in the wild"
    citation = "arXiv 2304.08485"
    folder = "llava-bench-in-the-wild"
    questions = "questions.jsonl"
    images = "images"
    max_new_tokens = 1024
    where = "give the answer file to llava/eval/eval_gpt_review_bench.py, which asks GPT-4"
    needs = (
        Need(questions, "questions", "the data set liuhaotian/llava-bench-in-the-wild", 60),
        Need(images, "images", "the data set liuhaotian/llava-bench-in-the-wild", 24),
    )


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
        Need(questions, "LLaVA's questions", _EVAL_ZIP, 12578),
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
        return Score({"accuracy": _percent(samples, credit)}, credit, _by_category(samples, credit))


class SeedBench(QuestionFile):
    """Questions about images and about the middle frames of videos."""

    name = "seed"
    title = "SEED-Bench"
    citation = "arXiv 2307.16125; the letter, as in LLaVA's convert_seed_for_submission.py"
    folder = "seed_bench"
    questions = "llava-seed-bench.jsonl"
    images = "."
    needs = (
        Need(questions, "LLaVA's questions", _EVAL_ZIP, 19242),
        Need("SEED-Bench.json", "answers", "the data set AILab-CVC/SEED-Bench", 19242),
        Need("SEED-Bench-image", "images", "AILab-CVC/SEED-Bench, DATASET.md", 14233),
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

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Accuracy of all, of images and of videos, in percent."""
        credit = {s.id: float(answers[s.id] == s.reference[0]) for s in samples}
        metrics = {"accuracy": _percent(samples, credit)}
        for kind in ("image", "video"):
            asked = [s for s in samples if s.reference[1] == kind]
            if asked:
                metrics[f"{kind} accuracy"] = _percent(asked, credit)
        return Score(metrics, credit, _by_category(samples, credit))

    def chance(self, samples: Sequence[Sample]) -> float:
        """One of four."""
        return 25.0


def _percent(samples: Sequence[Sample], credit: Mapping[Id, float]) -> float:
    return 100 * sum(credit[s.id] for s in samples) / len(samples)


def _by_category(samples: Sequence[Sample], credit: Mapping[Id, float]) -> dict[str, float]:
    names = dict.fromkeys(s.category for s in samples if s.category)
    return {n: _percent([s for s in samples if s.category == n], credit) for n in names}


def _write(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path

"""MME: two yes-or-no questions about each image; ten tasks of perception and four of cognition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .base import Benchmark, Figure, FilePicture, Id, Need, Sample, Score, by_category, weighted
from .tables import json_lines, require

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
_QUESTIONS = "llava_mme.jsonl"
_IMAGES = "MME_Benchmark_release_version"
_ASK = "Answer the question using a single word or phrase."
_THEIRS = "Please answer yes or no."


class MME(Benchmark):
    """LLaVA's layout and prompt: the release's own request for yes or no is replaced by LLaVA's."""

    name = "mme"
    title = "MME"
    citation = "arXiv 2306.13394; scores as in its eval_tool/calculation.py"
    folder = "MME"
    needs = (
        Need(_QUESTIONS, "LLaVA's questions", "eval.zip of LLaVA's docs/Evaluation.md", 2374),
        Need(_IMAGES, "images and answers, by task", "github.com/BradyFU, branch Evaluation", 1187),
    )

    def read(self, root: Path) -> list[Sample]:
        """Questions with their answers, which stand in a text file beside each image."""
        here = root / self.folder
        rows = json_lines(
            here / _QUESTIONS, ("question_id", "image", "text", "category"), self.needs[0].what
        )
        samples, seen = [], dict[tuple[str, str], str]()
        truths: dict[Path, dict[str, bool]] = {}
        for number, row in enumerate(rows):
            if row["category"] not in PERCEPTION + COGNITION:
                raise DataError(f"{row.place}: {row['category']!r} is no task of MME.")
            question = _bare(row["text"])
            key = (row["image"], question)
            if key in seen:
                raise DataError(f"{row.place} asks the same as {seen[key]}.")
            seen[key] = row.place
            file = _answers_of(here / _IMAGES / row["image"])
            if file not in truths:
                truths[file] = _truths(file)
            if question not in truths[file]:
                raise DataError(f"{row.place} asks what {file} has no answer to: {question!r}.")
            samples.append(
                Sample(
                    f"{row['question_id']}/{number}",
                    row["text"],
                    FilePicture(here / _IMAGES / row["image"]),
                    row["category"],
                    (row["image"], truths[file][question]),
                    row_id=row["question_id"],
                )
            )
        several = Counter(sample.reference[0] for sample in samples)
        alone = next((image for image, count in several.items() if count != 2), None)
        if alone is not None:
            raise DataError(
                f"{here / _QUESTIONS} has {several[alone]} questions about {alone}, not two."
            )
        return samples

    def headline(self, samples: Sequence[Sample], credit: Mapping[Id, float]) -> Figure:
        """Perception."""
        tasks = []
        for task in (t for t in PERCEPTION if any(s.category == t for s in samples)):
            asked = [s for s in samples if s.category == task]
            right: dict[str, float] = {}
            for sample in asked:
                image = sample.reference[0]
                right[image] = min(right.get(image, 1.0), credit[sample.id])
            both = {s.id: right[s.reference[0]] for s in asked}
            tasks.append((asked, both))
        return lambda weights: sum(
            (weighted(a, credit, weights) + weighted(a, both, weights) for a, both in tasks), 0.0
        )

    def expected(self, sample: Sample) -> str:
        """The right answer."""
        return "yes" if sample.reference[1] else "no"

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Accuracy of questions plus that of images with both right, summed over tasks: up to 2000 and 800."""
        credit = {s.id: float(_said(answers[s.id]) == s.reference[1]) for s in samples}
        share = by_category(samples, credit)
        tasks: dict[str, float] = {}
        for task in dict.fromkeys(s.category for s in samples):
            asked = [s for s in samples if s.category == task]
            images: dict[str, list[float]] = {}
            for sample in asked:
                images.setdefault(sample.reference[0], []).append(credit[sample.id])
            both = sum(all(found) for found in images.values()) / len(images)
            tasks[task] = share[task] + 100 * both
        sums = [sum(tasks.get(t, 0.0) for t in group) for group in (PERCEPTION, COGNITION)]
        metrics = {"perception": sums[0], "cognition": sums[1], "sum": sum(sums)}
        absent = [t for t in PERCEPTION + COGNITION if t not in tasks]
        notes = (f"without the tasks {', '.join(absent)}",) if absent else ()
        return Score(metrics, credit, tasks, notes)

    def chance(self, samples: Sequence[Sample]) -> float:
        """Perception of a coin: 50 for questions and 25 for images in each task."""
        return 75.0 * len({s.category for s in samples} & set(PERCEPTION))


def _bare(text: str) -> str:
    return text.replace(_ASK, "").replace(_THEIRS, "").strip()


def _answers_of(image: Path) -> Path:
    """Most tasks have answers beside the images, some in a folder of their own."""
    if image.parent.name == "images":
        return image.parent.parent / "questions_answers_YN" / f"{image.stem}.txt"
    return image.with_suffix(".txt")


def _truths(file: Path) -> dict[str, bool]:
    found = {}
    text = require(file, "answers of MME").read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        question, tab, answer = line.strip().partition("\t")
        if not tab or answer.strip().lower() not in ("yes", "no"):
            raise DataError(f"{file}, line {number}: is no question, tab, Yes or No.")
        found[_bare(question)] = answer.strip().lower() == "yes"
    return found


def _said(text: str) -> bool | None:
    """The rule of MME's tool: yes or no at the beginning, else neither."""
    word = text.strip().lower()
    begin = word if word in ("yes", "no") else word[:4]
    return True if "yes" in begin else False if "no" in begin else None

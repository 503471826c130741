"""POPE: does an image show an object? Three splits of MSCOCO val2014."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from ..evaluation.pope import PopeScore, ScorerError, pope_score
from .base import Benchmark, Figure, FilePicture, Id, Need, Sample, Score
from .tables import Row, distinct, json_lines

_QUESTIONS = "llava_pope_test.jsonl"


class Pope(Benchmark):
    """LLaVA's layout: its question file, POPE's labels, COCO's images."""

    name = "pope"
    title = "POPE"
    citation = "arXiv 2305.10355; scored by LLaVA's own llava/eval/eval_pope.py"
    folder = "pope"
    needs = (
        Need(_QUESTIONS, "LLaVA's questions", "eval.zip of LLaVA's docs/Evaluation.md", 8910),
        Need(
            "coco",
            "labels, coco_pope_<split>.json",
            "github.com/AoiDragon/POPE, output/coco of commit e3e3926",
            3,
        ),
        Need("val2014", "images of MSCOCO", "images.cocodataset.org/zips/val2014.zip", 40504),
    )

    def read(self, root: Path) -> list[Sample]:
        """Questions with their labels, which stand in files of their own in the same order."""
        here = root / self.folder
        rows = json_lines(
            here / _QUESTIONS, ("question_id", "image", "text", "category"), self.needs[0].what
        )
        distinct(rows, "question_id")
        samples = []
        for split in dict.fromkeys(row["category"] for row in rows):
            asked = [row for row in rows if row["category"] == split]
            file = here / "coco" / f"coco_pope_{split}.json"
            labels = json_lines(file, ("image", "text", "label"), self.needs[1].what)
            if len(labels) != len(asked):
                raise DataError(
                    f"{file} has {len(labels)} labels, {here / _QUESTIONS} {len(asked)} questions of {split}."
                )
            samples += [
                self._sample(row, label, here) for row, label in zip(asked, labels, strict=True)
            ]
        order = {row["question_id"]: i for i, row in enumerate(rows)}
        return sorted(samples, key=lambda sample: order[sample.id])

    def _sample(self, row: Row, label: Row, here: Path) -> Sample:
        if label["image"] != row["image"] or not row["text"].startswith(label["text"]):
            raise DataError(f"{label.place} is the label of another question than {row.place}.")
        if label["label"] not in ("yes", "no"):
            raise DataError(f"{label.place}: the label {label['label']!r} is neither yes nor no.")
        picture = FilePicture(here / "val2014" / row["image"])
        return Sample(
            row["question_id"], row["text"], picture, row["category"], label["label"] == "yes"
        )

    def chance(self, samples: Sequence[Sample]) -> float:
        """F1 of a coin: half of what it calls yes is right, and it finds half of what is there."""
        return 50.0

    def headline(self, samples: Sequence[Sample], credit: Mapping[Id, float]) -> Figure:
        """Mean F1 of the splits."""
        splits: dict[str, tuple[list[Id], list[Id]]] = {}
        for s in samples:
            right, wrong = splits.setdefault(s.category, ([], []))
            if not credit[s.id]:
                wrong.append(s.id)
            elif s.reference:
                right.append(s.id)

        def figure(weights: Mapping[Id, float]) -> float:
            found = []
            for right, wrong in splits.values():
                hits, misses = (sum(weights[i] for i in ids) for ids in (right, wrong))
                found.append(100 * 2 * hits / (2 * hits + misses) if hits else 0.0)
            return sum(found) / len(found)

        return figure

    def expected(self, sample: Sample) -> str:
        """The right answer."""
        return "yes" if sample.reference else "no"

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """F1, accuracy and share of yes by split and their means, in percent."""
        credit = {s.id: float(says_yes(answers[s.id]) == s.reference) for s in samples}
        found: dict[str, dict[str, float]] = {}
        for split in dict.fromkeys(sample.category for sample in samples):
            asked = [s for s in samples if s.category == split]
            labels = ["yes" if s.reference else "no" for s in asked]
            score = pope_score(labels, [answers[s.id] for s in asked])
            if score.true_positive + score.true_negative != sum(credit[s.id] for s in asked):
                raise ScorerError(f"llava.eval.eval_pope reads answers of {split} in another way.")
            found[split] = _figures(score)
        names = ("F1", "accuracy", "precision", "recall", "yes")
        metrics = {n: sum(f[n] for f in found.values()) / len(found) for n in names}
        by_split = {f"{split}, {n}": f[n] for split, f in found.items() for n in names}
        return Score(metrics, credit, by_split)


def says_yes(text: str) -> bool:
    """The scorer's rule for one answer: yes unless its first sentence has a word of denial."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def _figures(score: PopeScore) -> dict[str, float]:
    """In percent; what the scorer would divide by zero for is 0."""
    return {
        "F1": 100 * (score.f1 or 0),
        "accuracy": 100 * score.accuracy,
        "precision": 100 * (score.precision or 0),
        "recall": 100 * (score.recall or 0),
        "yes": 100 * score.yes_ratio,
    }

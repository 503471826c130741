"""HallusionBench: yes-or-no questions about figures, altered figures, and without any figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..evaluation.files import require_keys
from .base import Benchmark, FilePicture, Id, Need, Sample, Score, by_category, percent
from .image_tables import image_table, picture, vlmevalkit
from .tables import Row, distinct, json_file

_KINDS = ("VD", "VS")
_RATES = ("aAcc", "fAcc", "qAcc")


@dataclass(frozen=True)
class Truth:
    """What an answer is compared with, and which ones stand or fall together."""

    yes: bool
    figure: str
    """All questions about one figure make one of fAcc."""
    question: str
    """One question about all figures of a set makes one of qAcc."""


class HallusionBench(Benchmark):
    """VLMEvalKit's table, by which the VLoRA paper (arXiv 2405.20339) reports the mean of three rates.

    The prompt is the bare question and an answer may be as long as there.
    """

    name = "hallusionbench"
    title = "HallusionBench"
    citation = (
        "arXiv 2310.14566; rates as in its utils.py and VLMEvalKit's Hallusion_rating, yes or no found without asking "
        "a language model"
    )
    folder = "hallusionbench"
    max_new_tokens = 512
    needs: tuple[Need, ...] = (
        vlmevalkit("HallusionBench.tsv", None, "0c23ac0dc9ef46832d7a24504f2a0c7c"),
    )

    def read(self, root: Path) -> list[Sample]:
        """All rows; those of figure 0 of a visual supplement (VS) are asked without an image."""
        need = self.needs[0]
        keys = ("answer", "category", "l2-category")
        rows = image_table(root / self.folder / need.path, keys, need.what)
        samples = []
        for row in rows.values():
            # As in VD_illusion_1_0_2_3: kind, type, visual input, set, figure, question.
            parts = row["index"].split("_")
            if len(parts) != 6:
                raise DataError(f"{row.place}: the index {row['index']!r} has not six parts.")
            alone = row["category"] == "VS" and parts[4] == "0" and not row["image"]
            samples.append(
                Sample(
                    row["index"],
                    row["question"],
                    None if alone else picture(row, rows),
                    row["l2-category"],
                    _truth(row, row["answer"], ("No", "Yes"), [row["l2-category"], *parts[3:]]),
                )
            )
        return samples

    def expected(self, sample: Sample) -> str:
        """The right answer."""
        return "yes" if sample.reference.yes else "no"

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Accuracy of answers, of figures and of questions, and their mean, in percent.

        First of what is asked with an image, as VLMEvalKit and the VLoRA paper have it; then of all. To be uncertain
        without an image is right, as in HallusionBench's own scorer.
        """
        said = {s.id: says(answers[s.id]) for s in samples}
        credit = {
            s.id: float(said[s.id] == s.reference.yes or (said[s.id] is None and s.image is None))
            for s in samples
        }
        seen = [s for s in samples if s.image is not None]
        found = _rates(seen, credit)
        metrics = {"average": sum(found.values()) / len(found)} | found
        if len(seen) < len(samples):
            both = _rates(samples, credit)
            metrics |= {f"{name} with text-only": both[name] for name in ("aAcc", "qAcc")}
        breakdown: dict[str, float] = {}
        for kind in _KINDS:
            some = [s for s in seen if s.category.startswith(kind)]
            breakdown |= {f"{kind}, {name}": v for name, v in _rates(some, credit).items() if some}
        unclear = sum(said[s.id] is None for s in seen)
        note = f"no language model judges: {unclear} answers about an image are neither yes nor no and count as wrong"
        breakdown |= by_category(seen, credit)
        return Score(metrics, credit, breakdown, (note,))

    def chance(self, samples: Sequence[Sample]) -> float:
        """The mean of the three rates of a coin: a half, and what it gets of figures and questions by being lucky."""
        seen = [s for s in samples if s.image is not None]
        sizes = [[len(group) for group in groups.values()] for groups in _groups(seen)]
        lucky = [100 * sum(0.5**n for n in found) / len(found) for found in sizes if found]
        return sum((50.0, *lucky)) / (1 + len(lucky))


class HallusionBenchFiles(HallusionBench):
    """HallusionBench's own question file and figures; certain to have the questions without one."""

    name = "hallusionbench-json"
    title = "HallusionBench, its own files"
    needs = (
        Need(
            "HallusionBench.json",
            "questions and answers",
            "github.com/tianyi-lab/HallusionBench",
            1129,
        ),
        Need("hallusion_bench", "figures", "README of github.com/tianyi-lab/HallusionBench"),
    )

    def read(self, root: Path) -> list[Sample]:
        """All questions; ids are those of VLMEvalKit's table."""
        here = root / self.folder
        path = here / self.needs[0].path
        names = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id")
        rows = []
        for number, values in enumerate(json_file(path, self.needs[0].what)):
            place = f"{path}, question {number}"
            require_keys(values, (*names, "question", "gt_answer", "filename"), place)
            rows.append(Row(values | {"id": "_".join(values[n] for n in names)}, place))
        distinct(rows, "id")
        return [self._sample(row, here / self.needs[1].path) for row in rows]

    def _sample(self, row: Row, figures: Path) -> Sample:
        file = row["filename"]
        if not file and row["visual_input"] != "0":
            raise DataError(f"{row.place}: needs a figure, but names no file.")
        category = f"{row['category']}_{row['subcategory']}"
        parts = [category, row["set_id"], row["figure_id"], row["question_id"]]
        truth = _truth(row, row["gt_answer"], ("0", "1"), parts)
        image = FilePicture(figures / file) if file else None
        return Sample(row["id"], row["question"], image, category, truth)


def _truth(row: Row, answer: str, no_yes: tuple[str, str], parts: Sequence[str]) -> Truth:
    if row["category"] not in _KINDS:
        raise DataError(f"{row.place}: the category {row['category']!r} is none of {_KINDS}.")
    if answer not in no_yes:
        raise DataError(f"{row.place}: the answer {answer!r} is none of {no_yes}.")
    category, group, figure, question = parts
    return Truth(
        answer == no_yes[1], f"{category}_{group}_{figure}", f"{category}_{group}_{question}"
    )


def says(text: str) -> bool | None:
    """Yes or no, whichever of the two words an answer has; None if it has both or neither."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    return None if ("yes" in words) == ("no" in words) else "yes" in words


def _groups(samples: Sequence[Sample]) -> tuple[dict[str, list[Id]], dict[str, list[Id]]]:
    """Ids by figure and by question."""
    figures: dict[str, list[Id]] = {}
    questions: dict[str, list[Id]] = {}
    for sample in samples:
        figures.setdefault(sample.reference.figure, []).append(sample.id)
        questions.setdefault(sample.reference.question, []).append(sample.id)
    return figures, questions


def _rates(samples: Sequence[Sample], credit: Mapping[Id, float]) -> dict[str, float]:
    wholes = [
        100 * sum(all(credit[i] for i in ids) for ids in groups.values()) / max(len(groups), 1)
        for groups in _groups(samples)
    ]
    return dict(zip(_RATES, (percent(samples, credit), *wholes), strict=True))

"""MMMU: college questions of thirty subjects, most of them multiple choice."""

from __future__ import annotations

import base64
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluation.files import require_keys
from .base import Benchmark, EncodedPicture, Id, Need, Sample, Score, by_category, percent
from .choices import chosen
from .extra import extra
from .image_tables import answers_of, image_table, picture, strings, vlmevalkit
from .tables import Row, distinct, require

_LETTER = "Answer with the option's letter from the given choices directly."
_SHORT = "Answer the question using a single word or phrase."
_SPLIT = "validation"


@dataclass(frozen=True)
class Truth:
    """What an answer is compared with."""

    answers: tuple[str, ...]
    """A letter, or what an open question takes for right."""
    options: Mapping[str, str]
    """By letter; empty for an open question."""
    images: int
    """How many the question has; the first is shown."""


class MMMU(Benchmark):
    """The validation split in VLMEvalKit's table, with LLaVA's requests as in MMMU's configs/llava1.5.yaml.

    VLoRA and LLaVA-1.5 take one image: of several the first is shown, as in MMMU's run_llava.py, and the marks
    ``<image 1>`` stay in the text. For an answer that names no option MMMU's script draws a letter at random; here such
    an answer is wrong.
    """

    name = "mmmu"
    title = "MMMU val"
    citation = (
        "arXiv 2311.16502; open questions as in its eval_utils.py, a choice is inferred without "
        "asking a language model"
    )
    folder = "mmmu"
    needs: tuple[Need, ...] = (
        vlmevalkit(
            "MMMU_DEV_VAL.tsv",
            1050,
            "521afc0f3bf341e6654327792781644d",
            "585e8ad75e73f75dcad265dfd0417d64",  # with answers that were corrected later
        ),
    )

    def read(self, root: Path) -> list[Sample]:
        """The rows of the validation split; the table has the development split as well."""
        need = self.needs[0]
        path = root / self.folder / need.path
        rows = image_table(path, ("answer", "A", "l2-category", "split"), need.what)
        samples = []
        for row in rows.values():
            if row["split"] == _SPLIT:
                letters = (c for c in string.ascii_uppercase if row.values.get(c))
                options = {letter: row[letter] for letter in letters}
                images = len(strings(row["image"]))
                image = picture(row, rows)
                samples.append(
                    _sample(row, row["index"], options, image, images, row["l2-category"])
                )
        if not samples:
            raise DataError(f"{path} has no row whose split is {_SPLIT!r}.")
        return samples

    def expected(self, sample: Sample) -> str:
        """A letter, or what is taken for right."""
        return " or ".join(sample.reference.answers)

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Accuracy in percent, of all and of both kinds of questions."""
        credit = {s.id: float(_right(answers[s.id], s.reference)) for s in samples}
        metrics = {"accuracy": percent(samples, credit)}
        choices = [s for s in samples if s.reference.options]
        for name, some in (
            ("multiple choice", choices),
            ("open", [s for s in samples if not s.reference.options]),
        ):
            if some:
                metrics[f"{name} accuracy"] = percent(some, credit)
        several = sum(s.reference.images > 1 for s in samples)
        unclear = sum(chosen(answers[s.id], s.reference.options) is None for s in choices)
        notes = (
            *([f"{several} questions have several images: the first is shown"] if several else []),
            f"no language model judges: {unclear} answers name no option and count as wrong",
        )
        return Score(metrics, credit, by_category(samples, credit), notes)

    def chance(self, samples: Sequence[Sample]) -> float:
        """A letter drawn at random, and nothing for open questions."""
        sizes = [len(s.reference.options) for s in samples]
        return 100 * sum(1 / n for n in sizes if n) / len(sizes)


class MMMUFiles(MMMU):
    """MMMU's own files, one for each subject."""

    name = "mmmu-parquet"
    title = "MMMU val, its own files"
    needs = (
        Need("MMMU", "<subject>/validation-*.parquet of 30 subjects", "the data set MMMU/MMMU"),
    )

    def read(self, root: Path) -> list[Sample]:
        """The questions of all subjects."""
        folder = require(root / self.folder / self.needs[0].path, self.needs[0].what)
        files = sorted(folder.glob(f"*/{_SPLIT}-*.parquet"))
        if not files:
            raise DataError(f"{folder} has no {self.needs[0].what}.")
        found = [(file.parent.name, row) for file in files for row in _rows(file)]
        distinct([row for _, row in found], "id")
        samples = []
        for subject, row in found:
            options = dict(zip(string.ascii_uppercase, _options(row), strict=False))
            images = [row.values.get(f"image_{i}") for i in range(1, 8)]
            first = images[0]
            if not first:
                raise DataError(f"{row.place}: has no image.")
            image = EncodedPicture(base64.b64encode(first["bytes"]).decode(), row.place)
            number = sum(i is not None for i in images)
            samples.append(_sample(row, row["id"], options, image, number, subject))
        return samples


def _rows(path: Path) -> Iterator[Row]:
    parquet = extra("pyarrow.parquet", "MMMU's parquet files")
    try:
        found: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}.") from error
    for number, values in enumerate(found, start=1):
        place = f"{path}, row {number}"
        require_keys(values, ("id", "question", "options", "answer", "image_1"), place)
        yield Row(values, place)


def _options(row: Row) -> list[str]:
    return [] if row["options"] == "[]" else strings(row["options"])


def _sample(
    row: Row, name: str, options: dict[str, str], image: EncodedPicture, images: int, subject: str
) -> Sample:
    answers = answers_of(row)
    if options and answers[0] not in options:
        raise DataError(f"{row.place}: the answer {row['answer']!r} is none of {list(options)}.")
    lines = [row["question"], *(f"{letter}. {text}" for letter, text in options.items())]
    lines.append(_LETTER if options else _SHORT)
    truth = Truth(tuple(answers), options, images)
    return Sample(name, "\n".join(lines), image, subject, truth)


def _right(text: str, truth: Truth) -> bool:
    if truth.options:
        return chosen(text, truth.options) == truth.answers[0]
    return says(text, truth.answers)


# --- open questions ----------------------------------------------------------------------------------

#: What comes before the essential part of a line.
_BEFORE = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
#: Grouped by commas, with an exponent, plain; of a text in lower case.
_NUMBERS = [
    re.compile(f"-?{pattern}")
    for pattern in (
        r"\b\d{1,3}(?:,\d{3})+\b",
        r"\d+(?:\.\d+)?e[+-]?\d+",
        r"(?:\d*\.\d+|\d+\b)(?!e[+-]?\d|[,\d])",
    )
]


def says(text: str, answers: Sequence[str]) -> bool:
    """Whether a free answer has one of the right ones in its essential parts: MMMU's rule.

    A part is what follows the last "is", "answer" and the like in a line, or the whole text where no line has any.
    Numbers must be equal to two decimals; other answers must stand in a part, single letters beside a space.

    Args:
        text: The model's answer.
        answers: Any of which is right.
    """
    parts = _parts(text)
    numbers = [n for part in parts for pattern in _NUMBERS for n in pattern.findall(part)]
    said = [value for part in (*parts, *numbers) for value in _values(part)]
    right = [value for answer in answers for value in _values(answer)]
    words = [value for value in right if isinstance(value, str)]
    return any(
        any(word in value for word in words) if isinstance(value, str) else value in right
        for value in said
    )


def _parts(text: str) -> list[str]:
    whole = text.strip().strip(".").lower()
    lines = whole.split("\n")
    found = []
    for i, line in enumerate(lines):
        before = (*_BEFORE, "=") if i == len(lines) - 1 else _BEFORE
        shortest = ""
        for tail in (line.rpartition(word)[2].strip() for word in before if word in line):
            shortest = tail if not shortest else min(shortest, tail, key=len)
        if shortest.strip(":,.!?;'"):
            found.append(shortest)
    return found or [whole]


def _values(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]

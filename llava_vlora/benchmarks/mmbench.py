"""MMBench and CCBench: one table with images in its cells; a question counts if all orders of its options are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .base import (
    Benchmark,
    Id,
    Need,
    Sample,
    Score,
    by_category,
    percent,
)
from .choices import chosen
from .image_tables import image_table, picture, vlmevalkit
from .tables import Row
from .workbook import can_write, write_workbook

_LETTERS = "ABCD"
#: The same question with its options in another order has this much more in its index.
_CIRCLE = 1_000_000
#: LLaVA's convert_mmbench_for_submission.py leaves these out and puts the answers into the seventh column.
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION = 6


class MMBench(Benchmark):
    """The development split in English; its layout and prompt are LLaVA's."""

    name = "mmbench"
    title = "MMBench dev, English"
    citation = (
        "arXiv 2307.06281 (CircularEval); a choice is inferred without asking a language model"
    )
    folder = "mmbench"
    file = "mmbench_dev_20230712.tsv"
    ask = "Answer with the option's letter from the given choices directly."
    max_new_tokens = 1024
    needs: tuple[Need, ...] = (
        Need(
            file,
            "questions, images and answers",
            f"download.openmmlab.com/mmclassification/datasets/mmbench/{file}",
            4377,
        ),
    )

    def read(self, root: Path) -> list[Sample]:
        """All rows; those of one question have indices that differ by millions."""
        path = root / self.folder / self.file
        rows = image_table(path, ("A", "B"), self.needs[0].what)
        samples = [self._sample(row, rows) for row in rows.values()]
        if not all(s.reference[0] for s in samples):
            can_write(required=True)  # all that comes of it; better now than after all the answers
        self._columns = [name for name in next(iter(rows.values())).values if name not in _DROPPED]
        self._rows = [[row[name] for name in self._columns] for row in rows.values()]
        circles = _circles(samples)
        for circle in circles.values():
            texts = {frozenset(s.extra["options"]) for s in circle}
            if len(circle) > 1 and len(texts) > 1:
                raise DataError(
                    f"{path}: the rows {[s.id for s in circle]} have different options."
                )
        return samples

    def _sample(self, row: Row, rows: Mapping[str, Row]) -> Sample:
        if not row["index"].isdigit():
            raise DataError(f"{row.place}: the index {row['index']!r} is no number.")
        options: dict[str, str] = {}
        for letter in _LETTERS:
            text = row.values.get(letter, "")
            if _none(text):
                break
            options[letter] = text
        answer = row.values.get("answer", "")
        if answer and answer not in options:
            raise DataError(f"{row.place}: the answer {answer!r} is none of {list(options)}.")
        hint = row.values.get("hint", "")
        parts = [*([] if _none(hint) else [hint]), row["question"]]
        parts += [f"{letter}. {text}" for letter, text in options.items()]
        question = "\n".join(parts)
        return Sample(
            int(row["index"]),
            f"{question}\n{self.ask}",
            picture(row, rows),
            row.values.get("category", ""),
            (answer, options),
            written=question,  # LLaVA's answer files leave the request out
            extra={
                "round_id": 0,
                "options": list(options.values()),
                "option_char": list(options),
            },
        )

    def expected(self, sample: Sample) -> str:
        """Letter and text of the option."""
        return f"{sample.reference[0]}. {sample.reference[1].get(sample.reference[0], '')}"

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Share of questions that are right in every order, in percent; None of it without answers in the table."""
        if not all(s.reference[0] for s in samples):
            return Score({}, notes=("the table has no answers: submit the upload file",))
        said = {s.id: chosen(answers[s.id], s.reference[1]) for s in samples}
        right = {s.id: said[s.id] == s.reference[0] for s in samples}
        circles = _circles(samples)
        credit: dict[Id, float] = {
            circle[0].id: float(all(right[s.id] for s in circle)) for circle in circles.values()
        }
        first = [circle[0] for circle in circles.values()]
        name = "circular accuracy" if len(circles) < len(samples) else "accuracy"
        metrics = {name: percent(first, credit)}
        if len(circles) < len(samples):
            metrics["accuracy of rows"] = percent(samples, right)
        unclear = sum(letter is None for letter in said.values())
        notes = [f"{unclear} answers name no option and count as wrong"] if unclear else []
        if not can_write():
            notes.append("no upload file: it needs openpyxl, pip install llava-vlora[bench]")
        return Score(metrics, credit, by_category(first, credit), tuple(notes))

    def export(
        self, samples: Sequence[Sample], answers: Mapping[Id, str], folder: Path, model: str
    ) -> list[Path]:
        """The table with the answers as a workbook, which the server reads."""
        if not can_write():
            return []
        rows: list[list[str | int | None]] = []
        for cells in self._rows:
            row: list[str | int | None] = [None if _none(cell) else cell for cell in cells]
            index = self._columns.index("index")
            row[index] = int(cells[index])
            row.insert(_PREDICTION, answers.get(int(cells[index])))
            rows.append(row)
        header = [*self._columns]
        header.insert(_PREDICTION, "prediction")
        return [write_workbook(folder / f"{model}.upload.xlsx", [header, *rows])]

    def chance(self, samples: Sequence[Sample]) -> float:
        """A letter drawn at random for each row."""
        circles = _circles(samples).values()
        shares = [len(c[0].reference[1]) ** -float(len(c)) for c in circles]
        return float(100 * sum(shares) / len(shares))


class MMBenchChinese(MMBench):
    """The development split in Chinese, with LLaVA's Chinese request."""

    name = "mmbench-cn"
    title = "MMBench dev, Chinese"
    file = "mmbench_dev_cn_20231003.tsv"
    ask = "请直接回答选项字母。"
    needs = (
        Need(
            file,
            "questions, images and answers",
            f"download.openmmlab.com/mmclassification/datasets/mmbench/{file}",
            4329,
        ),
    )


class CCBench(MMBenchChinese):
    """Chinese culture, a table of the same makers; LLaVA has no recipe for it, so MMBench-CN's prompt is used."""

    name = "ccbench"
    title = "CCBench"
    folder = "ccbench"
    file = "CCBench.tsv"
    needs = (vlmevalkit(file, 2040, "1de88b4257e7eee3f60b18d45eda6f07"),)


def _none(text: str) -> bool:
    return text.strip().lower() in ("", "nan", "none")


def _circles(samples: Sequence[Sample]) -> dict[int, list[Sample]]:
    found: dict[int, list[Sample]] = {}
    for sample in samples:
        found.setdefault(int(sample.id) % _CIRCLE, []).append(sample)
    return found

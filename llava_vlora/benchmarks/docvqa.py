"""DocVQA: questions about scanned documents, scored by the edit distance to the nearest answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .base import Benchmark, Id, Need, Sample, Score, by_category, percent
from .image_tables import answers_of, image_table, picture, vlmevalkit

#: Less similar answers get nothing.
_THRESHOLD = 0.5


class DocVQA(Benchmark):
    """The validation split in VLMEvalKit's table, with LLaVA's request for a short answer."""

    name = "docvqa"
    title = "DocVQA val"
    citation = "arXiv 2007.00398; ANLS of arXiv 1907.00490, section 3, as lmms-eval computes it"
    folder = "docvqa"
    ask = "Answer the question using a single word or phrase."
    needs: tuple[Need, ...] = (
        vlmevalkit("DocVQA_VAL.tsv", 5349, "d5ee77e1926ff10690d469c56b73eabf"),
    )

    def read(self, root: Path) -> list[Sample]:
        """All rows; questions about one document share the image of a row."""
        need = self.needs[0]
        rows = image_table(root / self.folder / need.path, ("answer",), need.what)
        return [
            Sample(
                row["index"],
                f"{row['question']}\n{self.ask}",
                picture(row, rows),
                row.values.get("category", ""),
                answers_of(row),
            )
            for row in rows.values()
        ]

    def score(self, samples: Sequence[Sample], answers: Mapping[Id, str]) -> Score:
        """Mean similarity to the nearest answer, in percent."""
        credit = {s.id: anls(answers[s.id], s.reference) for s in samples}
        return Score({"ANLS": percent(samples, credit)}, credit, by_category(samples, credit))


def anls(text: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest answer, from 0 to 1; 0 below one half.

    Case and runs of white space do not count in the distance; the lengths that divide it are those of the texts as
    they are, as in the published scorers.

    Args:
        text: The model's answer.
        answers: Those of people, at least one.
    """
    best = max(1 - _distance(_plain(text), _plain(a)) / max(len(text), len(a), 1) for a in answers)
    return best if best >= _THRESHOLD else 0.0


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _distance(first: str, second: str) -> int:
    """Levenshtein distance, row by row of its table."""
    above = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        row = [i]
        for j, b in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (a != b)))
        above = row
    return above[-1]

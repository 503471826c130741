"""What ``llava-vlora eval`` and ``compare`` left in a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, listing
from ..evaluation.files import read_json, read_rows, require_keys

#: What a comparison adds to its folder.
PLAN, COMPARISON = "compare.json", "comparison.json"
_SCORE, _BLIND, _COST = ".score.json", ".blind", ".cost.json"
_KEYS = ("benchmark", "title", "model", "asking", "questions", "metrics", "samples", "chance")

_COST_KEYS = (
    "question",
    "convention",
    "sequence",
    "flops",
    "time",
    "parameters",
    "memory",
    "device",
)


@dataclass(frozen=True)
class Row:
    """One model with or without images: a row of every table."""

    model: str
    see: bool

    @property
    def label(self) -> str:
        """How tables call it."""
        return self.model if self.see else f"{self.model}, blind"

    @property
    def stem(self) -> str:
        """How its files begin."""
        return self.model if self.see else f"{self.model}{_BLIND}"


@dataclass(frozen=True)
class Results:
    """Scores of all rows on all benchmarks."""

    folder: Path
    rows: tuple[Row, ...]
    scores: dict[str, dict[Row, dict[str, Any]]]
    """By benchmark and row, what the score file says."""
    costs: dict[str, dict[str, Any]]
    """By model, where it was measured."""
    plan: dict[str, Any]
    """What ``compare`` was asked for; empty if the folder was filled by ``eval``."""

    def answers(self, benchmark: str, row: Row) -> dict[str, dict[str, Any]]:
        """Rows of the answer file by the question's unique name."""
        path = self.folder / benchmark / f"{row.stem}.jsonl"
        rows = read_rows(path, ("answer_id", "prompt", "text"))
        return {str(r["answer_id"]).removeprefix(f"{row.model}-"): r for r in rows}


def read_results(folder: Path) -> Results:
    """Read a run folder.

    Raises:
        DataError: There are no scores, a file is damaged, or models were asked different questions.
    """
    files = sorted(folder.glob(f"*/*{_SCORE}"))
    if not files:
        raise DataError(
            f"{folder} has no scores (<benchmark>/<model>{_SCORE}); make some with `llava-vlora eval --out {folder}`."
        )
    plan = read_json(folder / PLAN) if (folder / PLAN).is_file() else {}
    scores: dict[str, dict[Row, dict[str, Any]]] = {}
    for file in files:
        stated = read_json(file)
        require_keys(stated, _KEYS, str(file))
        stem = file.name.removesuffix(_SCORE)
        row = Row(stem.removesuffix(_BLIND), not stem.endswith(_BLIND))
        scores.setdefault(file.parent.name, {})[row] = stated
    for name, rows in scores.items():
        _same_questions(folder / name, rows)
    order = plan.get("models", [])
    found = sorted({row for rows in scores.values() for row in rows}, key=lambda r: _rank(r, order))
    asked = plan.get("benchmarks", [])
    names = sorted(scores, key=lambda n: (asked.index(n) if n in asked else len(asked), n))
    costs = {f.name.removesuffix(_COST): _cost(f) for f in sorted(folder.glob(f"*{_COST}"))}
    return Results(folder, tuple(found), {n: scores[n] for n in names}, costs, plan)


def _cost(file: Path) -> dict[str, Any]:
    cost: dict[str, Any] = read_json(file)
    require_keys(cost, _COST_KEYS, str(file))
    return cost


def _rank(row: Row, order: Sequence[str]) -> tuple[bool, int, str]:
    """Rows without images last, models in the order they were given."""
    place = order.index(row.model) if row.model in order else len(order)
    return not row.see, place, row.model


def _same_questions(folder: Path, rows: dict[Row, dict[str, Any]]) -> None:
    (first, one), *others = rows.items()
    asked = [sample["id"] for sample in one["samples"]]
    for row, stated in others:
        if stated["questions"] != one["questions"] or [s["id"] for s in stated["samples"]] != asked:
            raise DataError(
                f"{folder}: {listing([first.label, row.label])} were asked different questions "
                f"({one['questions']} and {stated['questions']}); run them with the same --limit and files."
            )
        if stated["metrics"].keys() != one["metrics"].keys():
            raise DataError(
                f"{folder}: {listing([first.label, row.label])} were scored by different versions; "
                "run both again, which keeps their answers."
            )

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
#: Names of models for people, by the names in files; a model without one is called as its files are.
TITLES = "titles.json"
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
    title: str = ""
    """The model's name for people, if it has one."""

    @property
    def name(self) -> str:
        """How tables call the model."""
        return self.title or self.model

    @property
    def label(self) -> str:
        """How tables call the row."""
        return self.name if self.see else f"{self.name}, blind"

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
    """By the model's name in tables, where it was measured."""
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
    plan, titles = (
        read_json(file) if file.is_file() else {} for file in (folder / PLAN, folder / TITLES)
    )
    scores: dict[str, dict[Row, dict[str, Any]]] = {}
    for file in files:
        stated = read_json(file)
        require_keys(stated, _KEYS, str(file))
        stem = file.name.removesuffix(_SCORE)
        model = stem.removesuffix(_BLIND)
        row = Row(model, not stem.endswith(_BLIND), titles.get(model, ""))
        scores.setdefault(file.parent.name, {})[row] = stated
    for name, rows in scores.items():
        _same_questions(folder / name, rows)
    order = plan.get("models", [])
    found = sorted({row for rows in scores.values() for row in rows}, key=lambda r: _rank(r, order))
    asked = plan.get("benchmarks", [])
    names = sorted(scores, key=lambda n: (asked.index(n) if n in asked else len(asked), n))
    measured = {f.name.removesuffix(_COST): _cost(f) for f in sorted(folder.glob(f"*{_COST}"))}
    costs = {titles.get(model, model): cost for model, cost in measured.items()}
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

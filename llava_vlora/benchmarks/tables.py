"""Reading of questions and annotations; every error names the file and the line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluation.files import read_json, read_lines, require_keys

csv.field_size_limit(1 << 30)  # images in base64 are cells


@dataclass(frozen=True)
class Row:
    """A row and where it stands."""

    values: dict[str, Any]
    place: str

    def __getitem__(self, key: str) -> Any:
        """A cell."""
        return self.values[key]


def require(path: Path, what: str) -> Path:
    """The path, which must be there.

    Raises:
        DataError: It is not; the message says what is missing.
    """
    if not path.exists():
        raise DataError(
            f"{path} is missing: {what}. `llava-vlora eval prepare` says where to get it."
        )
    return path


def json_lines(path: Path, keys: Sequence[str], what: str) -> list[Row]:
    """One JSON object a line."""
    found = read_lines(require(path, what), keys)
    return _some([Row(values, place) for place, values in found], path)


def json_file(path: Path, what: str) -> Any:
    """A whole JSON file."""
    return read_json(require(path, what))


def tab_separated(path: Path, keys: Sequence[str], what: str) -> list[Row]:
    """A table with a header, in quotes where a cell has several lines; empty cells are empty strings."""
    with require(path, what).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        rows = []
        for values in reader:
            place = f"{path}, line {reader.line_num}"
            if None in values or None in values.values():
                raise DataError(f"{place}: has another number of cells than the header.")
            require_keys(values, keys, place)
            rows.append(Row(values, place))
    return _some(rows, path)


def _some(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise DataError(f"{path} is empty.")
    return rows


def distinct(rows: Sequence[Row], key: str) -> None:
    """Check that no two rows have the same value, a whole number or a text.

    Raises:
        DataError: Two have, or a value is something else.
    """
    first: dict[Any, str] = {}
    for row in rows:
        if not isinstance(row[key], int | str):
            raise DataError(f"{row.place}: the {key} {row[key]!r} is neither a number nor a text.")
        if row[key] in first:
            raise DataError(
                f"{row.place} has the {key} {row[key]!r} of {first[row[key]]}; it must differ."
            )
        first[row[key]] = row.place

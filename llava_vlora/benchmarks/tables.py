"""Reading of questions and annotations; every error names the file and the line."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, listing

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
    rows = []
    text = require(path, what).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        place = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            rows.append(_row(json.loads(line), keys, place))
        except ValueError as error:
            raise DataError(f"{place}: not valid JSON ({error}).") from error
    return _some(rows, path)


def json_file(path: Path, what: str) -> Any:
    """A whole JSON file."""
    try:
        return json.loads(require(path, what).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}).") from error


def tab_separated(path: Path, keys: Sequence[str], what: str) -> list[Row]:
    """A table with a header, in quotes where a cell has several lines; empty cells are empty strings."""
    with require(path, what).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        rows = []
        for values in reader:
            place = f"{path}, line {reader.line_num}"
            if None in values or None in values.values():
                raise DataError(f"{place}: has another number of cells than the header.")
            rows.append(_row(values, keys, place))
    return _some(rows, path)


def _row(values: object, keys: Sequence[str], place: str) -> Row:
    missing = [key for key in keys if not isinstance(values, dict) or key not in values]
    if missing or not isinstance(values, dict):
        raise DataError(f"{place}: lacks {listing(missing)}.")
    return Row(values, place)


def _some(rows: list[Row], path: Path) -> list[Row]:
    if not rows:
        raise DataError(f"{path} is empty.")
    return rows


def distinct(rows: Sequence[Row], key: str) -> None:
    """Check that no two rows have the same value.

    Raises:
        DataError: Two have.
    """
    first: dict[Any, str] = {}
    for row in rows:
        if row[key] in first:
            raise DataError(
                f"{row.place} has the {key} {row[key]!r} of {first[row[key]]}; it must differ."
            )
        first[row[key]] = row.place

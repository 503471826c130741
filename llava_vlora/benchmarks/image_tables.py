"""Tables with images in base64 in their cells, as VLMEvalKit publishes benchmarks."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .base import EncodedPicture, Need
from .tables import Row, distinct, tab_separated

#: A cell that is not longer names the row that has the image.
_NAME = 64


def vlmevalkit(file: str, count: int | None, *md5: str) -> Need:
    """One of VLMEvalKit's tables, with the hashes that its source states."""
    return Need(
        file,
        "questions, images and answers",
        f"opencompass.openxlab.space/utils/VLMEval/{file}",
        count,
        md5,
    )


def image_table(path: Path, keys: Sequence[str], what: str) -> dict[str, Row]:
    """Rows by their ``index``, which must differ.

    Args:
        path: The table.
        keys: Columns that it must have beside ``index``, ``question`` and ``image``.
        what: What it has, for the message that it is missing.

    Raises:
        DataError: The table is missing or damaged.
    """
    rows = tab_separated(path, ("index", "question", "image", *keys), what)
    distinct(rows, "index")
    return {row["index"]: row for row in rows}


def picture(row: Row, rows: Mapping[str, Row]) -> EncodedPicture:
    """A row's image, which may stand in another row; the first where it has several.

    Raises:
        DataError: There is none.
    """
    shown = row if len(row["image"]) > _NAME else rows.get(row["image"])
    if shown is None:
        raise DataError(
            f"{row.place}: the cell of the image has none, nor names a row that has one."
        )
    return EncodedPicture(strings(shown["image"])[0], shown.place)


def strings(cell: str) -> list[str]:
    """What a cell holds: one string, or several as a Python list."""
    if cell[:1] + cell[-1:] != "[]":
        return [cell]
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        return [cell]  # an answer in brackets
    return [str(value) for value in found]


def answers_of(row: Row) -> list[str]:
    """The answers of a row, any of which is right.

    Raises:
        DataError: There is none.
    """
    found = [text for text in strings(row["answer"]) if text.strip()]
    if not found:
        raise DataError(f"{row.place}: has no answer.")
    return found

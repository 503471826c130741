"""Tables as Excel workbooks, which MMBench's server reads."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from .extra import extra

_USE = "The upload file"


def can_write(*, required: bool = False) -> bool:
    """Whether openpyxl is installed.

    Raises:
        ConfigError: It is required and not installed.
    """
    if required:
        extra("openpyxl", _USE)
    return importlib.util.find_spec("openpyxl") is not None


def write_workbook(path: Path, rows: Sequence[Sequence[str | int | None]]) -> Path:
    """Write one sheet, whole or not at all; text is never taken for a formula.

    Args:
        path: The file.
        rows: The header and the rows below it; None is an empty cell.

    Raises:
        ConfigError: openpyxl is not installed.
    """
    workbook = extra("openpyxl", _USE).Workbook()
    illegal = extra("openpyxl.cell.cell", _USE).ILLEGAL_CHARACTERS_RE
    sheet = workbook.active
    for number, row in enumerate(rows, start=1):
        sheet.append([illegal.sub("", cell) if isinstance(cell, str) else cell for cell in row])
        for cell in sheet[number]:
            if cell.data_type == "f":
                cell.data_type = "s"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    workbook.save(partial)
    os.replace(partial, path)
    return path

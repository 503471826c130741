"""What a person sees of the findings, and the files that are written from them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..errors import ConfigError
from ..evaluation.files import write_text
from .findings import NOTES, PROBLEMS, Finding

_EXAMPLES = 3


def summary(findings: Sequence[Finding]) -> Table:
    """A table of kinds with their counts and first examples, problems first."""
    groups = _by_kind(findings)
    table = Table("count", "kind, with the first records", box=None, pad_edge=False)
    table.columns[0].justify = "right"
    for kind, meaning in (PROBLEMS | NOTES).items():
        found = groups.get(kind)
        if not found:
            continue
        problem = kind in PROBLEMS
        name = Text(kind, "bold red" if problem else "bold yellow")
        table.add_row(str(len(found)), name + Text(f"{'' if problem else ' (note)'}: {meaning}"))
        for finding in found[:_EXAMPLES]:
            line = Text(f"{_place(finding)}: ", "dim") + Text(printable(finding.detail), "default")
            table.add_row("", Padding(line, (0, 0, 0, 2)))
    return table


def sample_text(runs: Iterable[tuple[str, bool]], *, colour: bool) -> Text:
    """A tokenised sample in which the learned runs stand out: coloured, or between ``[[`` and ``]]``."""
    text = Text()
    for words, learned in runs:
        shown = printable(words, keep="\n\t")
        if colour:
            text.append(shown, "bold green" if learned else "dim")
        else:
            text.append(f"[[{shown}]]" if learned else shown)
    return text


def printable(text: str, keep: str = "") -> str:
    """Text whose control characters are escaped: data never steers the terminal."""
    return "".join(c if c in keep or c.isprintable() else ascii(c)[1:-1] for c in text)


def write_report(path: Path, source: Path, checked: int, findings: Sequence[Finding]) -> None:
    """Write all findings as JSON.

    Raises:
        ConfigError: The file cannot be written.
    """
    report = {
        "file": str(source),
        "records": checked,
        "counts": {kind: len(found) for kind, found in _by_kind(findings).items()},
        "findings": [
            {
                "kind": finding.kind,
                "level": "problem" if finding.kind in PROBLEMS else "note",
                "index": finding.index,
                "id": finding.id,
                "detail": finding.detail,
            }
            for finding in findings
        ],
    }
    _write(path, json.dumps(report, indent=2) + "\n")


def write_records(path: Path, records: Sequence[Any]) -> None:
    """Write records whole or not at all: as JSON Lines if the name ends in ``.jsonl``, else as LLaVA's list.

    Raises:
        ConfigError: The file cannot be written.
    """
    lines = map(json.dumps, records)
    if path.suffix == ".jsonl":
        _write(path, "".join(f"{line}\n" for line in lines))
    else:
        _write(path, "[\n" + ",\n".join(lines) + "\n]\n")


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from error


def _by_kind(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    groups: defaultdict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.kind].append(finding)
    return dict(groups)


def _place(finding: Finding) -> str:
    name = "" if finding.id is None else f" (id {printable(str(finding.id))})"
    return f"record {finding.index}{name}"

"""The tables of a sweep: Markdown, CSV and the terminal. One block an axis, as the ablations of the paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .results import LEVEL, Result, best
from .running import duration

_BLANK = "-"


@dataclass(frozen=True)
class TextTable:
    """One block as text."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def text_tables(result: Result) -> list[TextTable]:
    """The blocks; ``**`` surround a value that stands out."""
    return [_text_table(result, block) for block in result["blocks"]]


def _text_table(result: Result, block: Mapping[str, Any]) -> TextTable:
    columns, variants = list(_columns(result)), result["variants"]
    names = [row["variant"] for row in block["rows"]]
    bold, luck = set(), 0.0
    for kind, benchmark in columns:
        if kind == "evaluate":
            values = {n: _cell(variants[n], kind, benchmark)["values"] for n in names}
            standing_out, chance = best(values)
            bold.add((standing_out, benchmark))
            luck = max(luck, chance)
    rows = []
    for row in block["rows"]:
        variant, default = variants[row["variant"]], row["variant"] == block["default"]
        cells = [
            f"{row['label']} (default)" if default and row["label"] != "default" else row["label"]
        ]
        for kind, benchmark in columns:
            text = _number(_cell(variant, kind, benchmark))
            out = kind == "evaluate" and (row["variant"], benchmark) in bold
            cells.append(f"**{text}**" if out else text)
        rows.append((*cells, *_costs(variant)))
    heads = [_head(result, kind, benchmark) for kind, benchmark in columns]
    return TextTable(
        block["title"],
        (block["title"], *heads, "connector", "training"),
        tuple(rows),
        tuple(_notes(result, names, luck)),
    )


def _columns(result: Result) -> Iterator[tuple[str, str]]:
    kinds = ("evaluate", "blind") if result["settings"]["evaluate"]["blind"] else ("evaluate",)
    return ((kind, name) for name in result["benchmarks"] for kind in kinds)


def _head(result: Result, kind: str, benchmark: str) -> str:
    stated = result["benchmarks"][benchmark]
    metric = f", {stated['metric']}" if stated["metric"] else ""
    return f"{stated['title']}{metric}" if kind == "evaluate" else f"{stated['title']}, blind"


def _cell(variant: Mapping[str, Any], kind: str, benchmark: str) -> dict[str, Any]:
    found: dict[str, Any] = variant["summary"].get(kind, {}).get(benchmark, {"values": []})
    return found


def _number(cell: Mapping[str, Any]) -> str:
    if not cell["values"]:
        return _BLANK
    spread = f" ({cell['low']:.1f} to {cell['high']:.1f})" if cell["low"] is not None else ""
    return f"{cell['mean']:.1f}{spread}"


def _costs(variant: Mapping[str, Any]) -> tuple[str, str]:
    """Parameters of the connector, and the mean time of both stages."""
    stages = [
        [run["steps"][stage] for run in variant["runs"] if run["steps"].get(stage, {}).get("done")]
        for stage in ("pretrain", "finetune")
    ]
    if not stages[1]:
        return _BLANK, _BLANK
    seconds = sum(sum(s["seconds"] for s in steps) / len(steps) for steps in stages if steps)
    again = "+" if any(s["attempts"] > 1 for steps in stages for s in steps) else ""
    count = stages[1][0]["parameters"]["connector"]
    return f"{count / 1e6:.3g} M", f"{duration(seconds)}{again}"


def _notes(result: Result, names: list[str], luck: float) -> Iterator[str]:
    seeds = result["settings"]["seeds"]
    if len(seeds) == 1:
        yield (
            f"One training each (seed {seeds[0]}): there is no spread between trainings, so nothing is bold and "
            "differences may be chance. In brackets, where given: 95 % interval over the questions (bootstrap over "
            "images)."
        )
    else:
        yield f"Mean of {len(seeds)} seeds (lowest to highest)."
        yield (
            f"Bold: all its seeds are above all others'. If the settings were alike, one would be so in "
            f"{100 * luck:.2g} % of such blocks."
            if luck <= LEVEL
            else f"Nothing is bold: {len(seeds)} seeds of {len(names)} variants are too few, one would be above all "
            f"others by chance in {100 * luck:.2g} % of such blocks."
        )
    missing = [n for n in names if any(not _whole(run) for run in result["variants"][n]["runs"])]
    if missing:
        yield f"Not all runs are there of: {', '.join(missing)}."
    if any(_again(run) for n in names for run in result["variants"][n]["runs"]):
        yield "+: a training was begun more than once; the time is that of its last part."


def _whole(run: Mapping[str, Any]) -> bool:
    return all(run["steps"].get(kind, {}).get("done") for kind in run["scores"])


def _again(run: Mapping[str, Any]) -> bool:
    stages = (run["steps"].get(stage, {}) for stage in ("pretrain", "finetune"))
    return any(stage.get("done") and stage["attempts"] > 1 for stage in stages)


def markdown(result: Result) -> str:
    """All blocks, and where they come from."""
    parts = [f"# Sweep of `{result['file']}`"]
    for table in text_tables(result):
        lines = [_line(table.columns), _line(["---"] * len(table.columns))]
        lines += [_line(row) for row in table.rows]
        parts += [f"## {table.title}", "\n".join(lines), *table.notes]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts.append(f"`{result['command']}`, commit {result['commit'] or 'unknown'}; {versions}.")
    if len(result["origins"]) > 1:
        parts.append(
            f"The steps were made with {len(result['origins'])} different sets of versions or commits; sweep.json has "
            "them (`origins`)."
        )
    return "\n\n".join(parts) + "\n"


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def comma_separated(result: Result) -> str:
    """One row a variant of a block, numbers unrounded."""
    columns = list(_columns(result))
    heads = [
        f"{name}{' blind' if kind == 'blind' else ''} {what}"
        for kind, name in columns
        for what in ("mean", "low", "high", "runs")
    ]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["axis", "value", "variant", "default", *heads])
    for block in result["blocks"]:
        for row in block["rows"]:
            cells = [_cell(result["variants"][row["variant"]], *column) for column in columns]
            numbers = [
                part
                for cell in cells
                for part in (
                    cell.get("mean"),
                    cell.get("low"),
                    cell.get("high"),
                    len(cell["values"]),
                )
            ]
            default = row["variant"] == block["default"]
            rows.writerow([block["title"], row["label"], row["variant"], int(default), *numbers])
    return text.getvalue()


def show(result: Result, console: Console) -> None:
    """Print the blocks, and each note once."""
    found = text_tables(result)
    for one in found:
        table = Table(box=SIMPLE_HEAD)
        for i, column in enumerate(one.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in one.rows:
            table.add_row(*(escape(cell.replace("**", "*")) for cell in row))
        console.print(table)
    for note in dict.fromkeys(note for one in found for note in one.notes):
        console.print(note, markup=False, highlight=False, soft_wrap=True)

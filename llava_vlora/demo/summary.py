"""What the terminal shows at the end of a demo: figures, the outcome in sentences, and what to type next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..comparison.costs import cost_table
from ..comparison.findings import findings
from .plan import BENCHMARKS, RunFolder

#: Lines of the costs that are shown; the others are in the report.
_COSTS = ("Tokens", "of these language", "Milliseconds to", "Kept", "Parameters of")


def print_summary(report: Mapping[str, Any], console: Console) -> None:
    """Print scores by question type, costs and findings."""
    console.print(_scores(report), _costs(report["comparison"]))
    for sentence in findings(report["comparison"]):
        console.print(f"- {sentence}", highlight=False, markup=False)


def _scores(report: Mapping[str, Any]) -> Table:
    comparison = report["comparison"]
    labels = comparison["rows"]
    table = _table("Right answers, %", ["", "n", *labels, "chance"])
    chances = {name: 100 * level["chance"] for name, level in report["data"]["blind"].items()}
    for benchmark in comparison["benchmarks"]:
        for name, found in benchmark["categories"].items():
            chance = chances[name] if name in chances else benchmark["chance"]
            cells = [f"{found['rows'][x]:.1f}" for x in labels]
            table.add_row(f"  {name}", f"{found['questions']:,}", *cells, f"{chance:.1f}")
        credit = [benchmark["rows"][x]["credit"] for x in labels]
        cells = [f"{one['mean']:.1f}" for one in credit]
        scored, chance = f"{benchmark['scored']:,}", f"{benchmark['chance']:.1f}"
        table.add_row(benchmark["title"], scored, *cells, chance, style="bold")
        ends = [f"{low:.1f}-{high:.1f}" for low, high in (one["interval"] for one in credit)]
        table.add_row("  95 %", "", *ends, "", style="dim", end_section=True)
    return table


def _costs(comparison: Mapping[str, Any]) -> Table:
    head, *lines = cost_table(dict(comparison))
    table = _table("Cost of an answer (spreads are in the report)", head)
    for title, *cells in lines:
        if title.startswith(_COSTS) or "FLOPs to" in title:
            table.add_row(title, *(cell.partition(" (")[0] for cell in cells))
    return table


def _table(title: str, head: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for i, column in enumerate(head):
        table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    return table


def next_commands(report: Mapping[str, Any], folder: RunFolder) -> list[tuple[str, str]]:
    """What a command is for, and the command, ready to be typed where the demo was started."""
    program, run = _program(), report["run"]
    names = [model["name"] for model in run["models"]]
    paths = {name: _short(folder.checkpoint(name, "finetune")) for name in names}
    # The generator with the most right answers, beside LLaVA.
    main = next(b for b in report["comparison"]["benchmarks"] if b["name"] == "sceneqa")
    best = max(run["models"][1:], key=lambda m: main["rows"][m["title"]]["credit"]["mean"])["name"]
    sample = report["samples"][0]
    image = _short(folder.files.image_folder / sample["image"])
    given = " ".join(f"--model {name}={shlex.quote(path)}" for name, path in paths.items())
    benchmarks, data = ",".join(BENCHMARKS), _short(folder.data)
    return [
        (
            f"ask both about a test image, such as {sample['question']}",
            f"{program} chat {shlex.quote(image)} --model {shlex.quote(paths[best])} "
            f"--beside {shlex.quote(paths[names[0]])}",
        ),
        (
            "compare them again, here or with models of your own",
            f"{program} compare {given} --benchmarks {benchmarks} --data {shlex.quote(data)} "
            f"--out {shlex.quote(_short(folder.eval))}",
        ),
        (
            "see what a generator's weights read and add",
            f"{program} ima views --model {best}={shlex.quote(paths[best])} --set {BENCHMARKS[0]} "
            f"--data {shlex.quote(data)} --out {shlex.quote(_short(folder.root / 'ima'))}",
        ),
    ]


def print_next(report: Mapping[str, Any], folder: RunFolder, console: Console) -> None:
    """Print the next commands and where the report is."""
    console.print("\n[bold]Next[/]")
    for purpose, command in next_commands(report, folder):
        console.print(f"# {purpose}", style="dim", markup=False, highlight=False, soft_wrap=True)
        console.print(command, markup=False, highlight=False, soft_wrap=True)
    console.print("\nReport: ", end="")
    console.print(
        _short(folder.root / "report.html"), markup=False, highlight=False, soft_wrap=True
    )


def _program() -> str:
    """How this command was called, if that works where it was started."""
    called = Path(sys.argv[0])
    if called.name != "llava-vlora":
        return "python -m llava_vlora"
    found = shutil.which("llava-vlora")
    if found is not None and Path(found).resolve() == called.resolve():
        return "llava-vlora"
    return shlex.quote(_short(called.absolute()))


def _short(path: Path) -> str:
    """The path from where one is, if it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative

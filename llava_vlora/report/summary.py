"""The short table in the terminal at the end of a run."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .collect import Report, findings


def print_summary(report: Report, console: Console) -> None:
    """Print accuracies by question type, then the findings."""
    table = Table(title="Exact match on held-out questions, % [95 % interval]")
    table.add_column("question type")
    table.add_column("n", justify="right")
    for name in ("LLaVA", "VLoRA", "blind", "chance"):
        table.add_column(name, justify="right")
    for category in report["categories"]:
        rows = [report["accuracy"][name][category] for name in ("llava", "vlora", "blind")]
        cells = [
            f"{100 * row['share']:.1f} "
            f"\\[{100 * row['interval']['low']:.0f}, {100 * row['interval']['high']:.0f}]"
            for row in rows
        ]
        chance = f"{100 * report['baselines']['chance'][category]:.1f}"
        last = category == report["categories"][-2]
        table.add_row(category, str(rows[0]["total"]), *cells, chance, end_section=last)
    console.print(table)
    for sentence in findings(report):
        console.print(f"- {sentence}", highlight=False)

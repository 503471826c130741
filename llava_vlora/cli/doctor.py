"""``llava-vlora doctor``: is this environment fit for VLoRA, and if not, why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..doctor import Diagnosis, diagnose
from ..doctor.probe import ImportCheck


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what is installed, what does not fit, and why LLaVA cannot be imported",
        description="Say what is installed, what does not fit together, and the first true cause where "
        "LLaVA cannot be imported. Exit code 0 if VLoRA can train and answer here, else 1.",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; 0 if VLoRA can train and answer here, else 1."""
    diagnosis = diagnose()
    if args.json:
        print(json.dumps(asdict(diagnosis) | {"ready": diagnosis.ready}, indent=2))
    else:
        _show(diagnosis, Console(highlight=False))
    return 0 if diagnosis.ready else 1


def _show(diagnosis: Diagnosis, console: Console) -> None:
    facts = Table.grid(padding=(0, 2))
    facts.add_row("python", escape(diagnosis.python))
    llava = diagnosis.llava
    if llava:
        facts.add_row(
            "llava", escape(f"{llava.flavour} at {llava.path} ({', '.join(llava.distributions)})")
        )
    for name, version in diagnosis.packages.items():
        facts.add_row(name, version or "[dim]not installed[/dim]")
    for gpu in diagnosis.gpus:
        facts.add_row("gpu", escape(f"{gpu.name}, {gpu.memory_gib} GiB"))
    if not diagnosis.gpus:
        facts.add_row("gpu", "none: everything runs on the CPU")
    if diagnosis.shims:
        facts.add_row("shims", ", ".join(diagnosis.shims))
    console.print(facts)
    console.print()
    plain = {check.module: check for check in diagnosis.plain}
    plugin = {check.module: check for check in diagnosis.plugin}
    console.print(_imports(plain, plugin))
    for module, check in plain.items():
        if check.error and module in plugin and not plugin[module].error:
            console.print(f"\nnote: without the plugin, {module} fails: {escape(check.error)}")
    for problem in diagnosis.problems:
        colour = "red" if problem.level == "error" else "yellow"
        console.print(f"\n[{colour}]{problem.level}[/{colour}] {escape(problem.cause)}")
        console.print(f"  remedy: {escape(problem.remedy)}")
    verdict = "[green]VLoRA can train and answer here.[/green]"
    console.print(
        f"\n{verdict if diagnosis.ready else '[red]VLoRA cannot train and answer here.[/red]'}"
    )


def _imports(plain: Mapping[str, ImportCheck], plugin: Mapping[str, ImportCheck]) -> Table:
    table = Table("import", "plain", "with the plugin", box=None, pad_edge=False)
    for module in dict.fromkeys((*plugin, *plain)):
        table.add_row(module, *(_cell(checks.get(module)) for checks in (plain, plugin)))
    return table


def _cell(check: ImportCheck | None) -> str:
    if check is None:
        return ""
    return "[green]works[/green]" if check.error is None else "[red]fails[/red]"

"""``llava-vlora report``: the report of a run folder, built anew from its files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "report",
        help="build the report of a folder that eval, compare or demo has filled",
        description="Build report.html, comparison.json, comparison.csv, comparison.md and model cards from the files "
        "of a run folder alone: no model is loaded.",
    )
    parser.add_argument("folder", type=Path, help="what was --out of eval, compare or demo")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Build the report; returns the exit code."""
    from rich.console import Console

    from ..comparison.build import build
    from ..demo.plan import RunFolder
    from ..demo.report import build_report, is_demo

    if is_demo(args.folder):
        build_report(RunFolder(args.folder.expanduser().resolve()))
    else:
        build(args.folder, seed=args.seed)
    Console(highlight=False).print(f"Report: {args.folder / 'report.html'}", soft_wrap=True)
    return 0

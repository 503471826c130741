"""``llava-vlora sweep``: train and evaluate variants of one recipe."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from .arguments import cores, positive

_EPILOG = """\
  llava-vlora sweep eval/sweep-sceneqa.yaml              CI-sized: weight types, rank and depth on rendered scenes
  llava-vlora sweep eval/sweep-paper.yaml --dry-run      the paper's ablations: every command, nothing is run

Every step is a command of LLaVA's trainer or of `llava-vlora eval`, with its log in OUT/logs. The same command goes on
where an interrupted sweep stopped; a changed setting repeats what depends on it. docs/sweep.md describes the file.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "sweep",
        help="train and evaluate variants: weight types, rank, depth, learning rates, any flag",
        description="Train and evaluate variants of one recipe; one table and plot in the end.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="YAML")
    parser.add_argument("--out", type=Path, help="instead of the file's `out`")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="this variant alone; may be repeated"
    )
    parser.add_argument(
        "--jobs", type=positive, default=1, help="steps at once; GPUs are divided (default: 1)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print the commands and their number")
    what.add_argument("--only-report", action="store_true", help="build the tables anew")


def run(args: argparse.Namespace) -> int:
    """Run the sweep; returns the exit code."""
    import torch
    from rich.console import Console

    from ..integration.trainer_flags import trainer_flags
    from ..sweep.pipeline import Sweep
    from ..sweep.running import Place
    from ..sweep.spec import read_spec

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(i) for i in range(torch.cuda.device_count())]
    if visible is not None:
        gpus = visible.split(",")[: len(gpus)]
    sweep = Sweep(
        spec=read_spec(args.file, trainer_flags(), out=args.out),
        console=Console(),
        place=Place(args.jobs, tuple(gpus), cores()),
        only=tuple(args.only or ()),
    )
    if args.dry_run or args.only_report:
        sweep.dry_run() if args.dry_run else sweep.report()
        return 0
    return sweep.run()

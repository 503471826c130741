"""``llava-vlora demo``: train LLaVA and a model with each generator side by side, compare them, write a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import chosen_device, cores, positive

if TYPE_CHECKING:
    from ..demo.plan import Settings

#: The demo's models are too small to gain from more.
_MOST_THREADS = 4
_EPILOG = """\
The report is OUT/report.html (open it in a browser), its figures are in OUT/report.json. All models are trained by
LLaVA's own trainer on the same data; OUT/commands.txt has the commands. The same command goes on where an interrupted
run stopped; with other settings, what depends on them begins anew.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb to the command line."""
    from ..sceneqa import SIZES

    parser = subparsers.add_parser(
        "demo",
        help="train LLaVA, VLoRA and fast weights side by side on rendered scenes and compare them",
        description="Train LLaVA and a model with each generator side by side on SceneQA, and compare them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", choices=sorted(SIZES, reverse=True), default="small")
    parser.add_argument("--seed", type=int, default=0, help="of data and training (default: 0)")
    parser.add_argument(
        "--steps",
        type=positive,
        help="fine-tuning steps; pretraining is scaled along (default: half of the size's recipe)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="questions answered at once (default: 32)"
    )
    parser.add_argument("--fresh", action="store_true", help="begin everything anew")
    parser.add_argument(
        "--only-report", action="store_true", help="build the report of an earlier run in OUT anew"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the demo; returns the exit code."""
    from rich.console import Console

    from ..demo.pipeline import Demo
    from ..demo.plan import RunFolder
    from ..demo.report import build_report
    from ..demo.summary import print_next, print_summary

    console = Console()
    # Absolute, because the trained models' configs hold paths.
    folder = RunFolder(args.out.expanduser().resolve())
    if not args.only_report:
        try:
            Demo(_settings(args), folder, console).run(fresh=args.fresh)
        except KeyboardInterrupt:
            console.print("Stopped. The same command goes on from here.")
            raise
    with console.status("Building the report"):
        report = build_report(folder)
    print_summary(report, console)
    print_next(report, folder, console)
    return 0


def _settings(args: argparse.Namespace) -> Settings:
    from ..demo.plan import Settings

    device, available = chosen_device(args.device).type, cores()
    # Trainings on one GPU would share its memory; on a CPU two share the cores.
    parallel = 2 if device == "cpu" and available > 1 else 1
    return Settings(
        size=args.size,
        seed=args.seed,
        steps=args.steps,
        device=device,
        batch_size=args.batch_size,
        parallel=parallel,
        threads=max(1, min(_MOST_THREADS, available // parallel)),
    )

"""``llava-vlora eval``: a model's answers to benchmarks and their scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import positive

if TYPE_CHECKING:
    from ..evaluation.benchmarking import Evaluation

_EPILOG = """\
  llava-vlora eval --model checkpoints/my-vlora --benchmarks pope,scienceqa --out runs/my-vlora
  torchrun --nproc_per_node 8 -m llava_vlora eval --model checkpoints/my-vlora --benchmarks pope

Files lie as LLaVA's docs/Evaluation.md has them, below --data. The same command goes on where an interrupted run
stopped. Answers are in LLaVA's format, so that LLaVA's own scorers read them.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    from ..benchmarks import names

    parser = subparsers.add_parser(
        "eval",
        help="answer benchmarks with a VLoRA or LLaVA model and score the answers",
        description="Answer benchmarks with a VLoRA, LLaVA or plain model, greedily, and score the answers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--model-base", help="language model, for a projector or LoRA weights")
    parser.add_argument("--name", help="of the model in files and tables (default: its folder)")
    parser.add_argument(
        "--benchmarks", required=True, help=f"comma-separated; known: {', '.join(names())}"
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("playground/data/eval"),
        help="LLaVA's folder (default: playground/data/eval)",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), help="default: runs/eval")
    parser.add_argument("--blind", action="store_true", help="do not show the images")
    parser.add_argument("--conv-mode", default="vicuna_v1", help="LLaVA's template (vicuna_v1)")
    parser.add_argument(
        "--batch-size",
        type=_batch,
        default=None,
        help="prompts at once; auto (default): 64 on a GPU, fewer if its memory does not do, 16 on a CPU",
    )
    parser.add_argument("--limit", type=positive, help="ask the first questions alone")
    parser.add_argument("--bits", type=int, choices=(4, 8), help="quantise the language model")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="answer all questions again; answers of another model are kept beside",
    )


def _batch(text: str) -> int | None:
    return None if text == "auto" else positive(text)


def run(args: argparse.Namespace) -> int:
    """Answer and score; returns the exit code."""
    from rich.console import Console

    from ..evaluation.benchmarking import evaluate

    console = Console(highlight=False)
    evaluate(_evaluation(args), console)
    return 0


def _evaluation(args: argparse.Namespace) -> Evaluation:
    from ..benchmarks import find
    from ..evaluation.benchmarking import Evaluation

    chosen = [find(name.strip()) for name in args.benchmarks.split(",")]
    return Evaluation(
        model=args.model,
        base=args.model_base,
        name=args.name or Path(args.model).expanduser().resolve().name,
        benchmarks=tuple(chosen),
        data=args.data,
        out=args.out,
        see=not args.blind,
        conv_mode=args.conv_mode,
        batch_size=args.batch_size,
        limit=args.limit,
        bits=args.bits,
        device=args.device,
        fresh=args.fresh,
    )

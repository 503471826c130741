"""``llava-vlora ima skip-bench``: measured time under plans beside the dense model's."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import chosen_device, not_negative, positive
from .ima_weights import add_plan_arguments, numbers, plans

if TYPE_CHECKING:
    from ..ima.skip_runs import Subject

_EPILOG = """\
  llava-vlora ima skip-bench --shape 7b --kind ffn,block --ratios 0.25,0.5,1 --start 4
  llava-vlora ima skip-bench --model llava=checkpoints/my-llava --visual-tokens 144,576,2880

Shapes have random weights; nothing is downloaded. Dense model and plans take part in every round, and ratios are taken
round by round. Times depend on the machine; the ratios are what to quote.
"""


def add_skip_bench(verbs: Any) -> None:
    """Add the verb."""
    text = "time of a model with computation skipped, beside the dense model's"
    parser = verbs.add_parser(
        "skip-bench",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shape", default="tiny", help="tiny, 1b, 7b or 13b (default: tiny)")
    what.add_argument("--model", metavar="NAME=FOLDER", help="a trained model instead")
    parser.add_argument("--model-base", help="language model, for a projector or LoRA weights")
    parser.add_argument("--layers", type=positive, help="fewer blocks than the shape has")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of a shape's weights (default: float16 on a GPU, float32 on a CPU)",
    )
    add_plan_arguments(parser)
    parser.add_argument(
        "--visual-tokens", help="numbers of them, such as 144,576 (default: the model's own)"
    )
    parser.add_argument("--text-tokens", type=positive, default=64, help="default: 64")
    parser.add_argument(
        "--steps", type=not_negative, default=16, help="tokens decoded in a row (default: 16)"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="default: 5")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/ima"), help="default: runs/ima")


def skip_bench(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code."""
    from rich.console import Console

    from ..demo.process import progress_bar
    from ..errors import ConfigError
    from ..evaluation.files import require_writable
    from ..ima.skip_runs import bench_plans

    chosen = plans(args)
    given = args.visual_tokens
    visual = None if given is None else numbers("--visual-tokens", given, int)
    if visual is not None and min(visual) < 1:
        raise ConfigError(f"--visual-tokens {given}: give numbers of at least 1.")
    require_writable(args.out)
    console, subject = Console(highlight=False), _subject(args)
    counts = visual or (subject.visual,)
    with progress_bar(console) as progress:
        progress.disable = not console.is_terminal
        calls = len(counts) * (len(chosen) + 1) * (args.rounds + 1) * (2 if args.steps else 1)
        task = progress.add_task("measure", total=calls)
        lines = bench_plans(
            subject,
            chosen,
            args.out,
            visual=counts,
            text=args.text_tokens,
            rounds=args.rounds,
            steps=args.steps,
            progress=lambda: progress.advance(task),
        )
        for line in lines:
            console.print(line, soft_wrap=True, markup=False)
    return 0


def _subject(args: argparse.Namespace) -> Subject:
    import torch

    from ..errors import ConfigError
    from ..ima.skip_runs import of_checkpoint, of_shape
    from .compare import single

    device = chosen_device(args.device)
    if args.model is None:
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        return of_shape(args.shape, layers=args.layers, device=device, dtype=dtype)
    for flag in ("layers", "dtype"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag} is for --shape; a trained model is measured as it is.")
    name, path = single(args.model)
    return of_checkpoint(name, path, args.model_base, device)

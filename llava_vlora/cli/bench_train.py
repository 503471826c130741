"""``llava-vlora bench train``: samples per second and memory of training, LLaVA and VLoRA side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .arguments import add_bench_arguments, chosen_device, with_projectors

if TYPE_CHECKING:
    from ..bench.training import TrainOptions

_EPILOG = """\
A step is forward, backward, clipping and optimizer, as LLaVA's trainer makes them, vision tower included, on random
weights and images; nothing is downloaded and nothing is kept. Every system takes part in every round, and ratios are
taken round by round: "2.3 (2.2-2.4)" is the median and the spread over the rounds.

--dtype bfloat16 holds weights, gradients and optimizer states in bfloat16, without the float32 copies that DeepSpeed
keeps beside them; autocast is LLaVA's trainer without DeepSpeed: projector or generator in float32. One process;
llava-vlora estimate computes what several GPUs need.
"""


def add_arguments(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add ``train`` below the verb ``bench``."""
    parser = subparsers.add_parser(
        "train",
        help="measure training instead: samples per second and peak memory of both stages",
        description="Measure training steps of LLaVA, VLoRA and the plain language model side by side.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_bench_arguments(parser)
    parser.add_argument(
        "--dtype", default="bfloat16", help="bfloat16 (default), float32 or autocast"
    )
    parser.add_argument(
        "--stages",
        default="pretrain,finetune",
        help="comma-separated: pretrain, finetune, frozen (default: pretrain,finetune)",
    )
    parser.add_argument("--batch", type=int, default=1, help="samples of a step (default: 1)")
    parser.add_argument(
        "--text-tokens", type=int, help="beside the image (default: 32 in stage 1, 256 in stage 2)"
    )
    parser.add_argument("--optimizer", default="adamw", help="adamw (default), sgd or none")
    parser.add_argument(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="gradient checkpointing, which LLaVA's recipes use",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the result; returns the exit code."""
    from rich.console import Console

    from ..bench.training import TrainBench
    from ..bench.training_plot import training_plot
    from ..bench.training_summary import print_result
    from ..demo.process import progress_bar
    from ..evaluation.files import write_json
    from ..report.plots import save

    console = Console()
    options = _options(args)
    with console.status(f"Building LLaVA, VLoRA and the language model of shape {args.shape}"):
        bench = TrainBench(options)
    with progress_bar(console) as progress:
        task = progress.add_task("measure", total=bench.work())
        result = bench.run(lambda name: progress.update(task, advance=1, description=name.ljust(8)))
    print_result(result, console)
    name = f"train-{args.shape}-{options.device.type}-{options.dtype}"
    write_json(args.out / f"{name}.json", result)
    save(training_plot(result), args.out / f"{name}.png")
    console.print(f"Result: {args.out / name}.json and .png", highlight=False, soft_wrap=True)
    return 0


def _options(args: argparse.Namespace) -> TrainOptions:
    from ..bench.shapes import shape
    from ..bench.training import TEXT_TOKENS, TrainOptions

    text = args.text_tokens
    return TrainOptions(
        shape=with_projectors(shape(args.shape), args.projector),
        device=chosen_device(args.device),
        dtype=args.dtype,
        stages=tuple(part.strip() for part in args.stages.split(",")),
        rounds=args.rounds,
        batch=args.batch,
        text_tokens=TEXT_TOKENS if text is None else dict.fromkeys(TEXT_TOKENS, text),
        optimizer=args.optimizer,
        checkpointing=args.checkpointing,
    )

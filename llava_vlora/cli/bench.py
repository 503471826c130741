"""``llava-vlora bench``: speed and memory of LLaVA, VLoRA and the plain language model, side by side."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import bench_train
from .arguments import Instead, add_bench_arguments, chosen_device, with_projectors

if TYPE_CHECKING:
    from ..bench.measure import Options

_EPILOG = """\
All models of a run share one language model and one vision tower with random weights; nothing is downloaded.
Every call takes part in every round, and ratios are taken round by round: "0.98 (0.97-0.99)" is the median
and the spread over the rounds. Times depend on the machine; the ratios are what to quote.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="measure speed and memory of LLaVA, VLoRA and the plain language model side by side",
        description="Measure speed and memory of LLaVA, VLoRA and the plain language model side by side.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_bench_arguments(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of all weights (default: float16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--bits", type=int, choices=(8, 4), help="quantise the decoder layers with bitsandbytes"
    )
    parser.add_argument(
        "--batch", type=_numbers, default=(1, 8, 32), help="for decoding (default: 1,8,32)"
    )
    parser.add_argument("--text-tokens", type=int, default=64, help="of the prompt (default: 64)")
    parser.add_argument(
        "--steps", type=int, default=16, help="tokens decoded in a row (default: 16)"
    )
    parser.add_argument(
        "--parts", type=_words, help="comma-separated; by default all: prefill, first, decode, ..."
    )
    parser.add_argument(
        "--layers", type=_numbers, help="injected layers instead of every 4th, such as 3,7,11"
    )
    parser.add_argument(
        "--types",
        help="weight types instead of each kind's own; without m all of them can be merged",
    )
    others = parser.add_subparsers(
        dest="what", title="another benchmark", metavar="train", action=Instead
    )
    bench_train.add_arguments(others)


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the result; returns the exit code."""
    if args.what == "train":
        return bench_train.run(args)
    from rich.console import Console

    from ..bench.measure import Bench
    from ..bench.plot import bench_plot
    from ..bench.summary import precision, print_result
    from ..demo.process import progress_bar
    from ..evaluation.files import write_json
    from ..report.plots import save

    console = Console()
    options = _options(args)
    with console.status(f"Building LLaVA, VLoRA and the language model of shape {args.shape}"):
        bench = Bench(options)
    with progress_bar(console) as progress:
        task = progress.add_task("measure", total=bench.work())
        result = bench.run(lambda part: progress.update(task, advance=1, description=part.ljust(8)))
    print_result(result, console)
    name = f"{args.shape}-{options.device.type}-{precision(result)}".replace(" bits, ", "bit-")
    write_json(args.out / f"{name}.json", result)
    save(bench_plot(result), args.out / f"{name}.png")
    console.print(f"Result: {args.out / name}.json and .png", highlight=False, soft_wrap=True)
    return 0


def _options(args: argparse.Namespace) -> Options:
    import torch

    from ..bench.measure import PARTS, Options
    from ..bench.shapes import shape

    device = chosen_device(args.device)
    chosen = with_projectors(shape(args.shape), args.projector)
    changes: dict[str, Any] = {"types": args.types, "layer_list": args.layers}
    changes = {name: value for name, value in changes.items() if value}
    return Options(
        shape=chosen.with_settings(**changes),
        device=device,
        dtype=getattr(torch, args.dtype or ("float16" if device.type == "cuda" else "float32")),
        rounds=args.rounds,
        batches=args.batch,
        text_tokens=args.text_tokens,
        steps=args.steps,
        parts=args.parts or tuple(PARTS),
        bits=args.bits,
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,8,32") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))

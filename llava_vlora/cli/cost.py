"""``llava-vlora cost``: FLOPs, memory and cache of answering a question, from sizes alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import add_projector_argument, add_shape_arguments, with_projectors

if TYPE_CHECKING:
    from ..bench.shapes import Shape

_EPILOG = """\
  llava-vlora cost --model 7b --text-tokens 64 --answer-tokens 100
  llava-vlora cost --model path/to/llava-v1.5-13b --image-size 448 --merged
  llava-vlora cost --paper --figure fig4.png

FLOPs are those of the matrix products, as PyTorch's counter finds them on the real models; see docs/cost.md.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "cost",
        help="compute what an answer costs: FLOPs, memory, cache, for LLaVA and VLoRA",
        description="Compute what an answer costs with LLaVA and VLoRA. No weights are built, nothing is downloaded.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape_arguments(parser)
    add_projector_argument(parser)
    parser.add_argument("--image-size", type=int, help="pixels (default: the vision tower's)")
    parser.add_argument("--image-tokens", type=int, help="patches, instead of --image-size")
    parser.add_argument("--text-tokens", type=int, default=64, help="of the prompt (default: 64)")
    parser.add_argument("--answer-tokens", type=int, default=1, help="default: 1")
    parser.add_argument("--dtype", default="float16", help="float16 (default), bfloat16 or float32")
    parser.add_argument("--types", help="weight types instead of the model's or each kind's own")
    parser.add_argument("--layers", help="injected layers instead of every 4th, such as 3,7,11")
    parser.add_argument("--rank", type=int, help="of the paper's generator (default: 64)")
    parser.add_argument("--merged", action="store_true", help="the image folded into the weights")
    parser.add_argument("--macs", action="store_true", help="print MACs, half as many as FLOPs")
    parser.add_argument(
        "--paper", action="store_true", help="also the points of the paper's Fig. 4"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write FLOPs and bytes")
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE.png",
        help="plot the parts, or with --paper the paper's Fig. 4",
    )


def run(args: argparse.Namespace) -> int:
    """Compute and print; returns the exit code."""
    from rich.console import Console

    from ..costing.result import Question, compare, with_image
    from ..costing.table import print_cost
    from ..errors import ConfigError
    from ..evaluation.files import write_json

    if args.figure and args.figure.suffix != ".png":
        raise ConfigError(f"--figure {args.figure}: figures are PNG files; end the name in .png.")
    question = Question(args.text_tokens, args.answer_tokens, args.dtype, args.merged)
    shape = with_image(_shape(args), args.image_size, args.image_tokens)
    result = compare(shape, question, paper=args.paper)
    console = Console()
    print_cost(result, console, macs=args.macs)
    if args.json:
        write_json(args.json, result)
    if args.figure:
        from ..costing.plot import figure4_plot, parts_plot
        from ..report.plots import save

        figure = figure4_plot(result) if args.paper else parts_plot(result, macs=args.macs)
        save(figure, args.figure)
    for written in filter(None, (args.json, args.figure)):
        console.print(f"Written: {written}", highlight=False, soft_wrap=True)
    return 0


def _shape(args: argparse.Namespace) -> Shape:
    from ..config import parse_layers
    from ..estimate.models import find_shape

    shape = with_projectors(find_shape(args.model, args.vision_tower), args.projector)
    changes: dict[str, Any] = {"types": args.types, "rank": args.rank}
    if args.layers is not None:
        changes["layer_list"] = parse_layers(args.layers)
    return shape.with_settings(**{n: value for n, value in changes.items() if value is not None})

"""``llava-vlora estimate``: parameters, memory of a GPU and hours of training, before anything is bought or built."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import add_shape_arguments

_EPILOG = """\
  llava-vlora estimate --model 7b --stage pretrain --gpus 8
  llava-vlora estimate --model path/to/vicuna-7b --stage finetune --gpus 8 --zero 2
  llava-vlora estimate --model 7b --stage finetune --bench runs/bench/train-7b-cuda-bfloat16.json

Parameters are exact, and so are the bytes of weights, gradients and optimizer that PyTorch and DeepSpeed hold.
Activations follow formulas; what autograd keeps is tested to be within 5 % of them.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "estimate",
        help="compute what training needs: parameters, memory of a GPU, hours",
        description="Compute what training LLaVA and VLoRA needs. No weights are built, nothing is downloaded.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape_arguments(parser)
    parser.add_argument(
        "--stage", default="finetune", help="pretrain, finetune (default), frozen, lora or qlora"
    )
    parser.add_argument(
        "--projector",
        default="all",
        help="mlp2x_gelu, vlora, vlora_fast, several with commas, or all (default)",
    )
    parser.add_argument("--gpus", type=int, default=8, help="default: 8")
    parser.add_argument("--zero", type=int, help="0, 2 or 3 (default: as in the stage's recipe)")
    parser.add_argument(
        "--offload", action="store_true", help="optimizer, and with ZeRO-3 weights, to the CPU"
    )
    parser.add_argument("--batch", type=int, help="samples of a GPU (default: as in the recipe)")
    parser.add_argument(
        "--text-tokens", type=int, help="beside the image (default: 32 for pretrain, else 256)"
    )
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 (default) or float32")
    parser.add_argument("--lora-rank", type=int, default=128, help="default: 128")
    parser.add_argument("--bits", type=int, default=4, help="of qlora: 4 (default) or 8")
    parser.add_argument("--types", help="weight types instead of the model's or each kind's own")
    parser.add_argument(
        "--bench", type=Path, metavar="FILE", help="JSON of `llava-vlora bench train`, for hours"
    )
    parser.add_argument(
        "--samples", type=int, help="for hours (default: LLaVA-1.5's 558128 or 665298)"
    )


def run(args: argparse.Namespace) -> int:
    """Compute and print; returns the exit code."""
    from rich.console import Console

    from ..errors import ConfigError, listing
    from ..estimate.models import find_shape
    from ..estimate.parameters import MLP, projectors
    from ..estimate.plan import RECIPES, Plan
    from ..estimate.report import print_estimate
    from ..estimate.speed import SAMPLES, read_speed

    if args.stage not in RECIPES:
        raise ConfigError(f"--stage {args.stage!r}; valid: {listing(RECIPES)}.")
    if args.samples is not None and (args.bench is None or args.samples < 1):
        raise ConfigError("--samples needs a --bench FILE with measured speeds, and at least 1.")
    zero, batch, tokens = RECIPES[args.stage]
    plan = Plan(
        stage=args.stage,
        zero=zero if args.zero is None else args.zero,
        gpus=args.gpus,
        offload=args.offload,
        batch=batch if args.batch is None else args.batch,
        text_tokens=tokens if args.text_tokens is None else args.text_tokens,
        checkpointing=args.checkpointing,
        dtype=args.dtype,
        lora_rank=args.lora_rank,
        bits=args.bits,
    )
    shape, chosen = find_shape(args.model, args.vision_tower), args.projector.split(",")
    if args.projector not in ("all", "both"):
        shape = shape.only([kind for kind in chosen if kind != MLP])
    else:
        chosen = list(projectors(shape))
    if args.types:
        shape = shape.with_settings(types=args.types)
    speed = read_speed(args.bench, shape, plan) if args.bench else None
    samples = args.samples or SAMPLES.get(args.stage, SAMPLES["finetune"])
    print_estimate(shape, chosen, plan, speed, samples, Console())
    return 0

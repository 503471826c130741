"""``llava-vlora merge-lora``: a LoRA checkpoint and its base as one model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ("float16", "bfloat16", "float32")
_EPILOG = """\
  llava-vlora merge-lora checkpoints/vlora-7b-lora --base lmsys/vicuna-7b-v1.5 --out vlora-7b
  llava-vlora merge-lora checkpoints/vlora-7b-qlora/checkpoint-1000 --base vicuna --out vlora-7b --dtype bfloat16

Works with LLaVA's own LoRA models too, and takes the flags of its scripts/merge_lora_weights.py. No GPU is used, and
no model is held in memory whole.
"""


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "merge-lora",
        help="merge a LoRA or QLoRA checkpoint, or a projector trained alone, into its base model",
        description="Write a LoRA or QLoRA checkpoint, projector or generator included, or a projector or generator "
        "that was trained alone (--vlora_freeze_llm), as a full checkpoint that loads without its base.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lora = parser.add_mutually_exclusive_group(required=True)
    lora.add_argument(
        "lora", type=Path, nargs="?", help="output folder of such a run, or a checkpoint in it"
    )
    lora.add_argument("--model-path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--base",
        "--model-base",
        help="unquantised language model of training (default: the one that the adapter names)",
    )
    parser.add_argument(
        "--out", "--save-model-path", type=Path, required=True, help="new folder of the model"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the base's)")


def run(args: argparse.Namespace) -> int:
    """Merge."""
    import torch
    from rich.console import Console

    from ..demo.process import progress_bar
    from ..integration.lora_merging import merge_lora

    console = Console(highlight=False, soft_wrap=True)
    with progress_bar(console) as progress:
        progress.disable = not console.is_terminal

        def stage(name: str, total: int) -> Callable[[int], object]:
            task = progress.add_task(name, total=total)
            return lambda count: progress.advance(task, count)

        done = merge_lora(
            args.lora or args.model_path,
            args.base,
            args.out,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            progress=stage,
        )
    dtype = str(done.dtype).removeprefix("torch.")
    merged = f"; {done.layers} layers merged" if done.layers else ""
    console.print(
        f"model: {done.folder} ({done.size / (1 << 20):.1f} MiB, {dtype}{merged})",
        markup=False,
    )
    if done.bits:
        console.print(
            f"note: the adapter was trained beside a language model of {done.bits} bits and is now part of the "
            "unquantised one, as PEFT recommends. Logits differ from those in training by the rounding to "
            f"{done.bits} bits."
        )
    return 0

"""``llava-vlora export``: an image as a LoRA adapter for the plain language model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "export",
        help="write an image as a LoRA adapter that PEFT, vLLM or SGLang can load",
        description="Write an image as a LoRA adapter for the plain language model. The model must have been "
        "trained without the weight type m, which has no place in an adapter.",
    )
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("--model", required=True, help="VLoRA checkpoint")
    parser.add_argument(
        "--base", help="language model, where the checkpoint holds the projector alone"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapter")
    parser.add_argument(
        "--llm-out",
        type=Path,
        help="also write the plain language model and its tokenizer here, once for all images",
    )
    parser.add_argument(
        "--rank",
        type=int,
        help="cut the weights to this rank, and say what share of them that leaves out; all of it by default",
    )
    parser.add_argument("--device", help="cuda or cpu; the GPU if there is one by default")


def run(args: argparse.Namespace) -> int:
    """Export one image."""
    import torch

    from ..exporting import export_adapter
    from ..images import open_image
    from ..integration.api import load, pixel_values, plain_llm

    image = open_image(args.image)
    loaded = load(args.model, args.base, device=args.device)
    with torch.no_grad():
        weights = loaded.model.perceive(pixel_values([image], loaded))
    if args.rank is not None:
        lost = float(weights.lost_share(args.rank)[0])
        weights = weights.truncate(args.rank)
        print(f"rank {args.rank} leaves out {lost:.2%} of the weights' sum of squares")
    llm = args.llm_out or args.base or args.model
    folder = export_adapter(weights, args.out, llm=llm)
    if args.llm_out:
        plain_llm(loaded.model).save_pretrained(args.llm_out)
        loaded.tokenizer.save_pretrained(args.llm_out)
        print(f"language model: {args.llm_out}")
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1024
    print(f"adapter: {folder} ({size:.0f} KiB)")
    if loaded.model.vlora_config.placeholder == "gap":
        print(
            "note: this model skips one position at the image. A server that counts without the skip answers almost "
            "the same; models trained with --vlora_placeholder contiguous answer exactly the same."
        )
    return 0

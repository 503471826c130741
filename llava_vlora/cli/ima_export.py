"""``llava-vlora ima export-24``: a checkpoint with 2:4 zeros."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .merge_lora import DTYPES


def add_export(verbs: Any) -> None:
    """Add the verb."""
    text = "a full checkpoint pruned by a 2:4 mask"
    parser = verbs.add_parser(
        "export-24",
        help=text,
        description=f"Write {text}. It loads like any other; on an NVIDIA GPU, "
        "llava_vlora.ima.semi_structured.to_semi_structured(model) then has PyTorch's sparse kernels multiply.",
    )
    parser.add_argument("mask", type=Path, metavar="MASK", help="of `ima wanda --pattern 2:4`")
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--model-base", help="language model, for a projector")
    parser.add_argument("--out", type=Path, required=True, help="new folder of the model")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights (default: the language model's)"
    )


def export(args: argparse.Namespace) -> int:
    """Prune and write; returns the exit code."""
    import torch

    from ..ima.masks import MaskSet
    from ..integration.pruned_export import export_two_of_four
    from ..integration.pruned_training import mask_of_training, other_mask

    mask = MaskSet.load(args.mask)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    done = export_two_of_four(args.model, args.model_base, mask, args.out, dtype=dtype)
    note = other_mask(mask_of_training(args.model), mask.digest)
    if note is not None:
        print(f"note: {args.model}: {note}")
    named = str(done.dtype).removeprefix("torch.")
    print(
        f"model: {done.folder} ({done.size / (1 << 20):.1f} MiB, {named}; {done.layers} linear layers are 2:4 sparse)"
    )
    return 0

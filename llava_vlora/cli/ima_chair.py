"""``llava-vlora ima chair``: objects that captions name and images do not show."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import not_negative


def add_chair(verbs: Any) -> None:
    """Add the verb."""
    text = "objects that captions name and images do not show"
    parser = verbs.add_parser(
        "chair",
        help=text,
        description=f"CHAIR (arXiv 1809.02156): {text}, as a share of mentions (i) and of captions (s).",
    )
    parser.add_argument(
        "--captions",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="a model's captions, JSON lines with text and image or question_id; once for each model",
    )
    parser.add_argument(
        "--objects", type=Path, required=True, help="JSON: image -> list of what it shows"
    )
    parser.add_argument(
        "--synonyms",
        type=Path,
        required=True,
        help="JSON: object -> list of further names; or CHAIR's synonyms.txt, a line of names for each object",
    )
    parser.add_argument("--seed", type=not_negative, default=0, help="of intervals (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/ima"), help="default: runs/ima")


def measure_chair(args: argparse.Namespace) -> int:
    """Measure and write; returns the exit code."""
    from ..ima.chair_files import chair_of_files
    from .compare import pairs

    captions = pairs("--captions", args.captions, "FILE")
    files = {name: Path(file) for name, file in captions.items()}
    written, sentences = chair_of_files(
        files, args.objects, args.synonyms, args.out, seed=args.seed
    )
    for name, sentence in sentences.items():
        print(f"{name}: {sentence}")
    print(f"Written: {written}")
    return 0

"""Where a generator looks in some test images: ``python -m llava_vlora.demo.look``, a process of its own."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..benchmarks import find
from ..benchmarks.base import Sample
from ..errors import VLoRAError
from ..evaluation.files import write_json
from ..integration import api

SAMPLES = 12


def pick_samples(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """Questions to show, drawn by chance but from every category in turn, before any answer is seen."""
    draw = random.Random(seed)
    by_category: dict[str, list[Sample]] = {}
    for sample in draw.sample(samples, len(samples)):
        by_category.setdefault(sample.category, []).append(sample)
    turns = sorted(by_category.items())
    chosen: list[Sample] = []
    while len(chosen) < min(count, len(samples)):
        chosen += [group.pop() for _, group in turns if group]
    return chosen[:count]


def look(model: str, samples: Sequence[Sample], device: str) -> dict[str, Any]:
    """Injected layers, and for each sample the share of each patch ``[K, V]``, mean over weight types."""
    loaded = api.load(model, device=device, dtype=torch.float32)
    images = [sample.image.open() for sample in samples if sample.image is not None]
    with torch.inference_mode():
        found = loaded.model.look(api.pixel_values(images, loaded)).double().mean(1)
    return {
        "layers": list(loaded.model.generator.layers),
        "maps": found.cpu().numpy().round(6).tolist(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Look and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m llava_vlora.demo.look")
    parser.add_argument("model", help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="folder of benchmarks")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn questions")
    args = parser.parse_args(argv)
    try:
        samples = pick_samples(find("sceneqa").read(args.data), SAMPLES, args.seed)
        found = {
            "samples": [sample.id for sample in samples],
            **look(args.model, samples, args.device),
        }
        write_json(args.out, found)
    except VLoRAError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

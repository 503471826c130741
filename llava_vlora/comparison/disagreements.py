"""Questions that models answer unequally well: all of them as a file, some of them to look at."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..benchmarks.base import Picture, Sample
from ..errors import ImageError
from ..evaluation.files import write_rows
from .results import Results

FILE, FOLDER = "disagreements.jsonl", "disagreements"
#: Of each way to disagree this many are shown.
SHOWN = 6
_SIDE = 224


def disagreements(results: Results, benchmark: str) -> list[dict[str, Any]]:
    """Every question of a benchmark on which rows with images differ in credit, with all answers."""
    scores = results.scores[benchmark]
    rows = [row for row in results.rows if row in scores]
    seeing = [row for row in rows if row.see]
    credit = {
        row: {str(s["id"]): float(s["credit"]) for s in scores[row]["samples"]} for row in rows
    }
    answers = {row: results.answers(benchmark, row) for row in rows}
    found = []
    for sample in scores[rows[0]]["samples"]:
        key = str(sample["id"])
        if len({credit[row][key] for row in seeing}) < 2:
            continue
        found.append(
            {
                "id": sample["id"],
                "category": sample["category"],
                "image": sample["image"],
                "expected": sample["expected"],
                "prompt": answers[rows[0]][key]["prompt"],
                "answers": {row.label: answers[row][key]["text"] for row in rows},
                "credit": {row.label: credit[row][key] for row in rows},
            }
        )
    return found


def write_disagreements(
    results: Results, benchmark: str, samples: Sequence[Sample], *, seed: int = 0
) -> None:
    """Write all of them, and small pictures of some drawn by chance from each way to disagree.

    Args:
        results: What the run folder holds.
        benchmark: Its name.
        samples: The benchmark's questions, for their images.
        seed: Of the draw.
    """
    found = disagreements(results, benchmark)
    folder = results.folder / benchmark
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    pictures = {str(s.id): s.image for s in samples}
    shown = _drawn(found, seed)
    for row in found:
        row["shown"] = None
        picture = pictures.get(str(row["id"]))
        if id(row) in shown and picture is not None:
            row["shown"] = _thumbnail(picture, folder / FOLDER, shown[id(row)])
    write_rows(folder / FILE, found)


def _drawn(found: Sequence[Mapping[str, Any]], seed: int) -> dict[int, int]:
    """Number of each drawn question, by identity."""
    ways: dict[tuple[float, ...], list[Mapping[str, Any]]] = {}
    for row in found:
        best = max(row["credit"].values())
        ways.setdefault(tuple(c == best for c in row["credit"].values()), []).append(row)
    draw = random.Random(seed)
    chosen = [row for way in ways.values() for row in draw.sample(way, min(SHOWN, len(way)))]
    return {id(row): number for number, row in enumerate(chosen)}


def _thumbnail(picture: Picture, folder: Path, number: int) -> str | None:
    """Write a small picture; returns its name below the run folder's benchmark."""
    try:
        image = picture.open()
    except ImageError:
        return None  # answering has named it
    image.thumbnail((_SIDE, _SIDE), _filter(image))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{number}.jpg"
    image.save(file, quality=85)
    return f"{folder.name}/{file.name}"


def _filter(image: Image.Image) -> Image.Resampling:
    return Image.Resampling.LANCZOS if max(image.size) > _SIDE else Image.Resampling.NEAREST

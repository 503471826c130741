"""Random scenes, their split and their captions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llava_vlora.sceneqa.sizes import DIGITS, SceneQAError, SceneSize

SPLITS = ("train", "validation", "test")
_BUCKETS = 10
#: Places tried before a free layout is begun anew.
_TRIES = 200


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape or digit.

    Attributes:
        kind: shape or digit.
        color: its colour.
        row: grid row of its centre, counted from the top.
        column: grid column of its centre, counted from the left.
        spot: its centre ``(x, y)`` in pixels; None in the middle of its cell.
        scale: its size as a share of the usual one.
    """

    kind: str
    color: str
    row: int
    column: int
    spot: tuple[int, int] | None = None
    scale: float = 1.0

    @property
    def is_digit(self) -> bool:
        """Whether the object is a digit and not a shape."""
        return self.kind in DIGITS

    @property
    def cell(self) -> str:
        """Name of the cell: column letter, then row number, as on a chess board."""
        return f"{chr(ord('a') + self.column)}{self.row + 1}"


@dataclass(frozen=True)
class Scene:
    """Objects of one size of scene, in the reading order of their cells."""

    size: SceneSize
    objects: tuple[SceneObject, ...]

    @property
    def caption(self) -> str:
        """Complete description in reading order, such as ``red circle a1, blue 7 c4``."""
        return ", ".join(f"{o.color} {o.kind} {o.cell}" for o in self.objects) + "."

    @cached_property
    def key(self) -> int:
        """64-bit hash of the caption; equal captions have equal keys on every machine.

        Within a family, too: what a free layout shows was never described in another split of the grid.
        """
        text = f"{self.size.family}: {self.caption}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    @property
    def split(self) -> str:
        """The split the scene belongs to; a function of its content alone.

        Whatever the seed, no scene can be in two splits, so base models that were trained on
        "train" scenes have never seen a held-out one.
        """
        bucket = self.key % _BUCKETS
        return SPLITS[2] if bucket == 0 else SPLITS[1] if bucket == 1 else SPLITS[0]

    def center(self, item: SceneObject) -> tuple[float, float]:
        """``(x, y)`` of an object in pixels, on a grid without the jitter of its cell."""
        if item.spot is not None:
            return item.spot
        cell = self.size.cell_px
        return (item.column + 0.5) * cell, (item.row + 0.5) * cell

    def region(self, item: SceneObject) -> str:
        """Name of the region an object is in, such as ``top left`` or ``center``."""
        span = self.size.cells // self.size.regions
        last = self.size.regions - 1
        row, column = item.row // span, item.column // span
        vertical = "top" if row == 0 else "bottom" if row == last else ""
        horizontal = "left" if column == 0 else "right" if column == last else ""
        return " ".join(part for part in (vertical, horizontal) if part) or "center"


def _cells(size: SceneSize, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Cells for ``count`` objects in reading order."""
    cells = sorted(rng.sample(range(size.cells**2), count))
    return [{"row": cell // size.cells, "column": cell % size.cells} for cell in cells]


def _spots(size: SceneSize, count: int, rng: random.Random) -> list[dict[str, Any]]:
    """Centres for ``count`` objects, the squares of one cell's side around them within the image and apart."""
    side, half = size.cell_px, size.cell_px // 2
    spots: list[tuple[int, int]] = []
    tries = 0
    while len(spots) < count:
        x, y = (rng.randint(half, size.image_px - half) for _ in range(2))
        if all(abs(x - a) >= side or abs(y - b) >= side for a, b in spots):
            spots.append((x, y))
        tries += 1
        if tries % _TRIES == 0:  # what lies there leaves no room for the rest
            spots.clear()
    found = sorted((y // side, x // side, y, x) for x, y in spots)
    return [{"row": r, "column": c, "spot": (x, y)} for r, c, y, x in found]


def sample_scene(size: SceneSize, rng: random.Random, split: str) -> Scene:
    """Draws a random scene of the wanted split.

    Colours and kinds come from a random palette per scene, so that scenes with repeated and with
    unique attributes are both frequent.

    Raises:
        SceneQAError: if the split is unknown.
    """
    if split not in SPLITS:
        raise SceneQAError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    while True:
        colors = rng.sample(size.colors, rng.randint(2, len(size.colors)))
        shapes = rng.sample(size.shapes, rng.randint(1, len(size.shapes)))
        digits = rng.sample(DIGITS, rng.randint(1, len(DIGITS)))
        count = rng.randint(size.min_objects, size.max_objects)
        places = _PLACES[size.layout](size, count, rng)
        objects = tuple(
            SceneObject(
                kind=rng.choice(digits if rng.random() < 0.4 else shapes),
                color=rng.choice(colors),
                **place,
            )
            for place in places
        )
        scene = Scene(size, objects)
        if scene.split == split:
            return scene


_PLACES: dict[str, Callable[[SceneSize, int, random.Random], list[dict[str, Any]]]] = {
    "grid": _cells,
    "free": _spots,
}


def unique_scenes(size: SceneSize, count: int, split: str, rng: random.Random) -> list[Scene]:
    """Draws ``count`` scenes of a split with different captions."""
    scenes: dict[int, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(size, rng, split)
        scenes[scene.key] = scene
    return list(scenes.values())

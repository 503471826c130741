"""Random scenes, their split and their captions."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property

from llava_vlora.sceneqa.sizes import DIGITS, SceneQAError, SceneSize

SPLITS = ("train", "validation", "test")
_BUCKETS = 10


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape or digit in the grid cell (``row``, ``column``), counted from top left."""

    kind: str
    color: str
    row: int
    column: int

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
    """Objects in reading order on a grid of one size."""

    size: SceneSize
    objects: tuple[SceneObject, ...]

    @property
    def caption(self) -> str:
        """Complete description in reading order, such as ``red circle a1, blue 7 c4``."""
        return ", ".join(f"{o.color} {o.kind} {o.cell}" for o in self.objects) + "."

    @cached_property
    def key(self) -> int:
        """64-bit hash of the content; equal scenes have equal keys on every machine."""
        text = f"{self.size.name}: {self.caption}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    @property
    def split(self) -> str:
        """The split the scene belongs to; a function of its content alone.

        Whatever the seed, no scene can be in two splits, so base models that were trained on
        "train" scenes have never seen a held-out one.
        """
        bucket = self.key % _BUCKETS
        return SPLITS[2] if bucket == 0 else SPLITS[1] if bucket == 1 else SPLITS[0]

    def region(self, item: SceneObject) -> str:
        """Name of the region an object is in, such as ``top left`` or ``center``."""
        span = self.size.cells // self.size.regions
        last = self.size.regions - 1
        row, column = item.row // span, item.column // span
        vertical = "top" if row == 0 else "bottom" if row == last else ""
        horizontal = "left" if column == 0 else "right" if column == last else ""
        return " ".join(part for part in (vertical, horizontal) if part) or "center"


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
        cells = rng.sample(range(size.cells**2), rng.randint(size.min_objects, size.max_objects))
        objects = tuple(
            SceneObject(
                kind=rng.choice(digits if rng.random() < 0.4 else shapes),
                color=rng.choice(colors),
                row=cell // size.cells,
                column=cell % size.cells,
            )
            for cell in sorted(cells)
        )
        scene = Scene(size, objects)
        if scene.split == split:
            return scene


def unique_scenes(size: SceneSize, count: int, split: str, rng: random.Random) -> list[Scene]:
    """Draws ``count`` different scenes of a split."""
    scenes: dict[int, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(size, rng, split)
        scenes[scene.key] = scene
    return list(scenes.values())

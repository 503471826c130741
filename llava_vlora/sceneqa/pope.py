"""POPE on SceneQA's scenes: does a model see what is not there? In the layout of the published benchmark.

As in POPE (arXiv 2305.10355, section 5) each image is asked about as many absent objects as present ones, and a split
says which absent ones: ``random``, ``popular`` (most frequent in the images), ``adversarial`` (those that go with what
the image shows). An object is a kind, such as a circle or a 7; in the adversarial split it is a kind of a colour, and
the absent ones are of a colour and a kind that are both there, on different objects.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llava_vlora.sceneqa.dataset import write_lines
from llava_vlora.sceneqa.render import render
from llava_vlora.sceneqa.scene import Scene, unique_scenes
from llava_vlora.sceneqa.sizes import DIGITS, SceneQAError, scene_size

#: Present objects that an image is asked about, at most; and as many absent ones.
_EACH = 3

_Names = Callable[[Scene], list[str]]


def write_pope(root: Path, size: str, seed: int, images: int, held_out: str = "test") -> Path:
    """Write held-out scenes with questions about what is there and what is not; depends on the arguments alone.

    Args:
        root: Folder of benchmarks; ``pope`` is made in it, as ``llava-vlora eval --benchmarks pope`` reads it.
        size: Name of a scene size.
        seed: Of scenes and questions.
        images: Number of scenes.
        held_out: Split of the scenes.

    Returns:
        The folder ``pope``.

    Raises:
        SceneQAError: The size or split is unknown, there is no image, or the folder has another POPE in it.
    """
    if images < 1:
        raise SceneQAError(f"images={images}: must be 1 or more")
    folder = root / "pope"
    marker = folder / "sceneqa"
    if folder.exists() and not marker.exists():
        raise SceneQAError(f"{folder} holds another POPE; choose another folder")
    rng = random.Random(f"pope {size} {seed}")
    scenes = unique_scenes(scene_size(size), images, held_out, rng)
    for place in (folder / "coco", folder / "val2014"):
        place.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{size} {seed} {images} {held_out}\n", encoding="utf-8")
    asked = []
    for name, split in _splits(scenes, rng).items():
        rows = list(_rows(scenes, split))
        write_lines(folder / "coco" / f"coco_pope_{name}.json", rows)
        asked += [{"image": row["image"], "text": row["text"], "category": name} for row in rows]
    numbered = ({"question_id": i, **row} for i, row in enumerate(asked))
    write_lines(folder / "llava_pope_test.jsonl", numbered)
    for index, scene in enumerate(scenes):
        render(scene).save(folder / "val2014" / _image(index))
    return folder


def _image(index: int) -> str:
    return f"scene_{index:06d}.png"


def _rows(scenes: list[Scene], split: _Split) -> Iterator[Mapping[str, object]]:
    """A label for each question, present and absent objects in turn."""
    for index, scene in enumerate(scenes):
        absent = split.absent(scene)
        there = split.present(scene)[: min(_EACH, len(absent))]
        for pair in zip(there, absent, strict=False):
            for item, label in zip(pair, ("yes", "no"), strict=True):
                text = f"Is there a {item}?"
                yield {"image": _image(index), "text": text, "label": label}


@dataclass(frozen=True)
class _Split:
    """What is in a scene and what is not, in the order in which it is asked about."""

    present: _Names
    absent: _Names


def _splits(scenes: list[Scene], rng: random.Random) -> dict[str, _Split]:
    size = scenes[0].size
    kinds, pairs = (*size.shapes, *DIGITS), list(itertools.product(size.colors, size.shapes))
    pairs += itertools.product(size.colors, DIGITS)
    frequent = Counter(kind for scene in scenes for kind in _kinds(scene))

    def missing(scene: Scene) -> list[str]:
        """In random order, so that what is sorted afterwards has no preference among equals."""
        absent = [kind for kind in kinds if kind not in _kinds(scene)]
        return rng.sample(absent, len(absent))

    def crossed(scene: Scene) -> list[str]:
        colors, here = {o.color for o in scene.objects}, _kinds(scene)
        absent = [f"{c} {k}" for c, k in pairs if c in colors and k in here]
        absent = [name for name in absent if name not in _colored(scene)]
        return rng.sample(absent, len(absent))

    return {
        "random": _Split(_kinds, missing),
        "popular": _Split(_kinds, lambda s: sorted(missing(s), key=lambda kind: -frequent[kind])),
        "adversarial": _Split(_colored, crossed),
    }


def _kinds(scene: Scene) -> list[str]:
    return list(dict.fromkeys(o.kind for o in scene.objects))


def _colored(scene: Scene) -> list[str]:
    return list(dict.fromkeys(f"{o.color} {o.kind}" for o in scene.objects))

"""POPE on SceneQA's scenes: does a model see what is not there? In the layout of the published benchmark.

As in POPE (arXiv 2305.10355, section 5) each image is asked about as many absent objects as present ones, and a split
says which absent ones: ``random``, ``popular`` (most frequent in the images), ``adversarial`` (those that go with what
the image shows: here of a colour and a kind that are both there, on different objects). An object is a colour and a
kind.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from llava_vlora.sceneqa.dataset import write_lines
from llava_vlora.sceneqa.render import render
from llava_vlora.sceneqa.scene import Scene, unique_scenes
from llava_vlora.sceneqa.sizes import DIGITS, SceneQAError, scene_size

#: Present objects that an image is asked about, at most; and as many absent ones.
_EACH = 3

Named = tuple[str, str]
_Chosen = Callable[[Scene, int], list[Named]]


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
    for split, absent in _absent(scenes, rng).items():
        rows = list(_rows(scenes, absent))
        write_lines(folder / "coco" / f"coco_pope_{split}.json", rows)
        asked += [{"image": row["image"], "text": row["text"], "category": split} for row in rows]
    numbered = ({"question_id": i, **row} for i, row in enumerate(asked))
    write_lines(folder / "llava_pope_test.jsonl", numbered)
    for index, scene in enumerate(scenes):
        render(scene).save(folder / "val2014" / _image(index))
    return folder


def _image(index: int) -> str:
    return f"scene_{index:06d}.png"


def _rows(scenes: list[Scene], absent: _Chosen) -> Iterator[Mapping[str, object]]:
    """A label for each question, present and absent objects in turn."""
    for index, scene in enumerate(scenes):
        there = _objects(scene)[:_EACH]
        for pair in zip(there, absent(scene, len(there)), strict=True):
            for (color, kind), label in zip(pair, ("yes", "no"), strict=True):
                text = f"Is there a {color} {kind}?"
                yield {"image": _image(index), "text": text, "label": label}


def _objects(scene: Scene) -> list[Named]:
    return list(dict.fromkeys((o.color, o.kind) for o in scene.objects))


def _absent(scenes: list[Scene], rng: random.Random) -> dict[str, _Chosen]:
    """How each split chooses what is not in a scene."""
    size = scenes[0].size
    every = [(color, kind) for color in size.colors for kind in (*size.shapes, *DIGITS)]
    frequent = Counter(pair for scene in scenes for pair in _objects(scene))

    def missing(scene: Scene) -> list[Named]:
        """In random order, so that what is sorted afterwards has no preference among equals."""
        there = set(_objects(scene))
        return rng.sample([pair for pair in every if pair not in there], len(every) - len(there))

    def popular(scene: Scene, count: int) -> list[Named]:
        return sorted(missing(scene), key=lambda pair: -frequent[pair])[:count]

    def adversarial(scene: Scene, count: int) -> list[Named]:
        colors = {color for color, _ in _objects(scene)}
        kinds = {kind for _, kind in _objects(scene)}
        shared = [
            ((color in colors) + (kind in kinds), (color, kind)) for color, kind in missing(scene)
        ]
        return [pair for _, pair in sorted(shared, key=lambda s: -s[0])][:count]

    return {
        "random": lambda scene, count: missing(scene)[:count],
        "popular": popular,
        "adversarial": adversarial,
    }

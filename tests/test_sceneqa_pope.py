"""POPE's layout from SceneQA: the labels are true, and each split asks what its name says."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from llava_vlora.benchmarks import find
from llava_vlora.benchmarks.base import FilePicture, Sample
from llava_vlora.sceneqa import SceneQAError, scene_size, write_pope
from llava_vlora.sceneqa.render import render
from llava_vlora.sceneqa.scene import Scene, SceneObject, sample_scene

pytestmark = pytest.mark.one_stack

IMAGES = 12


@pytest.fixture(scope="module", params=["small", "small-free"])
def size(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, size: str) -> Path:
    root = tmp_path_factory.mktemp("pope")
    write_pope(root, size, 3, IMAGES)
    return root


@pytest.fixture(scope="module")
def scenes(root: Path, size: str) -> dict[str, Scene]:
    """The scene of each picture, found again by what it shows."""
    files = sorted((root / "pope" / "val2014").iterdir())
    wanted = {f.name: Image.open(f).convert("RGB").tobytes() for f in files}
    rng, found = random.Random(f"pope {size} 3"), dict[str, Scene]()
    while len(found) < len(wanted):
        scene = sample_scene(scene_size(size), rng, "test")
        drawn = render(scene).convert("RGB").tobytes()
        found |= {name: scene for name, shown in wanted.items() if shown == drawn}
    return found


@pytest.fixture(scope="module")
def samples(root: Path) -> list[Sample]:
    return find("pope").read(root)


def asked(sample: Sample) -> str:
    return sample.prompt.split("?")[0].removeprefix("Is there a ")


def shown(sample: Sample, scenes: dict[str, Scene]) -> list[SceneObject]:
    assert isinstance(sample.image, FilePicture)
    return list(scenes[sample.image.path.name].objects)


def test_labels_are_true_and_in_balance(samples: list[Sample], scenes: dict[str, Scene]) -> None:
    assert len(scenes) == IMAGES
    for sample in samples:
        *color, kind = asked(sample).split()
        assert len(color) == (sample.category == "adversarial")
        fitting = [o for o in shown(sample, scenes) if o.kind == kind and color in ([], [o.color])]
        assert sample.reference == bool(fitting)
    by_image = Counter((s.category, s.image.name, s.reference) for s in samples if s.image)
    assert {category for category, _, _ in by_image} == {"random", "popular", "adversarial"}
    for (category, name, label), count in by_image.items():
        assert count == by_image[category, name, not label] <= 3
    assert len({(s.category, s.image.name, s.prompt) for s in samples if s.image}) == len(samples)


def test_splits_choose_what_is_absent(samples: list[Sample], scenes: dict[str, Scene]) -> None:
    every = Counter(kind for scene in scenes.values() for kind in {o.kind for o in scene.objects})
    for sample in (s for s in samples if not s.reference):
        objects = shown(sample, scenes)
        if sample.category == "adversarial":
            # Both are there, on different objects.
            color, kind = asked(sample).split()
            assert any(o.color == color for o in objects)
            assert any(o.kind == kind for o in objects)
        if sample.category == "popular":
            same = [s for s in samples if (s.image, s.category) == (sample.image, "popular")]
            taken = {asked(s) for s in same} | {o.kind for o in objects}
            rest = [count for kind, count in every.items() if kind not in taken]
            # Nothing absent that was not asked about is more frequent.
            assert every[asked(sample)] >= max(rest, default=0)


def test_the_same_arguments_write_the_same(root: Path, size: str, tmp_path: Path) -> None:
    write_pope(tmp_path, size, 3, IMAGES)
    write_pope(tmp_path, size, 3, IMAGES)
    for file in (root / "pope").rglob("*"):
        if file.is_file():
            assert (tmp_path / file.relative_to(root)).read_bytes() == file.read_bytes()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(SceneQAError, match="unknown SceneQA size 'big'"):
        write_pope(tmp_path, "big", 0, 1)
    with pytest.raises(SceneQAError, match="images=0"):
        write_pope(tmp_path, "small", 0, 0)
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "llava_pope_test.jsonl").write_text(json.dumps({}))
    with pytest.raises(SceneQAError, match="holds another POPE"):
        write_pope(tmp_path, "small", 0, 1)

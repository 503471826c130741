"""SceneQA with objects anywhere: geometry, answers read by other code, and the hard test."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from transformers import AutoTokenizer

from llava_vlora.benchmarks import find
from llava_vlora.demo.plan import ASSETS
from llava_vlora.errors import DataError
from llava_vlora.sceneqa import (
    CATEGORIES,
    HARD_CATEGORIES,
    SIZES,
    SceneQAError,
    hard_files,
    load_dataset,
    scene_size,
    write_dataset,
)
from llava_vlora.sceneqa.dataset import load_rows
from llava_vlora.sceneqa.hard import SMALL, hard_scenes
from llava_vlora.sceneqa.questions import Question, all_questions
from llava_vlora.sceneqa.render import render
from llava_vlora.sceneqa.scene import Scene, SceneObject, sample_scene
from llava_vlora.sceneqa.sizes import DIGITS, TWO_STEP

pytestmark = pytest.mark.one_stack

FREE = ("small-free", "full-free")
ALL = (*CATEGORIES, TWO_STEP)


def scenes(size: str, count: int = 60, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(scene_size(size), rng, "train") for _ in range(count)]


def at(size: str, kind: str, color: str, x: int, y: int) -> SceneObject:
    cell = scene_size(size).cell_px
    return SceneObject(kind, color, y // cell, x // cell, (x, y))


# --- another reading of the questions --------------------------------------------------------------


class Reader:
    """Answers a question's text from centres in cells; nothing of it is shared with the writer."""

    def __init__(self, scene: Scene) -> None:
        self.size = scene.size
        cell = scene.size.cell_px
        self.things = [
            {
                "kind": o.kind,
                "color": o.color,
                "x": o.spot[0] / cell if o.spot else o.column + 0.5,
                "y": o.spot[1] / cell if o.spot else o.row + 0.5,
            }
            for o in scene.objects
        ]

    def called(self, words: str) -> dict:
        """The only thing of a kind, of a colour and kind, or on a side of another thing."""
        if beside := re.fullmatch(r"object (left of|right of|above|below) the (.+)", words):
            return self.beside(beside[1], self.called(beside[2]))
        *color, kind = words.split()
        fitting = [t for t in self.things if t["kind"] == kind and color in ([], [t["color"]])]
        assert len(fitting) == 1, words
        return fitting[0]

    def beside(self, side: str, base: dict) -> dict:
        axis, sign = {
            "left of": ("x", -1),
            "right of": ("x", 1),
            "above": ("y", -1),
            "below": ("y", 1),
        }[side]
        shifts = {i: sign * (t[axis] - base[axis]) for i, t in enumerate(self.things)}
        # Nothing but the one is on that side at all, and it is so by half a cell.
        (there,) = (i for i, shift in shifts.items() if shift > 0)
        assert shifts[there] >= 0.5
        return self.things[there]

    def which(self, first: dict, second: dict, axis: str, names: tuple[str, str]) -> str:
        assert abs(first[axis] - second[axis]) >= 0.5
        return names[first[axis] > second[axis]]

    def region(self, thing: dict) -> str:
        parts = self.size.regions
        span = self.size.cells / parts
        for axis in "xy":
            assert min(abs(thing[axis] - span * k) for k in range(1, parts)) >= 0.25
        words = []
        for axis, low, high in (("y", "top", "bottom"), ("x", "left", "right")):
            part = int(thing[axis] / span)
            words += [low] if part == 0 else [high] if part == parts - 1 else []
        return " ".join(words) or "center"

    def counted(self, words: str) -> str:
        singular = {s + ("es" if s == "cross" else "s"): s for s in self.size.shapes}
        if words == "objects":
            return str(len(self.things))
        if words == "digits":
            return str(sum(t["kind"] in DIGITS for t in self.things))
        if words.endswith(" objects"):
            return str(sum(t["color"] == words.split()[0] for t in self.things))
        return str(sum(t["kind"] == singular[words] for t in self.things))

    def answer(self, text: str) -> str:
        if m := re.fullmatch(r"What color is the (\w+)\?", text):
            return self.called(m[1])["color"]
        if m := re.fullmatch(r"Which (shape|digit) is (\w+)\?", text):
            digit = m[1] == "digit"
            (one,) = (
                t for t in self.things if (t["kind"] in DIGITS) == digit and t["color"] == m[2]
            )
            return one["kind"]
        if m := re.fullmatch(r"Where is the (.+)\?", text):
            return self.region(self.called(m[1]))
        if m := re.fullmatch(r"Is the (.+) left or right of the (.+)\?", text):
            return self.which(self.called(m[1]), self.called(m[2]), "x", ("left", "right"))
        if m := re.fullmatch(r"Is the (.+) above or below the (.+)\?", text):
            return self.which(self.called(m[1]), self.called(m[2]), "y", ("above", "below"))
        if m := re.fullmatch(r"How many (.+)\?", text):
            return self.counted(m[1])
        if m := re.fullmatch(r"Is there a (.+)\?", text):
            *color, kind = m[1].split()
            same = [t for t in self.things if t["kind"] == kind and color in ([], [t["color"]])]
            return "yes" if same else "no"
        m = re.fullmatch(r"What is (left of|right of|above|below) the (object .+)\?", text)
        assert m, text
        last = self.beside(m[1], self.called(m[2]))
        return f"{last['color']} {last['kind']}"


@pytest.mark.parametrize("size", sorted(SIZES))
def test_answers_are_those_of_another_reader(size: str) -> None:
    asked = Counter[str]()
    for scene in scenes(size):
        reader = Reader(scene)
        for question in all_questions(scene, ALL):
            assert reader.answer(question.text) == question.answer, (scene, question)
            asked[question.category, question.template] += 1
    assert {category for category, _ in asked} == set(ALL)
    assert min(asked[TWO_STEP, form] for form in ("find", "side")) > 20


def test_two_steps_of_a_known_scene() -> None:
    # Square and triangle are nearly level: "above the triangle" names nothing, and nothing is said of their heights.
    size = "small-free"
    scene = Scene(
        scene_size(size),
        (
            at(size, "square", "blue", 8, 10),
            at(size, "triangle", "white", 40, 14),
            at(size, "circle", "red", 30, 40),
        ),
    )
    found = {q.text: q.answer for q in all_questions(scene, (TWO_STEP,))}
    assert found == {
        "What is left of the object below the triangle?": "blue square",
        "Is the square left or right of the object below the triangle?": "left",
    }


def test_where_it_cannot_be_told_nothing_is_asked() -> None:
    size = "small-free"
    near = Scene(
        scene_size(size),
        (at(size, "square", "blue", 10, 25), at(size, "7", "red", 16, 48)),
    )
    asked = {q.text for q in all_questions(near)}
    # Six pixels apart from left to right, the square three above the middle of the image.
    assert "Is the square left or right of the 7?" not in asked
    assert "Is the square above or below the 7?" in asked
    assert "Where is the square?" not in asked
    assert "Where is the 7?" in asked


# --- geometry --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", FREE)
def test_objects_lie_anywhere_in_the_image_and_apart(size: str) -> None:
    grid = scene_size(size)
    half = grid.cell_px // 2
    offsets = set()
    for scene in scenes(size):
        pixels = numpy.asarray(render(scene)).astype(int).max(-1)
        owner = numpy.zeros_like(pixels)
        for number, item in enumerate(scene.objects, start=1):
            assert item.spot is not None
            x, y = item.spot
            assert (item.row, item.column) == (y // grid.cell_px, x // grid.cell_px)
            assert half <= min(x, y)
            assert max(x, y) <= grid.image_px - half
            box = numpy.s_[y - half : y + half, x - half : x + half]
            assert not owner[box].any()
            owner[box] = number
            assert pixels[box].max() > 60
            offsets.add((x % grid.cell_px, y % grid.cell_px))
        assert pixels[owner == 0].max() < 30
        assert scene.objects == tuple(sorted(scene.objects, key=lambda o: (o.row, o.column)))
    # Not on the grid: most places relative to it occur.
    assert len(offsets) > 100


def test_a_crowded_image_is_filled() -> None:
    crowd = replace(scene_size("small-free"), min_objects=8, max_objects=8)
    assert len(sample_scene(crowd, random.Random(0), "train").objects) == 8


def test_small_digits_are_small_and_differ() -> None:
    size = "small-free"
    areas, pictures = {}, set()
    for digit in DIGITS:
        for scale in (1.0, SMALL):
            item = replace(at(size, digit, "white", 30, 30), scale=scale)
            one = Scene(scene_size(size), (item,))
            shown = numpy.asarray(render(one)).max(-1) > 60
            areas[scale] = shown.any(1).sum()
            if scale == SMALL:
                pictures.add(shown.tobytes())
        assert areas[SMALL] == pytest.approx(SMALL * areas[1.0], abs=1.5)
    assert len(pictures) == 10


# --- files -----------------------------------------------------------------------------------------


def test_sets_on_the_grid_are_as_ever(tmp_path: Path) -> None:
    """Bytes of earlier versions: trained models and results refer to these files."""
    for (size, *rest), expected in (
        (("small", 3, 40, 12), "c71df43d1f308c07"),
        (("full", 1, 10, 4), "3292876ba5de0e2e"),
    ):
        write_dataset(tmp_path / size, size, *rest)
        found = hashlib.sha256()
        for file in sorted((tmp_path / size).rglob("*.json*")):
            found.update(file.name.encode() + file.read_bytes())
        assert found.hexdigest()[:16] == expected
        assert not hard_files(tmp_path / size).questions.exists()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("free")
    write_dataset(root / "sceneqa", "small-free", 3, 120, 12)
    return root


def test_the_same_arguments_write_the_same_files(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, "small-free", 3, 120, 12)
    first = {p.relative_to(root / "sceneqa"): p for p in (root / "sceneqa").rglob("*.*")}
    again = {p.relative_to(tmp_path): p for p in tmp_path.rglob("*.*")}
    assert first.keys() == again.keys()
    assert all(first[name].read_bytes() == again[name].read_bytes() for name in first)
    assert len([name for name in first if name.name.startswith("hard_")]) == 24


def test_training_asks_for_two_steps_and_tests_the_usual(root: Path) -> None:
    files = load_dataset(root / "sceneqa")
    samples = load_rows(files.finetune, ("id", "conversations"))
    talks = {str(s["id"]): json.dumps(s["conversations"]) for s in samples}
    pictured = [talk for name, talk in talks.items() if name.startswith("train")]
    assert sum("the object " in talk for talk in pictured) > len(pictured) / 3
    # What is described in words lies in cells, so that the words tell all that is asked.
    described = [talk for name, talk in talks.items() if name.startswith("text")]
    assert len(described) == 6
    assert all("4x4 scene: " in talk for talk in described)
    tested = {str(row["category"]) for row in load_rows(files.test_questions, ("category",))}
    assert tested == set(CATEGORIES)


def test_no_hard_scene_is_in_training_or_another_test(root: Path) -> None:
    size = scene_size("small-free")
    held = {sample_scene(size, random.Random(i), "test").key for i in range(200)}
    drawn = hard_scenes(size, 40, "test", "seed", held)
    keys = [one.scene.key for one in drawn]
    assert len(set(keys)) == len(keys) == 80
    assert not held & set(keys)
    assert {one.scene.split for one in drawn} == {"test"}
    # The same caption on the grid is held out as well: the shipped models never read it.
    for one in drawn:
        plain = tuple(SceneObject(o.kind, o.color, o.row, o.column) for o in one.scene.objects)
        assert Scene(scene_size("small"), plain).split == "test"


def test_hard_categories_ask_what_their_names_say() -> None:
    asked = Counter[str]()
    for one in hard_scenes(scene_size("full-free"), 40, "test", "seed", ()):
        reader = Reader(one.scene)
        small = {o.scale for o in one.scene.objects if o.is_digit} == {SMALL}
        assert {o.scale for o in one.scene.objects if not o.is_digit} <= {1.0}
        for hard in one.asked:
            asked[hard.group] += 1
            text = hard.question.text
            assert reader.answer(text) == hard.question.answer
            assert ("the object" in text) == (hard.group == TWO_STEP)
            assert (hard.group == "small digit") == small
            if small:
                assert re.search(r"\d|digit", text)
        if small:
            assert len({o.kind for o in one.scene.objects if o.is_digit}) > 1
    assert asked["small digit"] > 100
    assert asked[TWO_STEP] == 80
    assert set(asked) == set(HARD_CATEGORIES)


def test_the_benchmark_reads_and_scores_by_hand(root: Path) -> None:
    bench = find("sceneqa-hard")
    samples = bench.read(root)
    statistics = json.loads((root / "sceneqa" / "statistics.json").read_text())
    assert len(samples) == statistics["hard"]["questions"] > 70
    assert {s.category for s in samples} == set(HARD_CATEGORIES)
    right = {s.id: str(s.reference) for s in samples}
    first = samples[0]
    score = bench.score(samples, right | {first.id: "none of them"})
    assert score.metrics["accuracy"] == pytest.approx(100 * (len(samples) - 1) / len(samples))
    same = sum(s.category == first.category for s in samples)
    assert score.breakdown[first.category] == pytest.approx(100 * (same - 1) / same)
    levels = statistics["hard"]["blind"].values()
    expected = sum(level["questions"] * level["chance"] for level in levels)
    assert bench.chance(samples) == pytest.approx(100 * expected / len(samples))
    labels = load_rows(hard_files(root / "sceneqa").answers, ("question_id", "label", "category"))
    assert {row["question_id"]: row["label"] for row in labels} == {
        s.id: s.reference for s in samples
    }


def test_chance_is_that_of_the_forms_asked(root: Path) -> None:
    """Half of the free positions are sides, of two each, and half regions, of four."""
    blind = json.loads((root / "sceneqa" / "statistics.json").read_text())["hard"]["blind"]
    asked = load_rows(hard_files(root / "sceneqa").questions, ("text", "category"))
    places = [str(row["text"]) for row in asked if row["category"] == "free position"]
    regions = sum(text.startswith("Where") for text in places)
    expected = (regions / 4 + (len(places) - regions) / 2) / len(places)
    assert blind["free position"]["chance"] == pytest.approx(expected)


def test_a_set_on_the_grid_has_no_hard_test(tmp_path: Path) -> None:
    write_dataset(tmp_path / "sceneqa", "small", 0, 3, 2)
    with pytest.raises(DataError, match=r"test_hard_answers\.jsonl is missing"):
        find("sceneqa-hard").read(tmp_path)


def test_damage_to_the_hard_test_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path, "small-free", 0, 20, 2)
    files = hard_files(tmp_path)
    lines = files.answers.read_text().splitlines(keepends=True)
    files.answers.write_text("".join(lines[1:]))
    with pytest.raises(SceneQAError, match=r"test_hard_answers\.jsonl have different question ids"):
        load_dataset(tmp_path)
    files.answers.unlink()
    with pytest.raises(SceneQAError, match=r"cannot read .*test_hard_answers\.jsonl"):
        load_dataset(tmp_path)


def test_the_shipped_tokenizer_knows_every_word() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS, use_fast=False)
    texts = {q.text for scene in scenes("full-free", 10) for q in all_questions(scene, (TWO_STEP,))}
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) <= 32
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_questions_have_one_text_each() -> None:
    for scene in scenes("full-free", 20):
        found: list[Question] = all_questions(scene, ALL)
        assert len({q.text for q in found}) == len(set(found))

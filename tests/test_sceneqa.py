"""SceneQA: scenes, questions, files and scoring."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy
import pytest

from llava_vlora.sceneqa import (
    CATEGORIES,
    SIZES,
    SceneQAError,
    SceneQAFiles,
    load_dataset,
    scene_size,
    score,
    write_dataset,
)
from llava_vlora.sceneqa.dataset import load_rows
from llava_vlora.sceneqa.questions import Question, QuestionSampler, all_questions
from llava_vlora.sceneqa.render import render
from llava_vlora.sceneqa.scene import SPLITS, Scene, SceneObject, sample_scene
from llava_vlora.sceneqa.score import blind_levels

pytestmark = pytest.mark.one_stack

SMALL = scene_size("small")
SCENE = Scene(
    SMALL,
    (
        SceneObject("circle", "red", 0, 1),
        SceneObject("circle", "blue", 1, 1),
        SceneObject("7", "red", 3, 3),
    ),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SceneQAFiles:
    return write_dataset(tmp_path_factory.mktemp("scene"), "small", 3, 40, 12)


def answers(scene: Scene) -> dict[str, str]:
    return {q.text: q.answer for q in all_questions(scene)}


def test_sizes_match_their_towers() -> None:
    assert [(s.image_px, s.patches) for s in SIZES.values()] == [(56, 16), (168, 144)] * 2


def test_unknown_size_lists_the_valid_ones() -> None:
    with pytest.raises(SceneQAError, match=r"'big'.*small, full, small-free, full-free"):
        scene_size("big")


def test_caption_and_regions() -> None:
    assert SCENE.caption == "red circle b1, blue circle b2, red 7 d4."
    assert [SCENE.region(o) for o in SCENE.objects] == ["top left", "top left", "bottom right"]
    full = Scene(scene_size("full"), ())
    names = {full.region(SceneObject("7", "red", r, c)) for r in range(6) for c in range(6)}
    assert len(names) == 9
    assert {"center", "top", "left", "bottom right"} <= names


def test_questions_have_the_right_answers() -> None:
    known = answers(SCENE)
    assert known["What color is the 7?"] == "red"
    assert known["Which shape is blue?"] == "circle"
    assert known["Which digit is red?"] == "7"
    assert known["Where is the 7?"] == "bottom right"
    assert known["Is the red circle above or below the blue circle?"] == "above"
    assert known["Is the 7 left or right of the blue circle?"] == "right"
    assert known["How many red objects?"] == "2"
    assert known["How many circles?"] == "2"
    assert known["How many crosses?"] == "0"
    assert known["How many digits?"] == "1"
    assert known["How many objects?"] == "3"
    assert known["Is there a blue circle?"] == "yes"
    assert known["Is there a blue 7?"] == "no"
    assert known["Is there a cross?"] == "no"


def test_ambiguous_questions_are_not_asked() -> None:
    known = answers(SCENE)
    assert "What color is the circle?" not in known
    assert "Where is the circle?" not in known
    assert "Is the red circle left or right of the blue circle?" not in known


@pytest.mark.parametrize("name", sorted(SIZES))
def test_no_text_has_two_answers(name: str) -> None:
    rng = random.Random(0)
    for _ in range(50):
        scene = sample_scene(SIZES[name], rng, "train")
        assert len(answers(scene)) == len(set(all_questions(scene)))


def test_split_is_a_function_of_the_scene() -> None:
    rng = random.Random(0)
    keys = {s: {sample_scene(SMALL, rng, s).key for _ in range(200)} for s in SPLITS}
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]
    with pytest.raises(SceneQAError, match="train, validation, test"):
        sample_scene(SMALL, rng, "dev")


def test_render_puts_colour_only_where_objects_are() -> None:
    pixels = numpy.asarray(render(SCENE)).astype(int)
    cells = pixels.reshape(4, 14, 4, 14, 3)
    filled = {(r, c) for r in range(4) for c in range(4) if cells[r, :, c].max() > 60}
    assert filled == {(o.row, o.column) for o in SCENE.objects}
    red, green, blue = cells[1, 6, 1, 6]
    assert blue > red
    assert blue > green
    assert (pixels == numpy.asarray(render(SCENE))).all()


def test_digits_look_different() -> None:
    images = {
        render(Scene(SMALL, (SceneObject(digit, "white", 0, 0),))).tobytes()
        for digit in "0123456789"
    }
    assert len(images) == 10


def test_sampler_asks_every_category_and_balances_answers() -> None:
    rng = random.Random(0)
    sampler = QuestionSampler(rng)
    drawn = [q for _ in range(400) for q in sampler.draw(sample_scene(SMALL, rng, "train"), 7)]
    for category, most in (("existence", 0.55), ("position", 0.32), ("color", 0.25)):
        asked = Counter(q.answer for q in drawn if q.category == category)
        assert asked.most_common(1)[0][1] < most * sum(asked.values())
    assert {q.category for q in drawn} == set(CATEGORIES)


def test_dataset_is_complete_and_deterministic(files: SceneQAFiles, tmp_path: Path) -> None:
    root = files.pretrain.parent
    assert load_dataset(root) == files
    again = write_dataset(tmp_path, "small", 3, 40, 12)
    names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert all((root / n).read_bytes() == (tmp_path / n).read_bytes() for n in names)
    assert again.image_folder == tmp_path / "images"


def test_training_samples(files: SceneQAFiles) -> None:
    samples = load_rows(files.finetune, ("id", "conversations"))
    with_image = [s for s in samples if "image" in s]
    assert (len(with_image), len(samples)) == (40, 42)
    for sample in samples:
        turns = sample["conversations"]
        assert isinstance(turns, list)
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        first = "<image>\n" if "image" in sample else "4x4 scene: "
        assert turns[0]["value"].startswith(first)
        assert sum("<image>" in t["value"] for t in turns) == ("image" in sample)


def test_seed_changes_the_data(files: SceneQAFiles, tmp_path: Path) -> None:
    other = write_dataset(tmp_path, "small", 4, 40, 12)
    assert other.pretrain.read_bytes() != files.pretrain.read_bytes()


def test_progress_counts_images(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_dataset(tmp_path, "small", 0, 3, 2, progress=lambda *count: seen.append(count))
    assert seen == [(i, 5) for i in range(1, 6)]


def test_bad_counts(tmp_path: Path) -> None:
    with pytest.raises(SceneQAError, match="test_images=0"):
        write_dataset(tmp_path, "small", 0, 3, 0)


def test_damage_is_named(tmp_path: Path) -> None:
    files = write_dataset(tmp_path, "small", 0, 3, 2)
    image = files.image_folder / "test_000001.png"
    image.unlink()
    with pytest.raises(SceneQAError, match=r"test_000001\.png is missing"):
        load_dataset(tmp_path)
    files.finetune.write_text('[{"id": "a"}]')
    with pytest.raises(SceneQAError, match=r"row 0: no field conversations"):
        load_dataset(tmp_path)
    files.finetune.write_text("[{")
    with pytest.raises(SceneQAError, match="not valid JSON"):
        load_dataset(tmp_path)
    files.pretrain.unlink()
    with pytest.raises(SceneQAError, match=r"pretrain\.json is missing"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("prediction", "label", "right"),
    [
        ("Top left.", "top left", True),
        (" 3 ", "3", True),
        ("top  left", "top left", True),
        ("left", "top left", False),
        ("", "red", False),
        ("red", "redder", False),
    ],
)
def test_score(prediction: str, label: str, right: bool) -> None:
    assert score(prediction, label) is right


def test_blind_levels_of_known_questions() -> None:
    train = [Question("color", "shape", "t", a) for a in ("red", "red", "blue")]
    test = [Question("color", "shape", "t", a) for a in ("red", "blue", "blue", "blue")]
    level = blind_levels(train, test)["color"]
    assert (level.questions, level.chance, level.majority, level.prior) == (4, 0.5, 0.75, 0.25)


def test_a_category_without_training_questions_is_refused() -> None:
    asked = [Question("color", "shape", "t", "red"), Question("digit", "digit", "u", "7")]
    with pytest.raises(SceneQAError, match="no training question is about digit"):
        blind_levels(asked[:1], asked)


def test_chance_is_that_of_the_form_of_the_question() -> None:
    sides = [Question("relation", "horizontal", "t", a) for a in ("left", "right")]
    heights = [Question("relation", "vertical", "u", a) for a in ("above", "below")]
    assert blind_levels(sides + heights, sides + heights)["relation"].chance == 0.5


def test_pope_layout_is_read_by_llavas_scorer(files: SceneQAFiles, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llava")
    assert spec is not None
    assert spec.submodule_search_locations
    script = Path(spec.submodule_search_locations[0]) / "eval" / "eval_pope.py"
    annotations = files.pope_annotations / "coco_pope_scene.json"
    labels = [json.loads(line) for line in annotations.read_text().splitlines()]
    questions = load_rows(files.pope_questions, ("question_id", "image", "text", "category"))
    assert [q["question_id"] for q in questions] == [row["question_id"] for row in labels]
    wrong = {**labels[0], "label": "no" if labels[0]["label"] == "yes" else "yes"}
    result = tmp_path / "answers.jsonl"
    result.write_text(
        "".join(
            json.dumps({"question_id": row["question_id"], "text": row["label"]}) + "\n"
            for row in [wrong, *labels[1:]]
        )
    )
    command = [sys.executable, str(script), "--annotation-dir", str(files.pope_annotations)]
    command += ["--question-file", str(files.pope_questions), "--result-file", str(result)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"Accuracy: {(len(labels) - 1) / len(labels)}" in printed

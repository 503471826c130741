"""Writing and reading of SceneQA in the file formats of LLaVA and of the POPE scorer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from llava_vlora.sceneqa.hard import HardFiles, HardScene, by_group, hard_files, hard_scenes
from llava_vlora.sceneqa.questions import Question, QuestionSampler
from llava_vlora.sceneqa.render import render
from llava_vlora.sceneqa.scene import Scene, sample_scene, unique_scenes
from llava_vlora.sceneqa.score import blind_levels, group_levels
from llava_vlora.sceneqa.sizes import CATEGORIES, SIZES, SceneQAError, scene_size

TEXT_ONLY_SHARE = 0.05

Row = dict[str, object]
Progress = Callable[[int, int], None]
#: Image, category of the test, question.
_Asked = tuple[str, str, Question]


@dataclass(frozen=True)
class SceneQAFiles:
    """Paths of one written dataset.

    Attributes:
        image_folder: folder that "image" fields are relative to (LLaVA's ``--image_folder``).
        pretrain: captions for LLaVA's ``--version plain``.
        finetune: multi-turn questions for LLaVA's ``--version v1``.
        test_questions: held-out questions for LLaVA's evaluators.
        test_answers: their labels.
        pope_annotations: folder with the existence labels in POPE's layout.
        pope_questions: the existence questions; ids are those of ``test_questions``.
        statistics: size, seed, counts and blind levels.
    """

    image_folder: Path
    pretrain: Path
    finetune: Path
    test_questions: Path
    test_answers: Path
    pope_annotations: Path
    pope_questions: Path
    statistics: Path


def dataset_files(root: Path) -> SceneQAFiles:
    """Names the files of a dataset under ``root`` without touching them."""
    return SceneQAFiles(
        image_folder=root / "images",
        pretrain=root / "pretrain.json",
        finetune=root / "finetune.json",
        test_questions=root / "test_questions.jsonl",
        test_answers=root / "test_answers.jsonl",
        pope_annotations=root / "pope",
        pope_questions=root / "pope_questions.jsonl",
        statistics=root / "statistics.json",
    )


def describe(scene: Scene) -> str:
    """The scene in words, as it stands in text-only samples instead of the image."""
    return f"{scene.size.cells}x{scene.size.cells} scene: {scene.caption}"


def conversation(questions: Iterable[Question], context: str) -> list[dict[str, str]]:
    """LLaVA conversation turns; ``context`` (image placeholder or text) opens the first one."""
    turns = []
    opening = f"{context}\n"
    for question in questions:
        turns.append({"from": "human", "value": opening + question.text})
        turns.append({"from": "gpt", "value": question.answer})
        opening = ""
    return turns


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_train(files: SceneQAFiles, scenes: list[Scene], rng: random.Random) -> list[Question]:
    """Writes both training files and returns the questions about images."""
    sampler, size = QuestionSampler(rng), scenes[0].size
    captions: list[Row] = []
    samples: list[Row] = []
    asked: list[Question] = []
    for index, scene in enumerate(scenes):
        name = f"train_{index:06d}"
        place = {"id": name, "image": f"{name}.png"}
        talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": scene.caption}]
        captions.append({**place, "conversations": talk})
        drawn = sampler.draw(scene, size.turns, size.categories)
        asked += drawn
        samples.append({**place, "conversations": conversation(drawn, "<image>")})
    for index in range(round(len(scenes) * TEXT_ONLY_SHARE)):
        # A description names cells, so what it describes lies in cells.
        scene = sample_scene(SIZES[size.family], rng, "train")
        drawn = sampler.draw(scene, size.turns, size.categories)
        talk = conversation(drawn, describe(scene))
        samples.append({"id": f"text_{index:06d}", "conversations": talk})
    rng.shuffle(samples)
    files.pretrain.write_text(json.dumps(captions), encoding="utf-8")
    files.finetune.write_text(json.dumps(samples), encoding="utf-8")
    return asked


def _write_test(files: SceneQAFiles, scenes: list[Scene], rng: random.Random) -> list[Question]:
    """Writes one question per category and scene, with labels, and returns the questions."""
    sampler = QuestionSampler(rng)
    asked: list[_Asked] = []
    for index, scene in enumerate(scenes):
        drawn = {q.category: q for q in sampler.draw(scene, len(CATEGORIES))}
        asked += [(_image("test", index), c, drawn[c]) for c in CATEGORIES if c in drawn]
    rows = _write_asked(files.test_questions, files.test_answers, asked)
    pope = [
        {**row, "category": "scene", "label": question.answer}
        for row, (_, category, question) in zip(rows, asked, strict=True)
        if category == "existence"
    ]
    files.pope_annotations.mkdir(exist_ok=True)
    for path, dropped in (
        (files.pope_questions, "label"),
        (files.pope_annotations / "coco_pope_scene.json", "category"),
    ):
        write_lines(path, ({k: v for k, v in row.items() if k != dropped} for row in pope))
    return [question for _, _, question in asked]


def _write_asked(questions: Path, answers: Path, asked: Sequence[_Asked]) -> list[Row]:
    """Writes a test's questions and labels; returns the rows of the questions."""
    rows: list[Row] = [
        {"question_id": i, "image": image, "text": question.text, "category": category}
        for i, (image, category, question) in enumerate(asked)
    ]
    write_lines(questions, rows)
    write_lines(
        answers,
        (
            {"question_id": i, "label": question.answer, "category": category}
            for i, (_, category, question) in enumerate(asked)
        ),
    )
    return rows


def _write_hard(
    files: HardFiles, scenes: Sequence[HardScene], train: Sequence[Question]
) -> dict[str, object]:
    """Writes the hard test; returns its part of the statistics."""
    asked = [
        (_image("hard", i), h.group, h.question) for i, s in enumerate(scenes) for h in s.asked
    ]
    _write_asked(files.questions, files.answers, asked)
    levels = group_levels(train, dict(by_group(scenes)))
    return {
        "images": len(scenes),
        "questions": len(asked),
        "blind": {group: asdict(level) for group, level in levels.items()},
    }


def _image(part: str, index: int) -> str:
    return f"{part}_{index:06d}.png"


def write_dataset(
    out: Path,
    size: str,
    seed: int,
    train_images: int,
    test_images: int,
    progress: Progress | None = None,
    held_out: str = "test",
) -> SceneQAFiles:
    """Writes a dataset that depends on the arguments alone.

    Args:
        out: folder to create; existing files of a dataset are overwritten.
        size: name of a scene size.
        seed: seed of the scenes and questions.
        train_images: number of training scenes.
        test_images: number of held-out scenes; the hard test of a free layout has twice as many of its own.
        progress: called with (images done, images in all).
        held_out: split of the held-out scenes; "validation" to tune without the test scenes.

    Raises:
        SceneQAError: for an unknown size or split, or counts below 1.
    """
    grid = scene_size(size)
    if train_images < 1 or test_images < 1:
        raise SceneQAError(
            f"train_images={train_images}, test_images={test_images}: both must be 1 or more"
        )
    files = dataset_files(out)
    files.image_folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{size} {seed}")
    train = unique_scenes(grid, train_images, "train", rng)
    test = unique_scenes(grid, test_images, held_out, rng)
    train_questions = _write_train(files, train, rng)
    test_questions = _write_test(files, test, rng)
    levels = blind_levels(train_questions, test_questions)
    statistics: Row = {
        "size": size,
        "seed": seed,
        "held_out": held_out,
        "train_images": train_images,
        "test_images": test_images,
        "train_questions": len(train_questions),
        "test_questions": len(test_questions),
        "blind": {category: asdict(level) for category, level in levels.items()},
    }
    shown = {"train": train, "test": test}
    if grid.layout == "free":
        taken = [scene.key for scene in test]
        hard = hard_scenes(grid, test_images, held_out, f"hard {size} {seed}", taken)
        statistics["hard"] = _write_hard(hard_files(out), hard, train_questions)
        shown["hard"] = [one.scene for one in hard]
    files.statistics.write_text(json.dumps(statistics, indent=2) + "\n", encoding="utf-8")
    named = [(_image(part, i), s) for part, scenes in shown.items() for i, s in enumerate(scenes)]
    for done, (name, scene) in enumerate(named, start=1):
        render(scene).save(files.image_folder / name)
        if progress is not None:
            progress(done, len(named))
    return files


def load_rows(path: Path, required: Iterable[str]) -> list[Row]:
    """Reads a ``.json`` list or a ``.jsonl`` file of objects that have the required fields.

    Raises:
        SceneQAError: if the file is missing, is not JSON, or a row lacks a field.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = json.loads(text)
    except OSError as error:
        raise SceneQAError(f"cannot read {path}: {error.strerror}; write the dataset") from error
    except json.JSONDecodeError as error:
        raise SceneQAError(f"{path} is not valid JSON: {error}; write the dataset again") from error
    if not isinstance(rows, list) or not rows:
        raise SceneQAError(f"{path} has no rows; write the dataset again")
    for number, row in enumerate(rows):
        missing = [key for key in required if not isinstance(row, dict) or key not in row]
        if missing:
            raise SceneQAError(f"{path}, row {number}: no field {', '.join(missing)}")
    return rows


def _load_test(questions: Path, answers: Path) -> list[Row]:
    """The rows of a test's questions, whose ids must be those of its labels."""
    asked = load_rows(questions, ("question_id", "image", "text", "category"))
    labels = load_rows(answers, ("question_id", "label", "category"))
    if [row["question_id"] for row in asked] != [row["question_id"] for row in labels]:
        raise SceneQAError(f"{questions} and {answers} have different question ids")
    return asked


def load_dataset(root: Path) -> SceneQAFiles:
    """Checks that a written dataset is complete and consistent.

    Raises:
        SceneQAError: if a file or an image is missing, or questions and labels do not match.
    """
    files = dataset_files(root)
    for entry in fields(files):
        path: Path = getattr(files, entry.name)
        if not path.exists():
            raise SceneQAError(f"{path} is missing; write the dataset again")
    load_rows(files.pretrain, ("id", "image", "conversations"))
    samples = load_rows(files.finetune, ("id", "conversations"))
    questions = _load_test(files.test_questions, files.test_answers)
    hard = hard_files(root)
    if "hard" in json.loads(files.statistics.read_text(encoding="utf-8")):
        questions += _load_test(hard.questions, hard.answers)
    for row in (*samples, *questions):
        if "image" in row and not (files.image_folder / str(row["image"])).is_file():
            raise SceneQAError(f"image {row['image']} is missing in {files.image_folder}")
    return files

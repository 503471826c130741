"""Benchmarks whose answers are read off an image, in their published layout made small, scored by hand."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_vlora.benchmarks import find
from llava_vlora.benchmarks.base import FilePicture, Sample
from llava_vlora.benchmarks.docvqa import anls
from llava_vlora.benchmarks.image_tables import vlmevalkit
from llava_vlora.benchmarks.ocrbench import OCRBench
from llava_vlora.cli import main
from llava_vlora.errors import ImageError
from llava_vlora.sceneqa import write_dataset
from tests.test_benchmarks import WORD, answers, assert_named, encoded, spoil

pytestmark = pytest.mark.one_stack


def table(path: Path, rows: list[list[str]]) -> None:
    """As pandas writes it: cells with quotes or several lines stand in quotes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)


def make_documents(root: Path, name: str) -> None:
    """Three questions about two documents; the second row has the first one's image."""
    bench = find(name)
    rows = [
        ["index", "image", "question", "answer"],
        ["0", encoded(), "What is the date?", "['1 May 1975', 'May 1, 1975']"],
        ["1", "0", "Who signed?", "['J. Smith']"],
        ["2", encoded(), "How many?", "12"],
    ]
    table(root / bench.folder / bench.needs[0].path, rows)


def make_ocrbench(root: Path) -> None:
    """One question each of two tasks of one group, of another group, and a formula."""
    rows = [["index", "image", "question", "answer", "category"]]
    for i, (answer, task) in enumerate(
        [
            ("['CENTRE']", "Regular Text Recognition"),
            ("['joy']", "Handwriting Recognition"),
            ("['Coca\\nCola', 'Pepsi']", "Scene Text-centric VQA"),
            ("['x ^ { 2 } + A']", "Handwritten Mathematical Expression Recognition"),
        ]
    ):
        rows.append([str(i), encoded(), "What is written?", answer, task])
    table(root / "ocrbench" / "OCRBench.tsv", rows)


# --- DocVQA and InfographicVQA ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "right", "expected"),
    [
        ("Smith", ["smith"], 1),
        ("smyth", ["Smith"], 0.8),  # one of five letters
        ("  j.   smith ", ["J. Smith"], 1),
        ("cat", ["dog", "cart"], 0.75),  # one letter of four is missing
        ("abcd", ["abxy"], 0.5),  # exactly the threshold
        ("abcd", ["axyz"], 0),  # a quarter alike
        ("", ["a"], 0),
        ("kitten", ["sitting"], 4 / 7),  # three edits, seven letters
    ],
)
def test_anls(text: str, right: list[str], expected: float) -> None:
    assert anls(text, right) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["docvqa", "infovqa"])
def test_documents_by_hand(name: str, tmp_path: Path) -> None:
    make_documents(tmp_path, name)
    bench = find(name)
    samples = bench.read(tmp_path)
    assert [s.id for s in samples] == ["0", "1", "2"]
    assert samples[0].prompt == "What is the date?" + WORD
    assert samples[1].image == samples[0].image
    assert all(s.image is not None and s.image.open().size == (3, 2) for s in samples)
    # The second answer of the first; one letter of eight wrong; nothing alike.
    score = bench.score(samples, answers(samples, "may 1, 1975", "J. Smyth", "a dozen"))
    assert score.metrics == {"ANLS": pytest.approx(100 * (1 + 7 / 8 + 0) / 3)}
    assert score.credit["1"] == pytest.approx(7 / 8)
    assert bench.chance(samples) is None


# --- OCRBench --------------------------------------------------------------------------------------


def test_ocrbench_by_hand(tmp_path: Path) -> None:
    make_ocrbench(tmp_path)
    bench = find("ocrbench")
    samples = bench.read(tmp_path)
    assert samples[0].prompt == "What is written?" + WORD
    # In a sentence and in other case; not; the first with a line break; the formula without blanks.
    said = answers(samples, "It says centre.", "jay", "coca cola", "$x^{2}+A$")
    score = bench.score(samples, said)
    assert score.metrics == {"score": 3, "percent": 75}
    assert score.breakdown == {
        "Text Recognition": 1,
        "Regular Text Recognition": 1,
        "Handwriting Recognition": 0,
        "Scene Text-centric VQA": 1,
        "Handwritten Mathematical Expression Recognition": 1,
    }
    assert score.notes == ("4 of 1000 questions were asked",)
    # Case counts in formulas.
    assert bench.score(samples, said | {"3": "x^{2}+a"}).credit["3"] == 0


# --- SceneQA ---------------------------------------------------------------------------------------


def make_sceneqa(root: Path) -> None:
    """What the writer makes: seven questions at most about each of two scenes."""
    write_dataset(root / "sceneqa", "small", 3, 20, 2)


def test_sceneqa_by_hand(tmp_path: Path) -> None:
    make_sceneqa(tmp_path)
    bench = find("sceneqa")
    samples = bench.read(tmp_path)
    assert [s.id for s in samples] == list(range(len(samples)))
    assert samples[0].image == FilePicture(tmp_path / "sceneqa" / "images" / "test_000000.png")
    right = {s.id: str(s.reference).upper() + "." for s in samples}
    score = bench.score(samples, right | {samples[0].id: "none of them"})
    assert score.metrics["accuracy"] == pytest.approx(100 * (len(samples) - 1) / len(samples))
    assert score.breakdown[samples[0].category] == pytest.approx(50)
    blind = json.loads((tmp_path / "sceneqa" / "statistics.json").read_text())["blind"]
    expected = sum(level["questions"] * level["chance"] for level in blind.values())
    assert bench.chance(samples) == pytest.approx(100 * expected / len(samples))


# --- mistakes --------------------------------------------------------------------------------------


def make_all(root: Path) -> None:
    make_documents(root, "docvqa")
    make_ocrbench(root)
    make_sceneqa(root)


MISTAKES: dict[str, tuple[str, str, Callable[[str], str], list[str]]] = {
    "double": (
        "docvqa",
        "docvqa/DocVQA_VAL.tsv",
        lambda text: text.replace("\n2\t", "\n1\t"),
        ["DocVQA_VAL.tsv, line 4", "index '1'", "line 3"],
    ),
    "column": (
        "docvqa",
        "docvqa/DocVQA_VAL.tsv",
        lambda text: text.replace("answer", "answers"),
        ["DocVQA_VAL.tsv, line 2", "'answer'"],
    ),
    "no answer": (
        "docvqa",
        "docvqa/DocVQA_VAL.tsv",
        lambda text: text.replace("\t12\n", "\t\n"),
        ["DocVQA_VAL.tsv, line 4", "no answer"],
    ),
    "no image": (
        "docvqa",
        "docvqa/DocVQA_VAL.tsv",
        lambda text: text.replace("1\t0\t", "1\t7\t"),
        ["DocVQA_VAL.tsv, line 3", "image"],
    ),
    "task": (
        "ocrbench",
        "ocrbench/OCRBench.tsv",
        lambda text: text.replace("Regular Text", "Regular text"),
        ["OCRBench.tsv, line 2", "no task of OCRBench"],
    ),
    "label": (
        "sceneqa",
        "sceneqa/test_answers.jsonl",
        lambda text: text.replace('"question_id": 1,', '"question_id": 99,'),
        ["test_questions.jsonl, line 2", "asks 1", "no label"],
    ),
    "labels": (
        "sceneqa",
        "sceneqa/test_questions.jsonl",
        lambda text: text[: text.rstrip().rfind("\n") + 1],
        ["test_answers.jsonl", "labels"],
    ),
    "category": (
        "sceneqa",
        "sceneqa/test_answers.jsonl",
        lambda text: text.replace('"category": "color"', '"category": "colour"', 1),
        ["test_answers.jsonl, line", "'colour' is no category"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_damaged_files_are_named(mistake: str, tmp_path: Path) -> None:
    make_all(tmp_path)
    assert_named(tmp_path, *MISTAKES[mistake])


def test_broken_images_are_named(tmp_path: Path) -> None:
    make_documents(tmp_path, "docvqa")
    file = tmp_path / "docvqa" / "DocVQA_VAL.tsv"
    spoil(file, lambda text: text.replace(encoded(), encoded()[:-8] + "!!!!", 1))
    samples: list[Sample] = find("docvqa").read(tmp_path)
    assert samples[1].image is not None
    with pytest.raises(ImageError, match=r"DocVQA_VAL\.tsv, line 2 is not base64"):
        samples[1].image.open()


# --- llava-vlora eval prepare ----------------------------------------------------------------------


def test_prepare_counts_and_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_all(tmp_path)
    names = ["docvqa", "ocrbench", "sceneqa", "infovqa"]
    command = ["eval", "prepare", *names, "--data", str(tmp_path), "--workers", "1"]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "DocVQA_VAL.tsv: 3 of 5349" in said
    assert "OCRBench.tsv: 4 of 1000" in said
    assert "4 questions: answers can be made, but differ" in said
    assert f"MISSING  {tmp_path}/infovqa/InfoVQA_VAL.tsv" in said
    assert "questions: ready" in said.split("SceneQA (", 1)[1]
    image = next((tmp_path / "sceneqa" / "images").glob("test_*.png"))
    Image.open(image).save(image, "GIF")
    image.write_bytes(image.read_bytes()[:20])
    assert main(["eval", "prepare", "sceneqa", *command[-4:]]) == 1
    assert f"BROKEN  {image}" in capsys.readouterr().out


def test_prepare_knows_the_published_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_ocrbench(tmp_path)
    flags = ["eval", "prepare", "ocrbench", "--data", str(tmp_path)]
    data = (tmp_path / "ocrbench" / "OCRBench.tsv").read_bytes()
    md5 = hashlib.md5(data).hexdigest()
    assert main(flags) == 1
    said = capsys.readouterr().out
    assert f"OTHER FILE  {tmp_path}/ocrbench/OCRBench.tsv: 4 of 1000, MD5 {md5}" in said
    assert "published: e953d98a987cc6e26ef717b61260b778, from opencompass" in said
    assert main([*flags, "--quick"]) == 1
    assert "MD5" not in capsys.readouterr().out
    monkeypatch.setattr(OCRBench, "needs", (vlmevalkit("OCRBench.tsv", 4, "0", md5),))
    assert main(flags) == 0
    assert "here  " in capsys.readouterr().out

"""Benchmarks in their published layout, made small, against scores worked out by hand."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_vlora.benchmarks import find, names
from llava_vlora.benchmarks.base import EncodedPicture, FilePicture, Sample
from llava_vlora.benchmarks.choices import chosen
from llava_vlora.benchmarks.pope import says_yes
from llava_vlora.benchmarks.tables import Row, distinct, tab_separated
from llava_vlora.cli import main
from llava_vlora.errors import ConfigError, DataError, ImageError

pytestmark = pytest.mark.one_stack

WORD = "\nAnswer the question using a single word or phrase."


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_pope(root: Path) -> None:
    """Two splits of four and two questions, in turns."""
    labels: dict[str, list[tuple[str, str]]] = {
        "random": [("dog", "yes"), ("cat", "no"), ("cup", "yes"), ("bus", "no")],
        "popular": [("dog", "yes"), ("car", "no")],
    }
    questions = []
    for split, asked in labels.items():
        rows = []
        for i, (thing, label) in enumerate(asked):
            text, image = f"Is there a {thing} in the image?", f"{i}.jpg"
            rows.append({"question_id": i + 1, "image": image, "text": text, "label": label})
            questions.append(
                {
                    "question_id": len(questions),
                    "image": image,
                    "text": text + WORD,
                    "category": split,
                }
            )
        lines(root / "pope" / "coco" / f"coco_pope_{split}.json", rows)
    questions.append(questions.pop(1))  # the questions of a split need not stand together
    questions.insert(1, questions.pop(-1))
    lines(root / "pope" / "llava_pope_test.jsonl", questions)


def make_scienceqa(root: Path) -> None:
    """Three questions, two with an image."""
    here = root / "scienceqa"
    here.mkdir(parents=True)
    problems = {
        "4": {"choices": ["a", "b"], "answer": 1, "subject": "natural science"},
        "7": {"choices": ["a", "b", "c", "d"], "answer": 0, "subject": "natural science"},
        "9": {"choices": ["a", "b", "c"], "answer": 2, "subject": "language science"},
    }
    rows = [
        {
            "id": "4",
            "image": "4/image.png",
            "conversations": [{"from": "human", "value": "<image>\nWhich?\nA. a\nB. b"}],
        },
        {
            "id": "7",
            "image": "7/image.png",
            "conversations": [{"from": "human", "value": "What?\n<image>"}],
        },
        {"id": "9", "conversations": [{"from": "human", "value": "Who?"}]},
    ]
    (here / "problems.json").write_text(json.dumps(problems | {"1": {}}))
    (here / "pid_splits.json").write_text(json.dumps({"test": ["4", "7", "9"], "train": ["1"]}))
    (here / "llava_test_CQM-A.json").write_text(json.dumps(rows))


def make_textvqa(root: Path) -> None:
    """Three questions about two images."""
    asked = [("x1", "What brand?"), ("x1", "What number?"), ("x2", "What brand?")]
    answers = [
        ["nokia"] * 8 + ["Nokia!", "phone"],
        ["2", "2", "two", "3", "3", "4", "5", "6", "7", "8"],
        ["a"] * 10,
    ]
    data = [
        {"image_id": i, "question": q, "answers": a}
        for (i, q), a in zip(asked, answers, strict=True)
    ]
    here = root / "textvqa"
    here.mkdir(parents=True)
    (here / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": data}))
    rows = [
        {"question_id": i, "image": f"{i}.jpg", "text": f"{q}\nReference OCR token: NOKIA, 2{WORD}"}
        for i, q in asked
    ]
    lines(here / "llava_textvqa_val_v051_ocr.jsonl", rows)


def make_mme(root: Path) -> None:
    """Two images of one task, in the older of its two layouts, and one of another."""
    questions = []
    for image, rows in {
        "count/1.jpg": [("Are there two?", "Yes"), ("Are there three?", "No")],
        "count/2.jpg": [("Is there one?", "Yes"), ("Are there nine?", "No")],
        "posters/images/a.jpg": [("Is it a film?", "Yes"), ("Is it a book?", "No")],
    }.items():
        path = root / "MME" / "MME_Benchmark_release_version" / image
        file = path.with_suffix(".txt")
        if "images" in image:
            file = path.parent.parent / "questions_answers_YN" / "a.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        # The release has one space or two before its own request.
        spaces = " " * (1 + image.startswith("posters"))
        file.write_text("".join(f"{q}{spaces}Please answer yes or no.\t{a}\n" for q, a in rows))
        questions += [
            {
                "question_id": image,
                "image": image,
                "text": q + WORD,
                "category": image.split("/")[0],
            }
            for q, _ in rows
        ]
    lines(root / "MME" / "llava_mme.jsonl", questions)


def make_mmbench(root: Path, file: str = "mmbench/mmbench_dev_20230712.tsv") -> None:
    """Two questions in all orders of their options, one of them with a hint, and one alone."""
    rows = [["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]]
    for index, options, answer, hint, kind in (
        (3, ["red", "blue"], "blue", "nan", "colour"),
        (8, ["one", "two", "three"], "one", "Count.", "number"),
        (9, ["dog", "cat"], "cat", "", "animal"),
    ):
        for i in range(len(options) if index < 9 else 1):
            turned = options[i:] + options[:i]
            cells = [*turned, *["nan"] * (4 - len(turned))]
            image = encoded() if i == 0 else str(index)
            letter = "ABCD"[turned.index(answer)]
            rows.append([str(index + i * 10**6), "What is it?", hint, *cells, letter, kind, image])
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text("".join("\t".join(row) + "\n" for row in rows))


def answers(samples: list[Sample], *texts: str) -> dict[Any, str]:
    return {sample.id: text for sample, text in zip(samples, texts, strict=True)}


# --- POPE ------------------------------------------------------------------------------------------


def test_pope_by_hand(tmp_path: Path) -> None:
    make_pope(tmp_path)
    pope = find("pope")
    samples = pope.read(tmp_path)
    assert [s.category for s in samples] == ["random"] * 4 + ["popular"] * 2
    assert samples[0].prompt == "Is there a dog in the image?" + WORD
    assert samples[0].image == FilePicture(tmp_path / "pope" / "val2014" / "0.jpg")
    # random: yes/yes, yes/no, no/yes, no/no; popular: yes/yes, no/no
    score = pope.score(samples, answers(samples, "Yes", "Yes.", "No, it is not", "no", "yes", "No"))
    assert score.breakdown["random, F1"] == pytest.approx(50)
    assert score.breakdown["random, accuracy"] == pytest.approx(50)
    assert score.breakdown["popular, F1"] == pytest.approx(100)
    assert score.metrics["F1"] == pytest.approx(75)
    assert score.metrics["yes"] == pytest.approx(50)
    assert sum(score.credit.values()) == 4
    never = pope.score(samples, {s.id: "no" for s in samples})
    assert never.metrics["F1"] == 0  # where LLaVA's scorer divides by zero
    assert never.metrics["accuracy"] == pytest.approx(50)


@pytest.mark.parametrize("texts", [("Yes", "Yes.", "No, it is not", "no", "yes", "No. Yes", "")])
def test_pope_is_scored_as_by_llava(texts: tuple[str, ...], tmp_path: Path) -> None:
    make_pope(tmp_path)
    pope = find("pope")
    samples = pope.read(tmp_path)
    given = answers(samples, *texts[: len(samples)])
    rows = [{"question_id": s.id, "text": given[s.id]} for s in samples]
    lines(tmp_path / "answers.jsonl", rows)
    command = [sys.executable, "-m", "llava_vlora.run", "llava.eval.eval_pope"]
    command += ["--annotation-dir", str(tmp_path / "pope" / "coco")]
    command += ["--question-file", str(tmp_path / "pope" / "llava_pope_test.jsonl")]
    command += ["--result-file", str(tmp_path / "answers.jsonl")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = pope.score(samples, given).breakdown
    for part in printed.split("Category: ")[1:]:
        split = part.split(",")[0]
        for name, ours in (("Accuracy", "accuracy"), ("F1 score", "F1"), ("Yes ratio", "yes")):
            value = re.search(rf"{name}: (\S+)", part)
            assert value is not None
            assert found[f"{split}, {ours}"] == pytest.approx(100 * float(value[1]))
    assert not says_yes("There is no dog")
    assert says_yes("I know nothing")


# --- ScienceQA -------------------------------------------------------------------------------------


def test_scienceqa_by_hand(tmp_path: Path) -> None:
    make_scienceqa(tmp_path)
    bench = find("scienceqa")
    samples = bench.read(tmp_path)
    ask = "Answer with the option's letter from the given choices directly."
    assert samples[0].prompt == f"Which?\nA. a\nB. b\n{ask}"
    assert (
        samples[0].row_prompt == f"<image>\nWhich?\nA. a\nB. b\n{ask}"
    )  # as in LLaVA's answer files
    assert samples[1].prompt == f"What?\n{ask}"
    assert samples[2].image is None
    assert samples[2].row_prompt == samples[2].prompt
    score = bench.score(samples, answers(samples, "B", "The answer is B.", "C. c"))
    assert score.metrics == {"IMG accuracy": pytest.approx(50), "accuracy": pytest.approx(200 / 3)}
    assert score.breakdown == {"natural science": pytest.approx(50), "language science": 100}
    assert bench.chance(samples) == pytest.approx(100 * (1 / 2 + 1 / 4) / 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", 0),
        ("B. because", 1),
        ("The answer is C.", 2),
        ("", -1),
        ("AB", -1),
        ("D", -1),
        ("E", -1),
        ("b", -1),
        ("A.", -1),
    ],
)
def test_choices_are_read_as_by_llava(text: str, expected: int) -> None:
    """By its scorer, which is asked with each of three choices as the right one."""
    samples = [Sample(i, "", reference=(i, 3)) for i in range(3)]
    score = find("scienceqa").score(samples, {i: text for i in range(3)})
    assert score.credit == {i: float(i == expected) for i in range(3)}
    assert score.metrics["IMG accuracy"] == 0  # no question has an image, where LLaVA fails


# --- TextVQA ---------------------------------------------------------------------------------------


def test_textvqa_by_hand(tmp_path: Path) -> None:
    make_textvqa(tmp_path)
    bench = find("textvqa")
    samples = bench.read(tmp_path)
    # LLaVA's file has an id for each image.
    assert [s.question_id for s in samples] == ["x1", "x1", "x2"]
    assert len({s.id for s in samples}) == 3
    # "2" is given three times, once as a word: leaving one of the ten out, 3 x 2/3 + 7 x 1 of 10.
    score = bench.score(samples, answers(samples, "Nokia", "2", "b"))
    assert [score.credit[s.id] for s in samples] == [pytest.approx(1), pytest.approx(0.9), 0]
    assert score.metrics["accuracy"] == pytest.approx(100 * 1.9 / 3)
    plain = find("textvqa-no-ocr").read(tmp_path)
    assert plain[0].prompt == "What brand?" + WORD
    assert "NOKIA" in samples[0].prompt


# --- MME -------------------------------------------------------------------------------------------


def test_mme_by_hand(tmp_path: Path) -> None:
    make_mme(tmp_path)
    bench = find("mme")
    samples = bench.read(tmp_path)
    assert [s.reference[1] for s in samples] == [True, False] * 3
    assert samples[0].question_id == samples[1].question_id == "count/1.jpg"
    # count: 3 of 4 questions, 1 of 2 images; posters: 1 of 2 questions, no image.
    score = bench.score(samples, answers(samples, "Yes", "No.", "yes, one", "Yes", "Maybe", "no"))
    assert score.breakdown == {"count": pytest.approx(125), "posters": pytest.approx(50)}
    assert score.metrics == {
        "perception": pytest.approx(175),
        "cognition": 0,
        "sum": pytest.approx(175),
    }
    assert bench.chance(samples) == 150
    assert "existence" in score.notes[0]
    assert sum(score.credit.values()) == 4


# --- MMBench ---------------------------------------------------------------------------------------


def test_mmbench_by_hand(tmp_path: Path) -> None:
    make_mmbench(tmp_path)
    bench = find("mmbench")
    samples = bench.read(tmp_path)
    assert [s.id for s in samples] == [3, 1000003, 8, 1000008, 2000008, 9]
    ask = "Answer with the option's letter from the given choices directly."
    assert samples[0].prompt == f"What is it?\nA. red\nB. blue\n{ask}"
    assert samples[2].row_prompt == "Count.\nWhat is it?\nA. one\nB. two\nC. three"
    assert samples[1].extra == {
        "round_id": 0,
        "options": ["blue", "red"],
        "option_char": ["A", "B"],
    }
    assert all(s.image is not None and s.image.open().size == (3, 2) for s in samples)
    # 3: right in both orders; 8: wrong in one of three; 9: not clear.
    given = answers(samples, "B", "A. blue", "A", "C", "C", "a cat or a dog")
    score = bench.score(samples, given)
    assert score.metrics["circular accuracy"] == pytest.approx(100 / 3)
    assert score.metrics["accuracy of rows"] == pytest.approx(100 * 4 / 6)
    assert score.credit == {3: 1, 8: 0, 9: 0}
    assert score.breakdown == {"colour": 100, "number": 0, "animal": 0}
    assert "1 answers name no option" in score.notes[0]
    assert bench.chance(samples) == pytest.approx(100 * (1 / 4 + 1 / 27 + 1 / 2) / 3)


@pytest.mark.parametrize("name", ["mmbench-cn", "ccbench"])
def test_chinese_tables_ask_in_chinese(name: str, tmp_path: Path) -> None:
    bench = find(name)
    make_mmbench(tmp_path, f"{bench.folder}/{bench.needs[0].path}")
    samples = bench.read(tmp_path)
    assert samples[0].prompt.endswith("请直接回答选项字母。")
    assert (
        bench.score(samples, {s.id: s.reference[0] for s in samples}).metrics["circular accuracy"]
        == 100
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("A.", "A"),
        ("The answer is B.", "B"),
        ("It is a red car", "A"),
        ("A blue thing in there", "B"),
        ("A or B", None),
        ("green", None),
        ("red and blue", None),
        ("", None),
        ("D", None),
    ],
)
def test_choices_are_inferred(text: str, expected: str | None) -> None:
    assert chosen(text, {"A": "red", "B": "blue", "C": "yellow"}) == expected


# --- one question file -----------------------------------------------------------------------------


def make_questions(file: Path, count: int = 3) -> None:
    rows = [
        {"question_id": i, "image": f"{i}.jpg", "text": f"Question {i}?{WORD}"}
        for i in range(count)
    ]
    lines(file, rows)


def test_gqa_by_hand(tmp_path: Path) -> None:
    make_questions(tmp_path / "gqa" / "llava_gqa_testdev_balanced.jsonl")
    truth = {
        str(i): {"answer": answer, "types": {"structural": kind}}
        for i, (answer, kind) in enumerate([("dog", "query"), ("yes", "verify"), ("left", "query")])
    }
    file = tmp_path / "gqa" / "data" / "questions1.2" / "testdev_balanced_questions.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(truth))
    gqa = find("gqa")
    samples = gqa.read(tmp_path)
    assert samples[1].image == FilePicture(tmp_path / "gqa" / "data" / "images" / "1.jpg")
    score = gqa.score(samples, {0: "Dog.", 1: "no", 2: "left side"})
    assert score.metrics == {"accuracy": pytest.approx(100 / 3)}
    assert score.breakdown == {"query": 50, "verify": 0}
    file.write_text(json.dumps({"0": truth["0"]}))
    with pytest.raises(DataError, match=r"line 2 asks 1, which .* lacks"):
        gqa.read(tmp_path)


def test_seed_by_hand(tmp_path: Path) -> None:
    make_questions(tmp_path / "seed_bench" / "llava-seed-bench.jsonl")
    kinds = [("image", 1, "A"), ("image", 1, "B"), ("video", 2, "C")]
    asked = [
        {"question_id": str(i), "data_type": d, "question_type_id": t, "answer": a}
        for i, (d, t, a) in enumerate(kinds)
    ]
    truth = {"questions": asked, "question_type": {"Scene": 1, "Action": 2}}
    (tmp_path / "seed_bench" / "SEED-Bench.json").write_text(json.dumps(truth))
    seed = find("seed")
    samples = seed.read(tmp_path)
    score = seed.score(samples, {0: "A", 1: "B. because", 2: "C"})
    assert score.metrics == {
        "accuracy": pytest.approx(200 / 3),
        "image accuracy": 50,
        "video accuracy": 100,
    }
    assert score.breakdown == {"Scene": 50, "Action": 100}
    assert seed.chance(samples) == 25


def test_upload_files(tmp_path: Path) -> None:
    """What LLaVA's conversion scripts make of the same answers."""
    texts = {0: "The Dog.", 1: "two", 2: "It is a cat"}
    make_questions(tmp_path / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl")
    make_questions(tmp_path / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl", 4)
    make_questions(tmp_path / "vizwiz" / "llava_test.jsonl")
    make_questions(tmp_path / "mm-vet" / "llava-mm-vet.jsonl")
    expected = {
        "vqav2": [
            {"question_id": 0, "answer": "dog"},
            {"question_id": 1, "answer": "2"},
            {"question_id": 2, "answer": "it is cat"},
            {"question_id": 3, "answer": ""},
        ],
        "vizwiz": [
            {"image": "0.jpg", "answer": "dog"},
            {"image": "1.jpg", "answer": "2"},
            {"image": "2.jpg", "answer": "it is cat"},
        ],
        "mm-vet": {"v1_0": "The Dog.", "v1_1": "two", "v1_2": "It is a cat"},
    }
    for name, content in expected.items():
        bench = find(name)
        samples = bench.read(tmp_path)
        (file,) = bench.export(samples, texts, tmp_path / "out" / name, "m")
        assert json.loads(file.read_text()) == content
        assert not bench.score(samples, texts).metrics


# --- mistakes --------------------------------------------------------------------------------------


def spoil(path: Path, change: Callable[[str], str]) -> None:
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))


MISTAKES: dict[str, tuple[str, str, Callable[[str], str], list[str]]] = {
    "double": (
        "pope",
        "pope/llava_pope_test.jsonl",
        lambda text: text.replace('"question_id": 3', '"question_id": 2'),
        ["llava_pope_test.jsonl, line 4", "question_id 2", "line 3"],
    ),
    "json": (
        "pope",
        "pope/coco/coco_pope_random.json",
        lambda text: text.replace("}", "", 1),
        ["coco_pope_random.json, line 1", "JSON"],
    ),
    "moved": (
        "pope",
        "pope/coco/coco_pope_random.json",
        lambda text: text.replace("cup", "cap"),
        ["coco_pope_random.json, line 3", "another question", "llava_pope_test.jsonl, line 3"],
    ),
    "short": (
        "pope",
        "pope/coco/coco_pope_popular.json",
        lambda text: text.split("\n")[0] + "\n",
        ["1 labels", "2 questions of popular"],
    ),
    "key": (
        "textvqa",
        "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        lambda text: text.replace('"image"', '"picture"', 1),
        ["llava_textvqa_val_v051_ocr.jsonl, line 1", "'image'"],
    ),
    "unknown": (
        "textvqa",
        "textvqa/TextVQA_0.5.1_val.json",
        lambda text: text.replace("What number?", "Which?"),
        ["llava_textvqa_val_v051_ocr.jsonl, line 2", "no answers"],
    ),
    "nine": (
        "textvqa",
        "textvqa/TextVQA_0.5.1_val.json",
        lambda text: text.replace('"phone"', '"phone", "eleven"'),
        ["line 1", "11 human answers"],
    ),
    "answer": (
        "mme",
        "MME/MME_Benchmark_release_version/count/2.txt",
        lambda text: text.replace("\tNo", " No"),
        ["count/2.txt, line 2", "Yes or No"],
    ),
    "third": (
        "mme",
        "MME/llava_mme.jsonl",
        lambda text: text[: text.rstrip().rfind("\n") + 1],
        ["1 questions about posters/images/a.jpg"],
    ),
    "option": (
        "mmbench",
        "mmbench/mmbench_dev_20230712.tsv",
        lambda text: text.replace("\tB\tcolour", "\tC\tcolour"),
        ["mmbench_dev_20230712.tsv, line 2", "'C' is none of ['A', 'B']"],
    ),
    "circle": (
        "mmbench",
        "mmbench/mmbench_dev_20230712.tsv",
        lambda text: text.replace("blue\tred", "blue\tgreen"),
        ["[3, 1000003] have different options"],
    ),
    "split": (
        "scienceqa",
        "scienceqa/pid_splits.json",
        lambda text: text.replace('"9"', '"1"'),
        ["llava_test_CQM-A.json", "pid_splits.json", "1 and 1"],
    ),
}


def assert_named(
    root: Path, name: str, file: str, change: Callable[[str], str], parts: Sequence[str]
) -> None:
    """A file of a benchmark can be read until it is changed; the error then has all parts."""
    find(name).read(root)
    spoil(root / file, change)
    with pytest.raises(DataError) as caught:
        find(name).read(root)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_damaged_files_are_named(mistake: str, tmp_path: Path) -> None:
    for make in (make_pope, make_scienceqa, make_textvqa, make_mme, make_mmbench):
        make(tmp_path)
    assert_named(tmp_path, *MISTAKES[mistake])


@pytest.mark.parametrize("name", names())
def test_missing_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is missing.*eval prepare"):
        find(name).read(tmp_path)


def test_unknown_benchmark_lists_the_valid() -> None:
    with pytest.raises(ConfigError, match=r"'pop'.*'pope'.*'textvqa'"):
        find("pop")


# --- tables with images ----------------------------------------------------------------------------


def encoded() -> str:
    data = io.BytesIO()
    Image.new("RGB", (3, 2), (255, 0, 0)).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def test_tables_hold_cells_of_several_lines_and_images(tmp_path: Path) -> None:
    file = tmp_path / "t.tsv"
    file.write_text(f'index\tquestion\timage\n1\t"two\nlines"\t{encoded()}\n2\t\tbroken!\n')
    rows = tab_separated(file, ("index", "image"), "a table")
    assert [row["question"] for row in rows] == ["two\nlines", ""]
    first, second = (EncodedPicture(row["image"], row.place) for row in rows)
    assert first.open().size == (3, 2)
    with pytest.raises(ImageError, match=r"t\.tsv, line 4 is not base64"):
        second.open()
    cut = EncodedPicture(encoded()[:40], "t.tsv, line 9")
    with pytest.raises(ImageError, match="line 9 cannot be read as an image"):
        cut.open()
    file.write_text("index\timage\n1\ta\tb\n")
    with pytest.raises(DataError, match="line 2: has another number of cells"):
        tab_separated(file, ("index",), "a table")


# --- llava-vlora eval prepare ----------------------------------------------------------------------


def test_prepare_says_what_is_missing_and_where_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "prepare", "pope", "mme", "--data", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert f"MISSING  {tmp_path}/pope/coco: labels" in said
    assert "github.com/AoiDragon/POPE" in said
    assert "MISSING" in said.split("MME", 1)[1]
    assert main(["eval", "prepare", "pop"]) == 2
    assert "'pope'" in capsys.readouterr().err


def test_prepare_counts_and_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pope(tmp_path)
    images = tmp_path / "pope" / "val2014"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (30, 30)).save(images / f"{i}.jpg")
    command = ["eval", "prepare", "pope", "--data", str(tmp_path), "--workers", "1"]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "OTHER COUNT" in said
    assert "llava_pope_test.jsonl: 6 of 8910" in said
    assert "6 questions: answers can be made, but differ" in said
    (images / "2.jpg").write_bytes((images / "2.jpg").read_bytes()[:50])
    assert main(command) == 1
    assert f"BROKEN  {images}/2.jpg" in capsys.readouterr().out
    assert main([*command, "--quick"]) == 1
    assert "BROKEN" not in capsys.readouterr().out
    spoil(
        tmp_path / "pope" / "coco" / "coco_pope_random.json", lambda text: text.replace("cup", "c")
    )
    assert main(command) == 1
    assert "DAMAGED" in capsys.readouterr().out


def test_what_eval_needs_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model", "x"]) == 2
    assert "--benchmarks" in capsys.readouterr().err


def test_ids_are_numbers_or_texts_and_differ(tmp_path: Path) -> None:
    rows = [Row({"id": i}, f"f, line {n}") for n, i in enumerate((1, "1", [1], 1), start=1)]
    distinct(rows[:2], "id")
    with pytest.raises(DataError, match=r"f, line 3: the id \[1\] is neither a number nor a text"):
        distinct(rows, "id")
    with pytest.raises(DataError, match="f, line 4 has the id 1 of f, line 1"):
        distinct([rows[0], rows[3]], "id")


# --- intervals of headlines -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pope", "scienceqa", "mme"])
def test_headlines_of_weights_are_those_of_the_scorer(name: str, tmp_path: Path) -> None:
    """With weight 1 the figure is the headline; images drawn twice or never count so."""
    make = {"pope": make_pope, "scienceqa": make_scienceqa, "mme": make_mme}[name]
    make(tmp_path)
    bench = find(name)
    samples = bench.read(tmp_path)
    for flip in range(4):
        texts = {s.id: ("yes", "No", "B", "A")[(i + flip) % 4] for i, s in enumerate(samples)}
        score = bench.score(samples, texts)
        headline = bench.headline(samples, score.credit)
        assert headline is not None
        found = headline({s.id: 1.0 for s in samples})
        assert found == pytest.approx(next(iter(score.metrics.values())))
        assert headline({s.id: 2.0 for s in samples}) == pytest.approx(found)
        images = {s.image.name for s in samples if s.image is not None}
        without = sorted(images)[0]
        kept = [s for s in samples if s.image is None or s.image.name != without]
        weights = {s.id: float(s in kept) for s in samples}
        rest = bench.score(kept, {s.id: texts[s.id] for s in kept})
        if {s.category for s in kept} == {s.category for s in samples}:
            expected = next(iter(rest.metrics.values()))
            assert headline(weights) == pytest.approx(expected)

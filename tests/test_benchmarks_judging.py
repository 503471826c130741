"""Benchmarks that a language model usually judges, here by exact rules: scores worked out by hand."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from llava_vlora.benchmarks import find
from llava_vlora.benchmarks.base import FilePicture
from llava_vlora.benchmarks.choices import chosen
from llava_vlora.benchmarks.hallusionbench import says
from llava_vlora.benchmarks.mmmu import says as mmmu_says
from llava_vlora.cli import main
from llava_vlora.errors import DataError
from tests.test_benchmarks import WORD, answers, assert_named, encoded, make_mmbench
from tests.test_benchmarks_reading import table

pytestmark = pytest.mark.one_stack

LETTER = "\nAnswer with the option's letter from the given choices directly."

#: Two figures of two questions; a set without a figure (0) and with one; the truth of each.
HALLUSION = [
    ("VD_illusion_1_0_0_0", True),
    ("VD_illusion_1_0_0_1", False),
    ("VD_illusion_2_0_1_0", False),
    ("VD_illusion_2_0_1_1", True),
    ("VS_chart_0_3_0_0", True),
    ("VS_chart_1_3_1_0", True),
]


def make_hallusion(root: Path) -> None:
    """VLMEvalKit's table and the publishers' own files."""
    rows = [["index", "category", "l2-category", "question", "answer", "image"]]
    own = []
    for name, truth in HALLUSION:
        kind, sub, visual, group, figure, question = name.split("_")
        text = f"Is it {question}?"
        image = encoded() if visual != "0" else ""
        rows.append([name, kind, f"{kind}_{sub}", text, "Yes" if truth else "No", image])
        own.append(
            {
                "category": kind,
                "subcategory": sub,
                "visual_input": visual,
                "set_id": group,
                "figure_id": figure,
                "question_id": question,
                "question": text,
                "gt_answer": str(int(truth)),
                "filename": f"./{kind}/{sub}/{group}_{figure}.png" if visual != "0" else None,
            }
        )
    here = root / "hallusionbench"
    table(here / "HallusionBench.tsv", rows)
    (here / "HallusionBench.json").write_text(json.dumps(own))
    for row in own:
        if row["filename"]:
            path = here / "hallusion_bench" / row["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (3, 2)).save(path)


#: Question, options, answer, images.
MMMU: list[tuple[str, list[str], str, int]] = [
    ("<image 1> What is it?", ["$6", "$7", "$8"], "B", 1),
    ("Which is <image 1>?", ["<image 2>", "<image 3>"], "A", 3),
    ("How much?", [], "['24/7', '3.429']", 1),
]


def make_mmmu(root: Path) -> None:
    """VLMEvalKit's table, with a row of the development split, and parquet files of two subjects."""
    header = ["index", "question", "answer", "A", "B", "C", "category", "l2-category"]
    rows = [[*header, "split", "image", "image_path"]]
    for i, (question, options, answer, images) in enumerate([MMMU[0], *MMMU]):
        cells = [*options, *[""] * (3 - len(options))]
        image = str([encoded()] * images) if images > 1 else encoded()
        split = "validation" if i else "dev"
        rows.append(
            [str(i), question, answer, *cells, "Business", "Finance", split, image, "a.jpg"]
        )
    table(root / "mmmu" / "MMMU_DEV_VAL.tsv", rows)
    for number, (question, options, answer, images) in enumerate(MMMU):
        subject = "Finance" if number < 2 else "Art"
        row: dict[str, Any] = {"id": f"validation_{subject}_{number}", "question": question}
        row |= {"options": str(options), "answer": answer}
        for i in range(1, 8):
            found = {"bytes": png(), "path": f"{i}.png"} if i <= images else None
            row[f"image_{i}"] = found
        path = root / "mmmu" / "MMMU" / subject / f"validation-{number:05}-of-00003.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        texts = [(name, pyarrow.string()) for name in ("id", "question", "options", "answer")]
        schema = pyarrow.schema([*texts, *((f"image_{i}", kind) for i in range(1, 8))])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row], schema), path)


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (3, 2), (255, 0, 0)).save(data, "PNG")
    return data.getvalue()


# --- HallusionBench --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hallusionbench", "hallusionbench-json"])
def test_hallusionbench_by_hand(name: str, tmp_path: Path) -> None:
    make_hallusion(tmp_path)
    bench = find(name)
    samples = bench.read(tmp_path)
    assert [s.id for s in samples] == [index for index, _ in HALLUSION]
    assert [s.image is None for s in samples] == [False] * 4 + [True, False]
    assert samples[0].prompt == "Is it 0?"
    # Of the figures with an image: both right; one of two; one that is unclear. Without: uncertain, which is right.
    said = answers(samples, "Yes.", "No, it is not", "no", "No", "I cannot tell", "Yes or no?")
    score = bench.score(samples, said)
    assert score.metrics == {
        "average": pytest.approx((60 + 100 / 3 + 100 / 3) / 3),
        "aAcc": 60,  # 3 of 5 answers
        "fAcc": pytest.approx(100 / 3),  # of set 0 the first; of set 3 not
        "qAcc": pytest.approx(100 / 3),  # question 0 of set 0 with both figures
        "aAcc with text-only": pytest.approx(100 * 4 / 6),
        "qAcc with text-only": pytest.approx(100 / 3),
    }
    assert score.breakdown["VD, aAcc"] == 75
    assert score.breakdown["VS, fAcc"] == 0
    assert score.breakdown["VD_illusion"] == 75
    assert score.credit["VS_chart_0_3_0_0"] == 1
    assert "judges: 1 answers about an image are neither" in score.notes[0]
    wrong = bench.score(samples, said | {"VS_chart_0_3_0_0": "No"})
    assert wrong.credit["VS_chart_0_3_0_0"] == 0
    # A coin: half; figures of two, two and one question; questions with two, two and one figure.
    lucky = 100 * (1 / 4 + 1 / 4 + 1 / 2) / 3
    assert bench.chance(samples) == pytest.approx((50 + 2 * lucky) / 3)
    # The first questions of the publishers' file are text-only: --limit must not fail.
    alone = samples[4:5]
    assert bench.score(alone, said).metrics["aAcc with text-only"] == 100
    assert bench.chance(alone) == 50


def test_hallusionbench_names_its_figures(tmp_path: Path) -> None:
    make_hallusion(tmp_path)
    image = find("hallusionbench-json").read(tmp_path)[0].image
    here = tmp_path / "hallusionbench" / "hallusion_bench"
    assert image == FilePicture(here / "VD" / "illusion" / "0_0.png")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", True),
        ("no.", False),
        ("No, the left one is not", False),
        ("It is not", None),
        ("Yes and no", None),
        ("I know nothing", None),
        ("", None),
    ],
)
def test_yes_or_no_is_a_word(text: str, expected: bool | None) -> None:
    assert says(text) is expected


# --- MMMU ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mmmu", "mmmu-parquet"])
def test_mmmu_by_hand(name: str, tmp_path: Path) -> None:
    make_mmmu(tmp_path)
    bench = find(name)
    samples = sorted(bench.read(tmp_path), key=lambda s: s.prompt)
    assert [s.prompt for s in samples] == [
        "<image 1> What is it?\nA. $6\nB. $7\nC. $8" + LETTER,
        "How much?" + WORD,
        "Which is <image 1>?\nA. <image 2>\nB. <image 3>" + LETTER,
    ]
    assert all(s.image is not None and s.image.open().size == (3, 2) for s in samples)
    score = bench.score(samples, answers(samples, "B", "The answer is 3.43.", "the second"))
    assert score.metrics == {
        "accuracy": pytest.approx(200 / 3),
        "multiple choice accuracy": 50,
        "open accuracy": 100,
    }
    assert score.notes == (
        "1 questions have several images: the first is shown",
        "no language model judges: 1 answers name no option and count as wrong",
    )
    assert bench.chance(samples) == pytest.approx(100 * (1 / 3 + 0 + 1 / 2) / 3)
    subjects = {"Finance"} if name == "mmmu" else {"Finance", "Art"}
    assert set(score.breakdown) == subjects


@pytest.mark.parametrize(
    ("text", "right", "expected"),
    [
        ("12.97", ["12.97"], True),
        ("It is about 12.971 kips", ["12.97"], True),  # two decimals
        ("12.98", ["12.97"], False),
        ("1,464", ["1464"], True),
        ("x = 2 + 3 = 5", ["5"], True),
        ("2 of 5", ["7"], False),
        ("The result is Transformation", ["Transformation"], True),
        ("so it is a C", ["C"], True),
        ("Chicago", ["C"], False),  # a letter alone is a word
        ("5e3 units", ["5000"], True),
        ("Tampa", ["Tampa", "Florida"], True),
        ("", ["4"], False),
        ("4 cats\nthe answer is 5", ["4"], False),  # a line that has "answer is" says it
    ],
)
def test_open_answers_are_read_as_by_mmmu(text: str, right: list[str], expected: bool) -> None:
    assert mmmu_says(text, right) is expected


def test_a_letter_at_the_end_is_no_article() -> None:
    options = {"A": "red", "B": "blue"}
    assert chosen("The answer is (A).", options) == "A"
    assert chosen("It is A blue thing", options) == "B"


# --- MMBench's upload file -------------------------------------------------------------------------


def _llavas_workbook(folder: Path, questions: Path, said: dict[Any, str]) -> pandas.DataFrame:
    """What LLaVA's convert_mmbench_for_submission.py does, told in pandas."""
    frame = pandas.read_table(questions)
    dropped = ["hint", "category", "source", "image", "comment", "l2-category"]
    kept = frame.drop(columns=dropped)
    kept.insert(6, "prediction", [said.get(index) for index in frame["index"]])
    kept.to_excel(folder / "theirs.xlsx", index=False, engine="openpyxl")
    return pandas.read_excel(folder / "theirs.xlsx", engine="openpyxl")


def _without_answers(file: Path, more: bool = False) -> None:
    """Take the answers out; add the columns of the published file that LLaVA's script drops."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.reader(opened, delimiter="\t"))
    column = rows[0].index("answer")
    for row in rows[1:]:
        row[column] = ""
    if more:
        for row, cells in zip(rows, [["source", "comment", "l2-category", "split"]], strict=False):
            row += cells
        for row in rows[1:]:
            row += ["here", "nan", "attribute", "dev"]
    table(file, rows)


def test_mmbench_upload_is_llavas(tmp_path: Path) -> None:
    make_mmbench(tmp_path)
    file = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    _without_answers(file, more=True)
    bench = find("mmbench")
    samples = bench.read(tmp_path)
    said = answers(samples, "A", "=1+1", "It is\nC", "B\x07", "C", "B")
    assert bench.score(samples, said).metrics == {}
    (path,) = bench.export(samples, said, tmp_path / "out", "m")
    assert path.name == "m.upload.xlsx"
    ours = pandas.read_excel(path, engine="openpyxl")
    # Two cells of which pandas makes a formula, or which it refuses, are kept as text here.
    plain = said | {samples[1].id: "x", samples[3].id: "B"}
    theirs = _llavas_workbook(tmp_path, file, plain)
    assert list(ours["prediction"]) == ["A", "=1+1", "It is\nC", "B", "C", "B"]
    assert list(ours.columns) == list(theirs.columns)
    pandas.testing.assert_frame_equal(
        ours.drop(columns="prediction"), theirs.drop(columns="prediction"), check_dtype=False
    )
    # With --limit the other rows stay without an answer.
    bench.export(samples[:2], {s.id: said[s.id] for s in samples[:2]}, tmp_path / "out", "m")
    sheet = openpyxl.load_workbook(path).active
    assert [cell.value for cell in sheet["G"]] == ["prediction", "A", "=1+1", *[None] * 4]


_HIDDEN = """
import sys
sys.modules["openpyxl"] = sys.modules["pyarrow"] = sys.modules["pyarrow.parquet"] = None
from llava_vlora.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_packages_of_the_extra_are_named(tmp_path: Path) -> None:
    """Before any answer is made."""
    make_mmmu(tmp_path)
    make_mmbench(tmp_path)
    _without_answers(tmp_path / "mmbench" / "mmbench_dev_20230712.tsv")
    for name, package in (("mmbench", "openpyxl"), ("mmmu-parquet", "pyarrow")):
        command = [sys.executable, "-c", _HIDDEN, "eval", "prepare", name, "--data", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert f"needs {package}" in done.stderr
        assert "pip install llava-vlora[bench]" in done.stderr


def test_scores_do_not_need_the_extra(tmp_path: Path) -> None:
    make_mmbench(tmp_path)
    code = (
        "import sys, json, pathlib\nsys.modules['openpyxl'] = None\n"
        "from llava_vlora.benchmarks import find\nbench = find('mmbench')\n"
        "samples = bench.read(pathlib.Path(sys.argv[1]))\nsaid = {s.id: s.reference[0] for s in samples}\n"
        "score = bench.score(samples, said)\n"
        "print(json.dumps([score.metrics, score.notes, bench.export(samples, said, None, 'm')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    metrics, notes, files = json.loads(done.stdout)
    assert metrics["circular accuracy"] == 100
    assert "llava-vlora[bench]" in notes[0]
    assert files == []


# --- mistakes --------------------------------------------------------------------------------------


MISTAKES: dict[str, tuple[str, str, Callable[[str], str], list[str]]] = {
    "index": (
        "hallusionbench",
        "hallusionbench/HallusionBench.tsv",
        lambda text: text.replace("VD_illusion_1_0_0_0", "VD_illusion_1_0_0"),
        ["HallusionBench.tsv, line 2", "six parts"],
    ),
    "yes": (
        "hallusionbench",
        "hallusionbench/HallusionBench.tsv",
        lambda text: text.replace("\tYes\t", "\tTrue\t", 1),
        ["HallusionBench.tsv, line 2", "'True' is none of ('No', 'Yes')"],
    ),
    "image": (
        "hallusionbench",
        "hallusionbench/HallusionBench.tsv",
        lambda text: text.replace("\tNo\t" + encoded(), "\tNo\t", 1),
        ["HallusionBench.tsv, line 3", "image"],
    ),
    "twice": (
        "hallusionbench-json",
        "hallusionbench/HallusionBench.json",
        lambda text: text.replace('"question_id": "1"', '"question_id": "0"', 1),
        ["HallusionBench.json, question 1", "question 0"],
    ),
    "key": (
        "hallusionbench-json",
        "hallusionbench/HallusionBench.json",
        lambda text: text.replace('"gt_answer"', '"answer"', 1),
        ["HallusionBench.json, question 0", "'gt_answer'"],
    ),
    "file": (
        "hallusionbench-json",
        "hallusionbench/HallusionBench.json",
        lambda text: text.replace('"./VD/illusion/0_0.png"', "null", 1),
        ["HallusionBench.json, question 0", "names no file"],
    ),
    "option": (
        "mmmu",
        "mmmu/MMMU_DEV_VAL.tsv",
        lambda text: text.replace("\tA\t<image 2>", "\tC\t<image 2>"),
        ["MMMU_DEV_VAL.tsv, line 4", "'C' is none of ['A', 'B']"],
    ),
    "split": (
        "mmmu",
        "mmmu/MMMU_DEV_VAL.tsv",
        lambda text: text.replace("validation", "test"),
        ["MMMU_DEV_VAL.tsv", "no row whose split is 'validation'"],
    ),
    "lost": (
        "mmmu",
        "mmmu/MMMU_DEV_VAL.tsv",
        lambda text: text.replace("l2-category", "subject"),
        ["MMMU_DEV_VAL.tsv, line 2", "'l2-category'"],
    ),
    "cell": (
        "mmbench",
        "mmbench/mmbench_dev_20230712.tsv",
        lambda text: text.replace("\tcolour\t3\n", "\tcolour\t5\n"),
        ["mmbench_dev_20230712.tsv, line 3", "image"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_damaged_files_are_named(mistake: str, tmp_path: Path) -> None:
    for make in (make_hallusion, make_mmmu, make_mmbench):
        make(tmp_path)
    assert_named(tmp_path, *MISTAKES[mistake])


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    make_mmmu(tmp_path)
    file = next((tmp_path / "mmmu" / "MMMU" / "Art").iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    bench = find("mmmu-parquet")
    with pytest.raises(DataError, match=rf"{file.name} cannot be read as parquet"):
        bench.read(tmp_path)
    row = {"id": "validation_Art_2", "question": "?", "options": "[]", "answer": "1"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
    with pytest.raises(DataError, match=rf"{file.name}, row 1: lacks 'image_1'"):
        bench.read(tmp_path)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row | {"image_1": None}]), file)
    with pytest.raises(DataError, match=rf"{file.name}, row 1: has no image"):
        bench.read(tmp_path)


@pytest.mark.parametrize("name", ["hallusionbench", "hallusionbench-json", "mmmu", "mmmu-parquet"])
def test_prepare_reads(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_hallusion(tmp_path)
    make_mmmu(tmp_path)
    code = main(["eval", "prepare", name, "--data", str(tmp_path), "--workers", "1"])
    said = capsys.readouterr().out
    # Only this one has no published number of rows nor hash to miss.
    assert code == (0 if name == "mmmu-parquet" else 1)
    questions = 6 if name.startswith("hallusion") else 3
    assert f"{questions} questions: " in said
    assert "BROKEN" not in said

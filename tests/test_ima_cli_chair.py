"""``llava-vlora ima chair``: files in, shares with intervals out; each mistake names its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_vlora.cli import main
from llava_vlora.errors import DataError
from llava_vlora.ima.chair_files import chair_metrics
from llava_vlora.ima.hallucination import chair

#: In the layout of the file that is published with CHAIR, with its stray spaces.
TABLE = "dog, puppy \ncow, cattle,  ox\nhot dog\nmouse\nperson, man, woman\n\nknife\n"
OBJECTS = {"1.jpg": ["dog", "man"], "2.jpg": ["mouse"], "3.jpg": []}
GOOD = {"1.jpg": "Two men and a puppy.", "2.jpg": "A mouse.", "3.jpg": "A red sky."}
POOR = {"1.jpg": "A woman eats a hot dog.", "2.jpg": "Mice, knives and an ox.", "3.jpg": "A dog."}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write(tmp_path / "good.jsonl", GOOD)
    write(tmp_path / "poor.jsonl", POOR)
    (tmp_path / "objects.json").write_text(json.dumps(OBJECTS))
    (tmp_path / "synonyms.txt").write_text(TABLE)
    return tmp_path


def write(file: Path, captions: dict[str, str]) -> None:
    """As LLaVA's evaluators write answers; some write the image too."""
    rows = [{"question_id": i, "image": n, "text": t} for i, (n, t) in enumerate(captions.items())]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, *more: object, captions: tuple[str, ...] = ("good", "poor")) -> int:
    words: list[object] = ["ima", "chair", "--out", folder / "out"]
    for name in captions:
        words += ["--captions", f"{name}={folder / name}.jsonl"]
    given = {"--objects": folder / "objects.json", "--synonyms": folder / "synonyms.txt"}
    given |= dict(zip(more[::2], more[1::2], strict=True))  # type: ignore[arg-type]
    return main([str(w) for w in (*words, *(w for pair in given.items() for w in pair))])


def read(folder: Path) -> Any:
    return json.loads((folder / "out" / "chair.json").read_text())


def test_shares_by_hand(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(files) == 0
    found = read(files)
    good, poor = found["models"]["good"], found["models"]["poor"]
    assert main(["ima", "report", str(files / "out")]) == 0
    page = (files / "out" / "report.html").read_text()
    assert "66.7" in page.split("CHAIR-i")[1]
    # men, puppy, mouse: all shown
    assert (good["chair_i"], good["chair_s"], good["mentions"]) == (0, 0, 3)
    # woman | hot dog; Mice | knives, ox; dog
    assert poor["mentions"] == 6
    assert poor["chair_i"] == pytest.approx(4 / 6)
    assert poor["chair_s"] == 1
    assert [one["object"] for one in poor["found"]] == ["hot dog", "knife", "cow", "dog"]
    assert poor["images"]["2.jpg"] == {"all": 3, "hallucinated": 2}
    # Three images leave nothing to draw from.
    assert poor["chair_i_interval"] is None
    assert found["what"] == "chair"
    assert found["captions"]["poor"] == str(files / "poor.jsonl")
    assert (
        "poor: 3 captions, 6 mentions of objects, CHAIR-i 66.7 %, CHAIR-s 100.0 %"
        in capsys.readouterr().out
    )


def test_metrics_for_correlations(files: Path) -> None:
    assert run(files) == 0
    file = files / "out" / "chair.json"
    assert chair_metrics(file)["poor"] == pytest.approx({"chair_i": 2 / 3, "chair_s": 1})
    write(files / "mute.jsonl", dict.fromkeys(GOOD, "A red sky."))
    assert run(files, captions=("mute",)) == 0
    assert read(files)["models"]["mute"]["chair_i"] is None
    assert chair_metrics(file) == {"mute": {"chair_s": 0}}
    file.write_text('{"what": "score", "models": {}}')
    with pytest.raises(DataError, match=r"chair.json is of `llava-vlora ima score`"):
        chair_metrics(file)
    file.write_text('{"what": "chair", "models": {"a": {}}}')
    with pytest.raises(DataError, match=r"model a: lacks 'chair_i', 'chair_s'"):
        chair_metrics(file)


def test_json_says_what_the_published_layout_does(files: Path) -> None:
    assert run(files) == 0
    before = read(files)["models"]
    table = {"dog": ["puppy"], "cow": ["cattle", "ox"], "hot dog": [], "mouse": [], "knife": []}
    (files / "synonyms.json").write_text(json.dumps({**table, "person": ["man", "woman"]}))
    assert run(files, "--synonyms", files / "synonyms.json") == 0
    assert read(files)["models"] == before


def test_ids_of_questions_can_name_images(files: Path) -> None:
    (files / "ids.jsonl").write_text('{"question_id": 7, "text": "a dog"}\n')
    (files / "objects.json").write_text('{"7": ["puppy"]}')
    assert run(files, captions=("ids",)) == 0
    assert read(files)["models"]["ids"]["chair_i"] == 0


def test_intervals_are_over_images() -> None:
    """Against draws of whole images made with numpy; images without a mention say nothing of CHAIR-i."""
    captions = {str(i): "dog " * (1 + i % 3) + "cow " * (i % 4) for i in range(60)}
    shown = {name: ["dog"] if int(name) % 5 else [] for name in captions}
    silent = {f"s{i}": "sky" for i in range(40)}
    shown |= {name: [] for name in silent}
    found = chair({**captions, **silent}, shown, {"dog": [], "cow": []})
    every = np.array([(one.all, one.hallucinated) for one in found.images.values()])
    draw = np.random.default_rng(5)
    naming = every[every[:, 0] > 0]
    drawn = naming[draw.integers(len(naming), size=(20_000, len(naming)))].sum(1)
    i, s = found.intervals()
    assert i is not None
    assert s is not None
    assert [i.low, i.high] == pytest.approx(
        np.quantile(drawn[:, 1] / drawn[:, 0], [0.025, 0.975]), abs=0.012
    )
    wrong = (every[:, 1] > 0)[draw.integers(len(every), size=(20_000, len(every)))].mean(1)
    assert [s.low, s.high] == pytest.approx(np.quantile(wrong, [0.025, 0.975]), abs=0.012)
    assert found.chair_i is not None
    assert i.low < found.chair_i < i.high
    assert s.low < found.chair_s < s.high


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"image": "1.jpg", "text": "a"}\nno', "poor.jsonl, line 2: not valid JSON"),
        ('{"image": "1.jpg"}', "poor.jsonl, line 1: lacks 'text'"),
        ('{"image": 1.5, "text": "a"}', "poor.jsonl, line 1: give a caption in 'text', and its"),
        ('{"text": "a"}', "poor.jsonl, line 1: give a caption in 'text', and its"),
        (
            '{"image": "1.jpg", "text": "a"}\n\n{"image": "1.jpg", "text": "b"}',
            "line 3 is a second caption of image 1.jpg, beside",
        ),
        (
            '{"image": "9.jpg", "text": "a"}',
            "poor.jsonl, line 1: .*objects.json does not say what image 9.jpg shows",
        ),
        ("", "poor.jsonl has no captions"),
        ('{"image": "1.jpg", "text": "a"}', "poor.jsonl has no caption of image 2.jpg, which .*go"),
    ],
)
def test_mistakes_in_captions_are_named(
    lines: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / "poor.jsonl").write_text(lines)
    assert run(files) == 2
    assert_named(message, capsys)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("objects.json", "[", "objects.json is not valid JSON"),
        ("objects.json", "[]", "objects.json is no JSON object of image -> list of names"),
        ("objects.json", '{"1.jpg": "dog"}', "stands for the image '1.jpg' is no list of names"),
        (
            "objects.json",
            json.dumps({**OBJECTS, "1.jpg": ["cat"]}),
            "objects.json: 'cat', an object of image 1.jpg, is not in the table",
        ),
        ("synonyms.txt", "dog, , puppy", "synonyms.txt, line 1 has an empty name"),
        ("synonyms.txt", "dog\ncow\ndog, pup", "synonyms.txt, line 3: 'dog' has a line already, 1"),
        ("synonyms.txt", "dog, pet\ncat, pet", "synonyms.txt: 'pet' is a name of 'dog' and of"),
    ],
)
def test_mistakes_in_tables_are_named(
    name: str, text: str, message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (files / name).write_text(text)
    assert run(files) == 2
    assert_named(message, capsys)


def test_missing_files_are_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--objects", "--synonyms"):
        assert run(files, flag, files / "absent") == 2
        assert_named("absent is missing", capsys)
    assert run(files, captions=("good", "absent")) == 2
    assert_named("absent.jsonl is missing", capsys)
    words = ["--objects", "o", "--synonyms", "s", "--out", str(files)]
    assert main(["ima", "chair", "--captions", "good.jsonl", *words]) == 2
    assert_named("--captions good.jsonl: give NAME=FILE", capsys)


def assert_named(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    errors = capsys.readouterr().err
    assert re.search(message, errors), errors
    assert errors.count("\n") == 1

"""The launcher of VLMEvalKit and its model class.

VLMEvalKit comes from a checkout and imports torchvision, of which PyPI has no build for CPUs alone. So the tests run
with a stand-in of what the launcher and the class touch, and with the real one where LLAVA_VLORA_VLMEVALKIT names its
checkout and LLAVA_VLORA_VLMEVALKIT_PYTHON an interpreter that has both.
"""

from __future__ import annotations

import base64
import csv
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from llava_vlora.integrations import vlmeval
from llava_vlora.integrations.answerer import Answerer, Query
from tests.test_demo import load_tiny
from tests.two_stacks import Finished, run_python

QUESTION = "What colour is the image?"
OPTIONS = ["red", "green", "blue"]
LETTER = "Answer with the option's letter from the given choices directly."
CHOICES = "A. red\nB. green\nC. blue"
STAND_IN = {
    "vlmeval/__init__.py": "",
    "vlmeval/config.py": "supported_VLM = {'llava_v1.5_7b': None}",
    "vlmeval/dataset.py": """
        def DATASET_TYPE(dataset):
            return "VQA" if "openended" in dataset.lower() else "MCQ"
        """,
    "vlmeval/smp.py": """
        def cn_string(text):
            return any("\\u4e00" <= letter <= "\\u9fff" for letter in text)
        """,
    "vlmeval/vlm/__init__.py": "",
    "vlmeval/vlm/base.py": """
        class BaseModel:
            def __init__(self):
                self.dump_image_func = None

            def dump_image(self, line, dataset):
                return self.dump_image_func(line)

            def message_to_promptimg(self, message, dataset=None):
                texts = [part["value"] for part in message if part["type"] == "text"]
                return "\\n".join(texts), next(p["value"] for p in message if p["type"] == "image")

            def generate(self, message, dataset=None):
                return self.generate_inner(message, dataset)
        """,
    "run.py": """
        import argparse, ast, base64, os, pandas
        from pathlib import Path
        from vlmeval.config import supported_VLM

        root = Path(os.environ["LMUData"])

        def dump(line):
            cell = line["image"]
            cells = ast.literal_eval(cell) if cell.startswith("[") else [cell]
            paths = [root / f"{line['index']}-{i}.png" for i in range(len(cells))]
            for path, cell in zip(paths, cells):
                path.write_bytes(base64.b64decode(cell))
            return [str(path) for path in paths]

        def ask(model, line, data):
            if model.use_custom_prompt(data):
                return model.build_prompt(line, dataset=data)
            images = [{"type": "image", "value": path} for path in dump(line)]
            return [*images, {"type": "text", "value": line["question"]}]

        if __name__ == "__main__":
            parser = argparse.ArgumentParser()
            parser.add_argument("--data", nargs="+")
            parser.add_argument("--model", nargs="+")
            parser.add_argument("--mode", choices=["infer"])
            parser.add_argument("--work-dir")
            args = parser.parse_args()
            for name in args.model:
                model = supported_VLM[name]()
                model.dump_image_func = dump
                for data in args.data:
                    table = pandas.read_csv(root / f"{data}.tsv", sep="\\t")
                    said = [
                        model.generate(message=ask(model, line, data), dataset=data)
                        for _, line in table.iterrows()
                    ]
                    table["prediction"] = said
                    out = Path(args.work_dir) / name / "run"
                    out.mkdir(parents=True, exist_ok=True)
                    table.to_csv(out / f"{name}_{data}.tsv", sep="\\t")
        """,
}


@pytest.fixture(scope="module", params=["stand-in", "real"])
def toolkit(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A checkout and an interpreter."""
    if request.param == "real":
        names = ("LLAVA_VLORA_VLMEVALKIT", "LLAVA_VLORA_VLMEVALKIT_PYTHON")
        if not all(name in os.environ for name in names):
            pytest.skip(f"no VLMEvalKit here: set {' and '.join(names)}")
        checkout, python = (os.environ[name] for name in names)
        return Path(checkout), python
    return make_stand_in(tmp_path_factory.mktemp("toolkit")), sys.executable


def make_stand_in(folder: Path) -> Path:
    for name, text in STAND_IN.items():
        lines = text.split("\n")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(line.removeprefix(" " * 8) for line in lines))
    return folder


@pytest.fixture(scope="module")
def checkpoint(llm_dir: Path, tower_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-vlora"
    torch.manual_seed(0)
    load_tiny("vlora", llm_dir, tower_dir).model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llm_dir, use_fast=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tables(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables in MMBench's layout: choices, with a hint, a lacking option and two images; and without choices."""
    root = tmp_path_factory.mktemp("LMUData")
    cells = [
        base64.b64encode((data_dir / "images" / f"{i}.png").read_bytes()).decode() for i in range(3)
    ]
    head = ["index", "question", "hint", "A", "B", "C", "answer", "category", "image"]
    rows = [
        [0, QUESTION, "The image is helpful.", *OPTIONS, "A", "colour", cells[0]],
        [1, QUESTION, "", "red", "green", "", "B", "colour", cells[1]],
        [2, QUESTION, "", *OPTIONS, "C", "colour", str([cells[2], cells[0]])],
        [3, "图像是什么颜色?", "", *OPTIONS, "A", "colour", cells[0]],
    ]
    for name, columns, lines in (
        ("Colours", head, rows),
        (
            "ColoursOpenEnded",
            ["index", "question", "answer", "image"],
            [[0, QUESTION, "red", cells[0]]],
        ),
    ):
        with (root / f"{name}.tsv").open("w", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([columns, *lines])
    return root


def launch(toolkit: tuple[Path, str], tables: Path, *arguments: object) -> Finished:
    checkout, python = toolkit
    module = ("-m", "llava_vlora.integrations.vlmeval", "--toolkit", checkout, "--device", "cpu")
    return run_python(
        *module,
        *arguments,
        python=python,
        cwd=tables,
        LMUData=str(tables),
        PRED_FORMAT="tsv",
        HF_HUB_OFFLINE="1",
    )


def predictions(out: Path, name: str, data: str) -> list[str]:
    (file,) = out.rglob(f"{name}_{data}.tsv")
    csv.field_size_limit(sys.maxsize)
    with file.open(newline="") as lines:
        return [row["prediction"] for row in csv.DictReader(lines, delimiter="\t")]


def test_answers_to_tables(
    toolkit: tuple[Path, str], checkpoint: Path, tables: Path, data_dir: Path, tmp_path: Path
) -> None:
    """With VLMEvalKit's prompts for LLaVA; of two images the first is shown."""
    flags = ("--model-path", checkpoint, "--max-new-tokens", 8, "--")
    run = ("--data", "Colours", "ColoursOpenEnded", "--mode", "infer", "--work-dir", tmp_path)
    done = launch(toolkit, tables, *flags, *run)
    assert done.code == 0, done.output + done.errors[-3000:]

    images = [Image.open(data_dir / "images" / f"{i}.png") for i in range(3)]
    queries = [
        Query(f"The image is helpful.\n{QUESTION}\n{CHOICES}\n{LETTER}", images[0]),
        Query(f"{QUESTION}\nA. red\nB. green\n{LETTER}", images[1]),
        Query(f"{QUESTION}\n{CHOICES}\n{LETTER}", images[2]),
        Query(f"图像是什么颜色?\n{CHOICES}\n请直接回答选项字母。", images[0]),
        Query(QUESTION, images[0]),
    ]
    answers = Answerer.open(str(checkpoint)).answer(queries, max_new_tokens=8)
    found = [predictions(tmp_path, "tiny-vlora", data) for data in ("Colours", "ColoursOpenEnded")]
    assert [text for texts in found for text in texts] == [text.strip() for text in answers]


@pytest.mark.slow
def test_blind_answers_by_another_name(
    toolkit: tuple[Path, str], checkpoint: Path, tables: Path, tmp_path: Path
) -> None:
    flags = ("--model-path", checkpoint, "--max-new-tokens", 8, "--blind", "--name", "blind", "--")
    run = ("--data", "ColoursOpenEnded", "--mode", "infer", "--work-dir", tmp_path)
    done = launch(toolkit, tables, *flags, *run, "--model", "blind")
    assert done.code == 0, done.errors[-3000:]
    (answer,) = Answerer.open(str(checkpoint)).answer([Query(QUESTION, None)], max_new_tokens=8)
    assert predictions(tmp_path, "blind", "ColoursOpenEnded") == [answer.strip()]


def test_mistakes_are_named(
    checkpoint: Path,
    tables: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in = make_stand_in(tmp_path / "toolkit")
    taken = ("--model-path", checkpoint, "--name", "llava_v1.5_7b")
    done = launch((stand_in, sys.executable), tables, *taken)
    assert done.code == 2
    assert done.errors.endswith("give another --name.\n")
    assert "Traceback" not in done.errors

    (stand_in / "run.py").unlink()
    for folder, model, message in (
        (stand_in, tmp_path / "none", "there is no such folder"),
        (stand_in, checkpoint, "run.py is missing"),
        (tmp_path / "nowhere", checkpoint, "VLMEvalKit is not here"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "path", [*sys.path])
            assert vlmeval.main(["--toolkit", str(folder), "--model-path", str(model)]) == 2
        assert message in capsys.readouterr().err

"""Recipes in eval/, and answer files beside LLaVA's own scorers, converters and evaluators."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import random
import re
import runpy
import shlex
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor

from llava_vlora.benchmarks import find
from llava_vlora.benchmarks.base import Benchmark, FilePicture, Id, Sample, Score
from llava_vlora.cli import main
from llava_vlora.evaluation.answer_log import AnswerLog
from tests.test_benchmarks import (
    WORD,
    lines,
    make_mmbench,
    make_mme,
    make_pope,
    make_questions,
    make_scienceqa,
    make_textvqa,
)
from tests.tiny import IMAGE_SIZE, make_vlora
from tests.two_stacks import environment, run_modules, run_processes, succeeded

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = REPOSITORY / "eval"
#: Recipe -> benchmark, its answer file and its upload file where LLaVA's scripts leave them.
RECIPES = {
    "vqav2": (
        "vqav2",
        "vqav2/answers/llava_vqav2_mscoco_test-dev2015/m/merge.jsonl",
        "vqav2/answers_upload/llava_vqav2_mscoco_test-dev2015/m.json",
    ),
    "gqa": ("gqa", "gqa/answers/llava_gqa_testdev_balanced/m/merge.jsonl", None),
    "vizwiz": ("vizwiz", "vizwiz/answers/m.jsonl", "vizwiz/answers_upload/m.json"),
    "sqa": ("scienceqa", "scienceqa/answers/m.jsonl", None),
    "textvqa": ("textvqa", "textvqa/answers/m.jsonl", None),
    "pope": ("pope", "pope/answers/m.jsonl", None),
    "mme": ("mme", "MME/answers/m.jsonl", None),
    "mmbench": (
        "mmbench",
        "mmbench/answers/mmbench_dev_20230712/m.jsonl",
        "mmbench/answers_upload/mmbench_dev_20230712/m.xlsx",
    ),
    "mmbench_cn": (
        "mmbench-cn",
        "mmbench/answers/mmbench_dev_cn_20231003/m.jsonl",
        "mmbench/answers_upload/mmbench_dev_cn_20231003/m.xlsx",
    ),
    "seed": ("seed", "seed_bench/answers/m/merge.jsonl", None),
    "llavabench": ("llava-bench", "llava-bench-in-the-wild/answers/m.jsonl", None),
    "mmvet": ("mm-vet", "mm-vet/answers/m.jsonl", "mm-vet/results/m.json"),
}


# --- small benchmarks ------------------------------------------------------------------------------


def picture(number: int) -> Image.Image:
    """One colour that float16 holds exactly, padded to a square of the tower's size without being resized.

    LLaVA's evaluators round pixels to float16, also where a model computes in float32.
    """
    colour = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0))[number % 4]
    return Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE // 2 + number), colour)


def encoded(number: int) -> str:
    data = io.BytesIO()
    picture(number).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def make_tables(root: Path) -> None:
    """MMBench as LLaVA reads it: all columns, and the image in each row."""
    for split in ("mmbench_dev_20230712", "mmbench_dev_cn_20231003"):
        make_mmbench(root, f"mmbench/{split}.tsv")
        file = root / "mmbench" / f"{split}.tsv"
        with file.open(newline="") as table:
            rows = list(csv.DictReader(table, delimiter="\t"))
        others = dict.fromkeys(("source", "l2-category", "comment"), "")
        with file.open("w", newline="") as table:
            writer = csv.DictWriter(table, [*rows[0], *others], delimiter="\t")
            writer.writeheader()
            for i, row in enumerate(rows):
                writer.writerow({**row, **others, "image": encoded(i)})


def make_seed(root: Path, count: int = 6) -> None:
    """Questions of two types about images and one about videos."""
    make_questions(root / "seed_bench" / "llava-seed-bench.jsonl", count)
    asked = [
        {
            "question_id": str(i),
            "data_type": "video" if i % 3 == 2 else "image",
            "question_type_id": 1 + i % 3,
            "answer": "ABCD"[i % 4],
        }
        for i in range(count)
    ]
    truth = {"questions": asked, "question_type": {"Scene": 1, "Count": 2, "Action": 3}}
    (root / "seed_bench" / "SEED-Bench.json").write_text(json.dumps(truth))


def make_gqa(root: Path, count: int = 6) -> None:
    make_questions(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", count)
    truth = {str(i): {"answer": ("dog", "yes", "left")[i % 3]} for i in range(count)}
    (root / "gqa" / "data").mkdir()
    (root / "gqa" / "data" / "testdev_balanced_questions.json").write_text(json.dumps(truth))


def make_elsewhere(root: Path) -> None:
    """What servers and judges score."""
    for place, count in (
        ("vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", 3),
        ("vqav2/llava_vqav2_mscoco_test2015.jsonl", 4),
        ("vizwiz/llava_test.jsonl", 3),
        ("mm-vet/llava-mm-vet.jsonl", 3),
        ("llava-bench-in-the-wild/questions.jsonl", 3),
    ):
        make_questions(root / place, count)


def make_all(root: Path) -> Path:
    """Every benchmark of LLaVA's suite, with its images."""
    for make in (make_pope, make_scienceqa, make_textvqa, make_mme, make_tables, make_seed):
        make(root)
    make_gqa(root)
    make_elsewhere(root)
    for name, _, _ in RECIPES.values():
        for i, sample in enumerate(find(name).read(root)):
            if isinstance(sample.image, FilePicture):
                sample.image.path.parent.mkdir(parents=True, exist_ok=True)
                picture(i).save(sample.image.path)
    return root


@dataclass(frozen=True)
class Answered:
    """Answers to a benchmark, and the file that `llava-vlora eval` would leave."""

    benchmark: Benchmark
    samples: list[Sample]
    given: dict[Id, str]
    file: Path

    def score(self) -> Score:
        return self.benchmark.score(self.samples, self.given)


def answered(name: str, root: Path, texts: Sequence[str]) -> Answered:
    """Give answers in another order than the questions', as batches of equal length do."""
    benchmark = find(name)
    samples = benchmark.read(root)
    given = {s.id: texts[i % len(texts)] for i, s in enumerate(samples)}
    log = AnswerLog(root / "out" / f"{name}.jsonl", "m", "k", samples)
    log.append(dict(reversed(given.items())))
    log.finish()
    return Answered(benchmark, samples, given, log.path)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- LLaVA's scorers -------------------------------------------------------------------------------

Run = Callable[..., str]


@pytest.fixture
def llavas(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a module or script of LLaVA as it is; returns what it prints."""

    def run(what: str | Path, *flags: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(what), *map(str, flags)])
        capsys.readouterr()
        if isinstance(what, Path):
            runpy.run_path(str(what), run_name="__main__")
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        return capsys.readouterr().out

    return run


#: What scorers read in ways that are easily missed.
TRICKY = ["Yes", "No", "no", "yes. No", "No, it is", "There is not", "NO", "nothing", "", "Yes, no"]
TRICKY += ["no,", "None", "I see no dog.", "Knot", "No\n", "é no", "不"]


@pytest.mark.parametrize("seed", range(3))
def test_llavas_pope_scorer_agrees(seed: int, tmp_path: Path, llavas: Run) -> None:
    draw = random.Random(seed)
    splits = {
        split: [(f"{split} {i}", draw.choice(["yes", "no"])) for i in range(40)]
        for split in ("random", "popular", "adversarial")
    }
    questions = []
    for split, asked in splits.items():
        labels = [{"image": "a.jpg", "text": text, "label": label} for text, label in asked]
        lines(tmp_path / "pope" / "coco" / f"coco_pope_{split}.json", labels)
        questions += [
            {"image": "a.jpg", "text": text + WORD, "category": split} for text, _ in asked
        ]
    numbered = [{"question_id": i, **question} for i, question in enumerate(questions)]
    # Splits in turns: LLaVA pairs the answers of a split with its labels by their order alone.
    numbered.sort(key=lambda question: question["question_id"] % 40)
    lines(tmp_path / "pope" / "llava_pope_test.jsonl", numbered)
    pope = answered("pope", tmp_path, draw.choices(TRICKY, k=120))
    printed = llavas(
        "llava.eval.eval_pope",
        *("--annotation-dir", tmp_path / "pope" / "coco", "--result-file", pope.file),
        *("--question-file", tmp_path / "pope" / "llava_pope_test.jsonl"),
    )
    score = pope.score()
    sums: dict[str, float] = {}
    for part in printed.split("Category: ")[1:]:
        split = part.partition(",")[0]
        counts = dict(zip(("TP", "FP", "TN", "FN"), map(int, part.split()[8:12]), strict=True))
        right = sum(score.credit[s.id] for s in pope.samples if s.category == split)
        assert right == counts["TP"] + counts["TN"]
        for theirs, ours in (
            ("F1 score", "F1"),
            ("Accuracy", "accuracy"),
            ("Precision", "precision"),
            ("Recall", "recall"),
            ("Yes ratio", "yes"),
        ):
            found = re.search(rf"^{theirs}: (\S+)$", part, re.MULTILINE)
            assert found is not None
            assert score.breakdown[f"{split}, {ours}"] == pytest.approx(100 * float(found[1]))
            sums[ours] = sums.get(ours, 0) + 100 * float(found[1])
    assert score.metrics == {name: pytest.approx(value / 3) for name, value in sums.items()}


@pytest.mark.parametrize(
    "texts",
    [
        ("B", "A. a", "The answer is C."),
        ("b", "The answer is A.", "C"),
        ("The answer is B. The answer is B.", "E", "C. c"),
    ],
)
def test_llavas_science_qa_scorer_agrees(
    texts: tuple[str, ...], tmp_path: Path, llavas: Run
) -> None:
    make_scienceqa(tmp_path)
    ours = answered("scienceqa", tmp_path, texts)
    output, result = tmp_path / "output.json", tmp_path / "result.json"
    printed = llavas(
        "llava.eval.eval_science_qa",
        *("--base-dir", tmp_path / "scienceqa", "--result-file", ours.file),
        *("--output-file", output, "--output-result", result),
    )
    score = ours.score()
    right = {row["question_id"] for row in json.loads(output.read_text())["correct"]}
    assert {i for i, credit in score.credit.items() if credit} == right
    found = json.loads(result.read_text())
    assert (found["count"], found["acc"]) == (3, pytest.approx(score.metrics["accuracy"]))
    assert printed.endswith(f"IMG-Accuracy: {score.metrics['IMG accuracy']:.2f}%\n")
    assert found["outputs"] == ours.given  # none of them lost, which LLaVA would count as wrong


@pytest.mark.parametrize("name", ["textvqa", "textvqa-no-ocr"])
@pytest.mark.parametrize(
    "texts", [("Nokia", "2", "b"), ("a phone", "two", "A."), ("the NOKIA!", "", "a")]
)
def test_llavas_textvqa_scorer_agrees(
    texts: tuple[str, ...], name: str, tmp_path: Path, llavas: Run
) -> None:
    make_textvqa(tmp_path)
    ours = answered(name, tmp_path, texts)
    annotations = tmp_path / "textvqa" / "TextVQA_0.5.1_val.json"
    printed = llavas(
        "llava.eval.eval_textvqa", "--annotation-file", annotations, "--result-file", ours.file
    )
    accuracy = ours.score().metrics["accuracy"]
    assert f"Samples: 3\nAccuracy: {accuracy:.2f}%\n" in printed


# --- LLaVA's converters ----------------------------------------------------------------------------


OPENPYXL = "openpyxl, with which LLaVA's converter writes, is not here"


@pytest.fixture
def converters() -> Path:
    """The folder scripts/ of LLaVA's repository, which its package lacks."""
    named = os.environ.get("LLAVA_VLORA_LLAVA_HEAD")
    if named is None:
        pytest.skip("LLAVA_VLORA_LLAVA_HEAD names no checkout of LLaVA's repository")
    return Path(named) / "scripts"


def test_llavas_gqa_converter_agrees(tmp_path: Path, llavas: Run, converters: Path) -> None:
    make_gqa(tmp_path)
    texts = ("Dog.", "no", "left", "dog", "Yes...", "Left side")
    ours = answered("gqa", tmp_path, texts)
    out = tmp_path / "predictions.json"
    llavas(converters / "convert_gqa_for_eval.py", "--src", ours.file, "--dst", out)
    said = {row["questionId"]: row["prediction"] for row in json.loads(out.read_text())}
    credit = ours.score().credit
    assert credit == {s.id: float(said[s.id] == s.reference) for s in ours.samples}
    assert sum(credit.values()) == 4


def test_llavas_seed_converter_agrees(tmp_path: Path, llavas: Run, converters: Path) -> None:
    make_seed(tmp_path)
    seed = answered("seed", tmp_path, ("A", "B", "C", "B. two", "a", "B"))
    out = tmp_path / "upload.jsonl"
    printed = llavas(
        converters / "convert_seed_for_submission.py",
        *("--annotation-file", tmp_path / "seed_bench" / "SEED-Bench.json"),
        *("--result-file", seed.file, "--result-upload-file", out),
    )
    score = seed.score()
    assert score.metrics["accuracy"] == pytest.approx(100 * 4 / 6)
    theirs = dict(re.findall(r"^(\w+(?: accuracy)?): (\S+)%$", printed, re.MULTILINE))
    ours = {**score.breakdown, **score.metrics, "Total accuracy": score.metrics["accuracy"]}
    del ours["accuracy"]
    assert theirs == {name: f"{value:.2f}" for name, value in ours.items()}
    assert {row["question_id"]: row["prediction"] for row in rows(out)} == {
        str(i): text for i, text in seed.given.items()
    }


def converted(name: str, script: Path, root: Path, file: Path, run: Run) -> Path:
    """What LLaVA's script makes of an answer file, called as in its recipe."""
    if name == "vqav2":
        split = "llava_vqav2_mscoco_test-dev2015"
        place = root / "vqav2" / "answers" / split / "m"
        place.mkdir(parents=True)
        (place / "merge.jsonl").write_bytes(file.read_bytes())
        run(script, "--dir", root / "vqav2", "--split", split, "--ckpt", "m")
        return root / "vqav2" / "answers_upload" / split / "m.json"
    out = root / "upload" / "m.json"
    out.parent.mkdir()
    if name == "mm-vet":
        run(script, "--src", file, "--dst", out)
    else:
        questions = root / "vizwiz" / "llava_test.jsonl"
        flags = ("--result-file", file, "--result-upload-file", out)
        run(script, "--annotation-file", questions, *flags)
    return out


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("vqav2", "convert_vqav2_for_submission.py"),
        ("vizwiz", "convert_vizwiz_for_submission.py"),
        ("mm-vet", "convert_mmvet_for_eval.py"),
    ],
)
def test_upload_files_are_llavas(
    name: str, script: str, tmp_path: Path, llavas: Run, converters: Path
) -> None:
    make_elsewhere(tmp_path)
    texts = ("The Dog.", "two, isn't it?", "1,000 cafés")
    ours = answered(name, tmp_path, texts)
    (upload,) = ours.benchmark.export(ours.samples, ours.given, tmp_path / "ours", "m")
    theirs = converted(name, converters / script, tmp_path, ours.file, llavas)
    assert json.loads(upload.read_text()) == json.loads(theirs.read_text())


def test_llavas_mmbench_converter_reads_the_answers(
    tmp_path: Path, llavas: Run, converters: Path
) -> None:
    pytest.importorskip("openpyxl", reason=OPENPYXL)
    import pandas

    make_tables(tmp_path)
    texts = ("B", "A. red", "é", "A", "C", "D")
    ours = answered("mmbench", tmp_path, texts)
    llavas(
        converters / "convert_mmbench_for_submission.py",
        *("--annotation-file", tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"),
        *("--result-dir", ours.file.parent, "--upload-dir", tmp_path),
        *("--experiment", ours.file.stem),
    )
    table = pandas.read_excel(tmp_path / "mmbench.xlsx")
    assert dict(zip(table["index"], table["prediction"], strict=True)) == ours.given
    assert list(table["index"]) == [s.id for s in ours.samples]


# --- LLaVA's evaluators ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(llm_dir: Path, tower_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VLoRA model whose answers end early, also where LLaVA asks for 1024 tokens."""
    folder = tmp_path_factory.mktemp("checkpoints") / "m"
    tower = shutil.copytree(tower_dir, folder.parent / "openai-clip-exact")
    CLIPImageProcessor.from_pretrained(
        tower, image_mean=[0.0] * 3, image_std=[1.0] * 3
    ).save_pretrained(tower)
    model = make_vlora(llm_dir, tower)
    model.config.image_aspect_ratio = "pad"
    model.generation_config.eos_token_id = [2, *range(4, 85, 3)]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llm_dir, use_fast=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_all(tmp_path_factory.mktemp("eval"))


#: Benchmark -> evaluator, questions and images, and further flags of LLaVA's recipe.
EVALUATORS = {
    "pope": ("model_vqa_loader", "pope/llava_pope_test.jsonl", "pope/val2014", []),
    "textvqa": (
        "model_vqa_loader",
        "textvqa/llava_textvqa_val_v051_ocr.jsonl",
        "textvqa/train_images",
        [],
    ),
    "mm-vet": ("model_vqa", "mm-vet/llava-mm-vet.jsonl", "mm-vet/images", []),
    "scienceqa": (
        "model_vqa_science",
        "scienceqa/llava_test_CQM-A.json",
        "scienceqa/images/test",
        ["--single-pred-prompt"],
    ),
    "mmbench": (
        "model_vqa_mmbench",
        "mmbench/mmbench_dev_20230712.tsv",
        None,
        ["--single-pred-prompt"],
    ),
    "mmbench-cn": (
        "model_vqa_mmbench",
        "mmbench/mmbench_dev_cn_20231003.tsv",
        None,
        ["--lang", "cn", "--single-pred-prompt"],
    ),
}


@pytest.mark.slow
def test_answers_are_those_of_llavas_evaluators(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    commands: dict[str, list[object]] = {}
    for name, (module, questions, images, more) in EVALUATORS.items():
        flags: list[object] = ["--model-path", checkpoint, "--question-file", data / questions]
        flags += ["--answers-file", tmp_path / "llava" / f"{name}.jsonl", "--temperature", 0]
        flags += ["--conv-mode", "vicuna_v1", *more]
        if images is not None:
            flags += ["--image-folder", data / images]
        commands[name] = [f"llava.eval.{module}", *flags]
    # A GPU would compute in float16, and batches of other sizes round otherwise.
    hidden = "import os\nos.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
    succeeded(run_modules(commands, tmp_path, dict.fromkeys(commands, hidden)))
    ours = ["eval", "--model", checkpoint, "--benchmarks", ",".join(EVALUATORS), "--data", data]
    assert main([*map(str, ours), "--out", str(tmp_path / "ours"), "--device", "cpu"]) == 0
    for name in EVALUATORS:
        found, wanted = (
            rows(tmp_path / "ours" / name / "m.jsonl"),
            rows(tmp_path / "llava" / f"{name}.jsonl"),
        )
        own = ("answer_id", "metadata")  # LLaVA draws the one at random and leaves the other empty
        assert [row.keys() for row in found] == [row.keys() for row in wanted]
        for row in (*found, *wanted):
            assert [type(row.pop(key)) for key in own] == [str, dict]
        assert found == wanted, name
        assert len({row["text"] for row in found}) > 1, name


# --- the recipes -----------------------------------------------------------------------------------


def recipe(name: str, *flags: object, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a recipe; ``more`` are environment variables."""
    return subprocess.run(
        ["bash", str(SCRIPTS / f"{name}.sh"), *map(str, flags)],
        env=environment(**{"GPUS": "1", "LLAVA": "", **more}),
        capture_output=True,
        text=True,
        cwd=more.get("DATA"),
    )


def commands(name: str, *flags: object, **more: str) -> list[list[str]]:
    """The commands that a recipe would run."""
    done = recipe(name, *flags, DRY_RUN="1", **more)
    assert done.returncode == 0, done.stderr
    programs = ("mkdir", "cp", "python", "torchrun")
    return [shlex.split(x) for x in done.stdout.splitlines() if x.split(" ")[0] in programs]


def test_there_is_a_recipe_for_each_of_llavas() -> None:
    assert {file.stem for file in SCRIPTS.glob("*.sh")} == {"common", *RECIPES}
    table = (SCRIPTS / "README.md").read_text()
    for name, (benchmark, _, _) in RECIPES.items():
        assert f"| `{name}.sh` | `{benchmark}` |" in table


@pytest.mark.parametrize("name", ["common", *RECIPES])
def test_bash_can_read_it(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / f"{name}.sh")], check=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_what_it_runs(name: str) -> None:
    benchmark, answers, upload = RECIPES[name]
    found = commands(name, "checkpoints/m", "--model-base", "base", "--bits", "4")
    evaluation = next(
        words for words in found if words[:4] == ["python", "-m", "llava_vlora", "eval"]
    )
    given = dict(zip(evaluation[4::2], evaluation[5::2], strict=True))
    root = "playground/data/eval"
    assert given == {
        "--model": "checkpoints/m",
        "--name": "m",
        "--benchmarks": benchmark,
        "--data": root,
        "--out": "runs/eval",
        "--conv-mode": "vicuna_v1",
        "--model-base": "base",
        "--bits": "4",
    }
    copies = [(f"runs/eval/{benchmark}/m.jsonl", f"{root}/{answers}")]
    if upload is not None:
        made_here = f"runs/eval/{benchmark}/m.upload{Path(upload).suffix}"
        copies.append((made_here, f"{root}/{upload}"))
    assert [tuple(words[1:]) for words in found if words[0] == "cp"] == copies
    made = {words[2] for words in found if words[:2] == ["mkdir", "-p"]}
    assert {str(Path(target).parent) for _, target in copies} <= made


def test_all_gpus_answer(tmp_path: Path) -> None:
    words = commands("pope", "m", GPUS="8")[1]
    assert words[:7] == "torchrun --standalone --nproc_per_node 8 -m llava_vlora eval".split()
    assert commands("pope", "m", "--device", "cpu", GPUS="")[1][0] == "python"
    tools = tmp_path / "tools"  # a python whose PyTorch sees three GPUs
    tools.mkdir()
    (tools / "python").write_text("#!/bin/bash\necho 3\n")
    (tools / "python").chmod(0o755)
    words = commands("pope", "m", GPUS="", PATH=f"{tools}:{os.environ['PATH']}")[1]
    assert words[2:4] == ["--nproc_per_node", "3"]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("runs/m/", "m"),
        ("runs/m/checkpoint-9", "m_checkpoint-9"),
        ("lab/m-7b", "m-7b"),
    ],
)
def test_files_are_named_as_by_llava(model: str, name: str) -> None:
    from llava.mm_utils import get_model_name_from_path

    assert get_model_name_from_path(model) == name
    assert commands("pope", model)[2][1] == f"runs/eval/pope/{name}.jsonl"
    assert commands("pope", model, NAME="x")[2][1] == "runs/eval/pope/x.jsonl"
    blind = commands("pope", model, "--blind")
    assert blind[2][1:] == [
        f"runs/eval/pope/{name}.blind.jsonl",
        f"playground/data/eval/pope/answers/{name}.blind.jsonl",
    ]


def test_usage() -> None:
    for flags, code in (((), 2), (("--limit", "3"), 2), (("--help",), 0)):
        done = recipe("pope", *flags)
        assert done.returncode == code
        said = done.stderr if code else done.stdout
        assert "usage: bash eval/pope.sh CHECKPOINT" in said
        assert "POPE: F1" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "n"), "the checkpoint is the first argument"),
        (("--name=n",), "set NAME instead of --name=n"),
        (("--data", "d"), "set DATA instead"),
        (("--out", "o"), "set OUT instead"),
        (("--benchmarks", "mme"), "this is a recipe for one benchmark"),
    ],
)
def test_flags_that_a_recipe_sets_are_refused(flags: tuple[str, ...], message: str) -> None:
    done = recipe("pope", "m", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout


def test_a_checkout_without_the_converter_is_named(tmp_path: Path) -> None:
    done = recipe("gqa", "m", DRY_RUN="1", LLAVA=str(tmp_path))
    assert done.returncode == 2
    assert f"there is no {tmp_path}/scripts/convert_gqa_for_eval.py" in done.stderr


def test_a_benchmarks_own_tool_is_run_in_its_folder(tmp_path: Path) -> None:
    for place in ("MME/convert_answer_to_mme.py", "MME/eval_tool/calculation.py"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    assert commands("mme", "m", DATA=str(tmp_path))[-2:] == [
        "python convert_answer_to_mme.py --experiment m".split(),
        "python calculation.py --results_dir answers/m".split(),
    ]
    (tmp_path / "gqa" / "data" / "eval").mkdir(parents=True)
    (tmp_path / "gqa" / "data" / "eval" / "eval.py").touch()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "convert_gqa_for_eval.py").touch()
    found = commands("gqa", "m", DATA=str(tmp_path), LLAVA=str(tmp_path))
    assert found[-1] == "python eval/eval.py --tier testdev_balanced".split()
    assert found[-2][-2:] == ["--dst", f"{tmp_path}/gqa/data/testdev_balanced_predictions.json"]


#: Stands for `python` in a recipe: the same command in a process that has imported torch already.
_CLIENT = """#!{python} -S
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendall(json.dumps([os.getcwd(), *sys.argv[1:]]).encode() + b"\\n")
    code, output, errors = json.loads(server.makefile().readline())
sys.stdout.write(output)
sys.stderr.write(errors)
sys.exit(code)
"""
_PYTHON = """
import os, runpy, sys
folder, first, *rest = sys.argv[1:]
os.chdir(folder)
if first == "-m":
    sys.argv = rest
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
else:
    sys.argv = [first, *rest]
    runpy.run_path(first, run_name="__main__")
"""


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        done = run_processes(*json.loads(self.rfile.readline()), code=_PYTHON, count=1)
        self.wfile.write(json.dumps([done.code, done.output, done.errors]).encode() + b"\n")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A PATH whose python forks."""
    folder = tmp_path_factory.mktemp("bin")
    address = str(folder / "socket")
    (folder / "python").write_text(_CLIENT.format(python=sys.executable, address=address))
    (folder / "python").chmod(0o755)
    with socketserver.UnixStreamServer(address, _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{folder}:{os.environ['PATH']}"
        server.shutdown()


#: What is printed by LLaVA's own programs, or said where they cannot run.
SAID = {
    "gqa": "Set LLAVA to a source checkout of LLaVA",
    "sqa": "LLaVA's own llava.eval.eval_science_qa:\nTotal: 3, Correct: ",
    "textvqa": "LLaVA's own llava.eval.eval_textvqa:\nm\nSamples: 3\nAccuracy: ",
    "pope": "Category: popular, # samples: 2",
    "mme": "There is no {data}/MME/eval_tool/calculation.py",
    "seed": "Set LLAVA to a source checkout of LLaVA",
    "llavabench": "eval_gpt_review_bench.py --question {data}/llava-bench-in-the-wild/questions.jsonl",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_run(name: str, checkpoint: Path, data: Path, tmp_path: Path, python: str) -> None:
    benchmark, answers, upload = RECIPES[name]
    own, left = tmp_path / "out", tmp_path / "left"
    done = recipe(name, checkpoint, DATA=str(data), OUT=str(own), ANSWERS=str(left), PATH=python)
    assert done.returncode == 0, done.stderr[-3000:]
    said = SAID.get(name, f"To submit: {left}/{upload}").format(
        data=left if name == "mme" else data
    )
    assert said in done.stdout
    assert f"Answers: {left}/{answers}\n" in done.stdout
    found = (left / answers).read_bytes()
    assert found == (own / benchmark / "m.jsonl").read_bytes()
    assert len(found.splitlines()) == len(find(benchmark).read(data))
    if upload is not None:
        ours = own / benchmark / f"m.upload{Path(upload).suffix}"
        assert (left / upload).read_bytes() == ours.read_bytes()


@pytest.mark.slow
def test_a_recipe_runs_below_torchrun(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    places = {"DATA": str(data), "OUT": str(tmp_path / "out"), "ANSWERS": str(tmp_path)}
    done = recipe("pope", checkpoint, "--device", "cpu", GPUS="2", **places)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = json.loads((tmp_path / "out" / "pope" / "m.score.json").read_text())["breakdown"]
    printed = dict(re.findall(r"Category: (\w+)[^=]*?F1 score: (\S+)", done.stdout))
    theirs = {f"{split}, F1": pytest.approx(100 * float(value)) for split, value in printed.items()}
    assert {name: value for name, value in ours.items() if name.endswith("F1")} == theirs
    assert len(theirs) == 2


@pytest.mark.slow
def test_a_part_of_the_questions_is_not_given_to_llava(
    checkpoint: Path, data: Path, tmp_path: Path, python: str
) -> None:
    places = {"DATA": str(data), "OUT": str(tmp_path / "out"), "ANSWERS": str(tmp_path)}
    done = recipe("sqa", checkpoint, "--limit", 2, PATH=python, **places)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"a part of the questions: {tmp_path}/out/scienceqa/m.jsonl" in done.stdout
    assert len(rows(tmp_path / "out" / "scienceqa" / "m.jsonl")) == 2
    assert not list((tmp_path / "scienceqa" / "answers").iterdir())


@pytest.mark.slow
def test_where_llavas_scorer_fails_ours_stands(
    checkpoint: Path, data: Path, tmp_path: Path, python: str
) -> None:
    """All labels are no, so that LLaVA's scorer divides by zero."""
    moved = Path(shutil.copytree(data / "pope", tmp_path / "pope"))
    for file in (moved / "coco").iterdir():
        file.write_text(file.read_text().replace('"label": "yes"', '"label": "no"'))
    done = recipe("pope", checkpoint, DATA=str(tmp_path), OUT=str(tmp_path / "out"), PATH=python)
    assert done.returncode == 2
    assert "pope.sh: LLaVA's scorer has failed (see above); it divides by zero" in done.stderr
    assert "POPE" in done.stdout
    assert (tmp_path / "out" / "pope" / "m.score.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gqa", "seed", "mmbench", "mmbench_cn"])
def test_recipes_run_the_scripts_of_a_checkout(
    name: str, checkpoint: Path, data: Path, tmp_path: Path, python: str, converters: Path
) -> None:
    if "mmbench" in name:
        pytest.importorskip("openpyxl", reason=OPENPYXL)
    benchmark, answers, _ = RECIPES[name]
    folder = find(benchmark).folder
    shutil.copytree(data / folder, tmp_path / folder)
    places = {"DATA": str(tmp_path), "OUT": str(tmp_path / "out"), "PATH": python}
    assert recipe(name, checkpoint, **places).returncode == 0
    given = {row["question_id"]: row["text"] for row in rows(tmp_path / answers)}
    if name == "seed":  # whose script fails where a type has no right answer: make them all right
        file = tmp_path / "seed_bench" / "SEED-Bench.json"
        truth = json.loads(file.read_text())
        for question in truth["questions"]:
            question["answer"] = given[int(question["question_id"])]
        file.write_text(json.dumps(truth))
    done = recipe(name, checkpoint, LLAVA=str(converters.parent), **places)
    assert done.returncode == 0, done.stderr[-3000:]
    if name == "seed":
        assert "\nTotal accuracy: 100.00%\n" in done.stdout
        upload = rows(tmp_path / "seed_bench" / "answers_upload" / "m.jsonl")
        assert {int(row["question_id"]): row["prediction"] for row in upload} == given
    elif name == "gqa":
        made = json.loads((tmp_path / "gqa/data/testdev_balanced_predictions.json").read_text())
        assert [row["questionId"] for row in made] == list(given)
        assert f"There is no {tmp_path}/gqa/data/eval/eval.py" in done.stdout
    else:
        import pandas

        upload = Path(answers.replace("/answers/", "/answers_upload/")).with_suffix(".xlsx")
        table = pandas.read_excel(tmp_path / upload)
        assert dict(zip(table["index"], table["prediction"], strict=True)) == given

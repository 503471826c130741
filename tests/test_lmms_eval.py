"""The model ``llava_vlora`` in the real lmms-eval: registry, command line, interface. Data are local."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from llava_vlora.errors import ConfigError, ImageError, PromptError
from llava_vlora.evaluation.answering import generate
from llava_vlora.integrations.answerer import Query
from tests.test_demo import load_tiny
from tests.tiny import COLOURS
from tests.two_stacks import REPO, Finished, run_processes, run_python

#: Where scripts/setup.sh puts lmms-eval: not among the packages of the environment.
BESIDE = Path(os.environ.get("LLAVA_VLORA_LMMS_EVAL", Path(sys.prefix) / "lmms-eval"))
if BESIDE.is_dir() and str(BESIDE) not in sys.path:
    sys.path.append(str(BESIDE))
pytest.importorskip("lmms_eval", reason="lmms-eval is not here: scripts/setup.sh current brings it")

from lmms_eval.api.instance import Instance  # noqa: E402

from llava_vlora.integrations.lmms_eval import LlavaVLoRA  # noqa: E402

QUESTION = "What colour is the image?"
SHORT = {"max_new_tokens": 8}
UTILS = """
from PIL import Image

def visual(doc):
    return [Image.open(path) for path in doc["images"]]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def options(doc):
    return doc["options"]

def exact(doc, results):
    return {"exact": float(results[0] == doc["answer"])}
"""
TASK = """
task: {task}
output_type: {kind}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
{more}
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
GENERATE = """
process_results: !function utils.exact
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
  until: []
"""

#: ``python -m lmms_eval`` with this checkout installed, and without a network.
START = """
import os, runpy, sys
sys.path[:0] = {first}
sys.path.append({last!r})
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME={hub!r})
runpy.run_module("lmms_eval", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def checkpoints(
    llm_dir: Path, tower_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A folder of each kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    for kind in ("llava", "vlora"):
        torch.manual_seed(0)
        load_tiny(kind, llm_dir, tower_dir).model.save_pretrained(root / kind)
        AutoTokenizer.from_pretrained(llm_dir, use_fast=False).save_pretrained(root / kind)
    return {kind: root / kind for kind in ("llava", "vlora")}


@pytest.fixture(scope="module")
def documents(data_dir: Path) -> list[dict[str, Any]]:
    """Questions with one image, with none and with two; prompts of two lengths."""
    shown = [[0], [1], [2], [], [0, 1]]
    return [
        {
            "question": QUESTION if i != 1 else "How many?",
            "images": [str(data_dir / "images" / f"{n}.png") for n in numbers],
            "options": list(COLOURS),
            "answer": list(COLOURS)[i % 4],
        }
        for i, numbers in enumerate(shown)
    ]


def open_model(folder: Path, documents: list[dict[str, Any]], **arguments: Any) -> LlavaVLoRA:
    model = LlavaVLoRA(**{"pretrained": str(folder), "device": "cpu", "batch_size": 4, **arguments})
    model.task_dict["colours"] = {"test": documents}
    return model


@pytest.fixture(scope="module", params=["llava", "vlora"])
def model(
    request: pytest.FixtureRequest, checkpoints: dict[str, Path], documents: list[dict[str, Any]]
) -> LlavaVLoRA:
    return open_model(checkpoints[request.param], documents)


@pytest.fixture(scope="module")
def vlora(checkpoints: dict[str, Path], documents: list[dict[str, Any]]) -> LlavaVLoRA:
    return open_model(checkpoints["vlora"], documents)


def visual(document: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(path) for path in document["images"]]


def request(
    number: int,
    given: Any,
    text: str = QUESTION,
    kind: str = "generate_until",
    show: Callable[[Any], Any] = visual,
) -> Instance:
    """What lmms-eval makes of a document; ``given`` are options of generation or the answer to score."""
    named = {"task": "colours", "doc_id": number, "repeats": 1}
    return Instance(kind, (text, given, show, number, "colours", "test"), number, named)


def expected(model: LlavaVLoRA, document: dict[str, Any], **options: Any) -> str:
    """The answer of the path of ``llava-vlora eval``."""
    images = visual(document)
    query = Query(document["question"], images[0] if images else None)
    answerer = model._answerer
    ids = answerer.ids(query)[None]
    tokens = generate(answerer.loaded, ids, images[:1] or None, **{**SHORT, **options})
    return str(answerer.loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)[0]).strip()


def test_answers_are_those_of_llava_vlora_eval_in_order(
    model: LlavaVLoRA, documents: list[dict[str, Any]]
) -> None:
    requests = [request(i, SHORT, documents[i]["question"]) for i in (3, 0, 1, 2, 0)]
    answers = [expected(model, documents[i]) for i in (3, 0, 1, 2, 0)]
    assert model.generate_until(requests) == answers
    assert len(set(answers)) == 4


def test_options_of_generation_are_honoured(
    vlora: LlavaVLoRA, documents: list[dict[str, Any]]
) -> None:
    def answer(**options: Any) -> str:
        return vlora.generate_until([request(0, {**SHORT, **options})])[0]

    greedy = expected(vlora, documents[0])
    assert answer(temperature=0, do_sample=False, top_p=1.0, num_beams=1) == greedy
    assert answer(temperature=1.0, top_k=1) == greedy  # sampled from one
    assert answer(temperature=1.0, do_sample=False) == greedy
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(answer(temperature=1.0, top_p=0.95))
    assert drawn[0] == drawn[1] != greedy
    assert answer(num_beams=3) == expected(vlora, documents[0], num_beams=3)
    assert answer(max_new_tokens=2) == expected(vlora, documents[0], max_new_tokens=2) != greedy
    assert answer(until=["never", greedy[4:6]]) == greedy[: greedy.index(greedy[4:6])].strip()
    assert answer(until=greedy[4:6]) == answer(until=[greedy[4:6]])
    assert answer(until="", image_aspect_ratio="original") == greedy
    with pytest.raises(ConfigError, match="max_agentic_steps"):
        answer(max_agentic_steps=8)


def test_arguments_are_not_written_to(vlora: LlavaVLoRA) -> None:
    options = {**SHORT, "until": ["."], "temperature": 0.0, "do_sample": False}
    before = dict(options)
    vlora.generate_until([request(0, options)])
    assert options == before


def test_several_images_raise_or_the_first_is_shown(
    vlora: LlavaVLoRA,
    checkpoints: dict[str, Path],
    documents: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ImageError, match=r"colours, document 4 has 2 images.*several_images=first"):
        vlora.generate_until([request(4, SHORT)])
    first = open_model(checkpoints["vlora"], documents, several_images="first")
    assert first.generate_until([request(4, SHORT)]) == [expected(vlora, documents[0])]
    assert "document 4" in caplog.text


@pytest.mark.parametrize("thing", ["clip.mp4", {"array": [0.0], "sampling_rate": 16000}])
def test_video_and_audio_raise(vlora: LlavaVLoRA, thing: object) -> None:
    with pytest.raises(ImageError, match="reads images alone"):
        vlora.generate_until([request(0, SHORT, show=lambda document: [thing])])


def test_blind_answers_are_those_without_image(
    vlora: LlavaVLoRA, checkpoints: dict[str, Path], documents: list[dict[str, Any]]
) -> None:
    blind = open_model(checkpoints["vlora"], documents, blind=True)
    without = vlora.generate_until([request(3, SHORT)])
    assert blind.generate_until([request(i, SHORT) for i in (0, 2, 4)]) == without * 3


def test_rounds(vlora: LlavaVLoRA, documents: list[dict[str, Any]]) -> None:
    """The second round asks another question about another image, with what was said before; the third ends."""
    seen: list[tuple[list[str], int, Any]] = []

    def ask(
        document: object,
        previous_output: list[str],
        round_idx: int,
        previous_round_info: object,
    ) -> tuple[Any, Any, bool, list[str], Any]:
        seen.append((previous_output, round_idx, previous_round_info))
        if round_idx == 2:
            return None, None, True, previous_output, None
        return visual(documents[1]), documents[1]["question"], False, previous_output, "carried"

    named = {"task": "colours", "doc_id": 0, "repeats": 1}
    arguments = (QUESTION, SHORT, visual, ask, 0, "colours", "test")
    asked = Instance("generate_until_multi_round", arguments, 0, named)
    both = [expected(vlora, documents[0]), expected(vlora, documents[1])]
    assert vlora.generate_until_multi_round([asked]) == [both]
    assert seen == [(both[:1], 1, None), (both, 2, "carried")]


def test_scores_are_losses_in_order(model: LlavaVLoRA, documents: list[dict[str, Any]]) -> None:
    """lmms-eval takes the smallest; its delimiter before an answer is the template's business."""
    chosen = [(0, " red"), (3, " green"), (2, " red"), (0, "green"), (1, lambda d: d["answer"])]
    requests = [
        request(i, target, documents[i]["question"], kind="loglikelihood") for i, target in chosen
    ]
    found = [getattr(one, "text", one) for one in model.loglikelihood(requests)]
    for (i, target), score in zip(chosen, found, strict=True):
        images = visual(documents[i])
        query = Query(documents[i]["question"], images[0] if images else None)
        answer = target.strip() if isinstance(target, str) else documents[i]["answer"]
        ((loss, greedy),) = model._answerer.scores([query], [answer])
        assert score == (pytest.approx(loss, abs=1e-5), greedy)
        assert loss > 0


def test_an_answer_without_question_cannot_be_scored(vlora: LlavaVLoRA) -> None:
    named = {"task": "colours", "doc_id": 0, "repeats": 1}
    with pytest.raises(PromptError, match=r"colours.*acc_mutual_info"):
        vlora.loglikelihood([Instance("loglikelihood", ("", "red"), 0, named)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pretrained": None}, "pretrained="),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"several_images": "last"}, "error or first"),
        ({"conv_mode": "vicuna_v1"}, r"'conv_mode'.*conv_template"),
        ({"conv_template": "vicuna"}, "vicuna_v1"),
        ({"device": "tpu"}, "device=tpu"),
    ],
)
def test_wrong_arguments_are_named(
    checkpoints: dict[str, Path], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_model(checkpoints["vlora"], [], **arguments)


def test_memory_is_given_back(checkpoints: dict[str, Path]) -> None:
    """lmms-eval cleans a model before it starts a judge."""
    model = open_model(checkpoints["vlora"], [])
    alive = weakref.ref(model._answerer.loaded.model)
    model.clean()
    assert alive() is None


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This package's entry points as ``pip install`` records them, whatever is installed here."""
    config = ConfigParser()
    config.read(REPO / "setup.cfg")
    points = config["options.entry_points"]["lmms_eval.models"]
    folder = tmp_path_factory.mktemp("site")
    metadata = folder / "llava_vlora-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: llava-vlora\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text(f"[lmms_eval.models]\n{points.strip()}\n")
    return folder


@pytest.fixture(scope="module")
def tasks(documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of answers and one of choices, about the documents that have one image or none."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.json"
    data.write_text(json.dumps(documents[:4]))
    (folder / "utils.py").write_text(UTILS)
    choices = "doc_to_choice: !function utils.options"
    for task, kind, more, metric in (
        ("colours", "generate_until", GENERATE, "exact"),
        ("colour_choices", "multiple_choice", choices, "acc"),
    ):
        text = TASK.format(task=task, kind=kind, data=data, more=more, metric=metric)
        (folder / f"{task}.yaml").write_text(text)
    return folder


def command(checkpoint: Path, tasks: Path, out: Path) -> list[str]:
    flags: dict[str, object] = {
        "model": "llava_vlora",
        "model_args": f"pretrained={checkpoint},device=cpu",
        "tasks": "colours,colour_choices",
        "include_path": tasks,
        "batch_size": 2,
        "output_path": out,
        "verbosity": "DEBUG",
    }
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*given, "--log_samples"]


def samples(out: Path, task: str) -> list[dict[str, Any]]:
    (file,) = out.rglob(f"*_samples_{task}.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return sorted(rows, key=lambda row: row["doc_id"])


def succeeded(done: Finished) -> Finished:
    assert done.code == 0, done.errors[-3000:]
    assert "Traceback" not in done.errors
    return done


@pytest.mark.slow
def test_the_command_finds_the_model_and_scores(
    checkpoints: dict[str, Path],
    documents: list[dict[str, Any]],
    vlora: LlavaVLoRA,
    tasks: Path,
    installed: Path,
    tmp_path: Path,
) -> None:
    code = START.format(first=[str(installed), str(REPO)], last=str(BESIDE), hub=str(tmp_path))
    flags = command(checkpoints["vlora"], tasks, tmp_path / "one")
    succeeded(run_python("-c", code, *flags, cwd=tmp_path))

    answers = samples(tmp_path / "one", "colours")
    assert [row["filtered_resps"] for row in answers] == [expected(vlora, d) for d in documents[:4]]
    right = []
    for row, document in zip(samples(tmp_path / "one", "colour_choices"), documents, strict=False):
        images = visual(document)
        query = Query(document["question"], images[0] if images else None)
        scores = vlora._answerer.scores([query] * 4, document["options"])
        losses = [loss for loss, _ in scores]
        assert [float(loss) for loss, _ in row["filtered_resps"]] == pytest.approx(losses, abs=1e-4)
        best = document["options"][losses.index(min(losses))]
        right.append(best == document["answer"])
        assert row["acc"] == float(right[-1])
    (file,) = (tmp_path / "one").rglob("*_results.json")
    results = json.loads(file.read_text())["results"]
    assert results["colour_choices"]["acc,none"] == sum(right) / 4
    assert results["colours"]["exact,none"] == sum(row["exact"] for row in answers) / 4

    both = command(checkpoints["vlora"], tasks, tmp_path / "two")
    succeeded(run_processes(*both, code=code))
    for task in ("colours", "colour_choices"):
        alone, shared = samples(tmp_path / "one", task), samples(tmp_path / "two", task)
        assert [r["filtered_resps"] for r in shared] == [r["filtered_resps"] for r in alone]

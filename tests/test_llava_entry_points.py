"""LLaVA's evaluators and chat under the launcher, unchanged, and what the launcher and ``register`` promise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.two_stacks import (
    Finished,
    run_module,
    run_modules,
    run_python,
    succeeded,
    train_all,
    trained,
)

MODELS = ["vlora", "mlp"]
EVALUATORS = ["model_vqa_loader", "model_vqa", "model_vqa_science"]
QUESTIONS = [
    {"question_id": 7, "image": "0.png", "text": "What colour is the image?"},
    {"question_id": 3, "image": "1.png", "text": "What colour is the image?"},
    {"question_id": "b", "image": "2.png", "text": "How many colours?"},
]


@pytest.fixture(scope="module")
def checkpoints(llm_dir: Path, tower_dir: Path, data_dir: Path) -> dict[str, Path]:
    """A VLoRA and a stock checkpoint whose answers end early, also where LLaVA asks for 1024 tokens."""
    train_all(llm_dir, tower_dir, data_dir)
    found = {}
    for kind in MODELS:
        source = trained(data_dir) / f"{kind}-finetune"
        found[kind] = shutil.copytree(source, source.parent / f"{kind}-short")
        file = found[kind] / "generation_config.json"
        ends = [2, *range(4, 85, 3)]
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))
    return found


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Question files by evaluator."""
    folder = tmp_path_factory.mktemp("questions")
    lines, science = folder / "questions.jsonl", folder / "science.json"
    lines.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    records = [
        {
            "id": q["question_id"],
            "image": q["image"],
            "conversations": [{"from": "human", "value": f"<image>\n{q['text']}"}],
        }
        for q in QUESTIONS
    ]
    del records[2]["image"]
    science.write_text(json.dumps(records))
    return {"model_vqa_loader": lines, "model_vqa": lines, "model_vqa_science": science}


@pytest.fixture(scope="module")
def finished(
    checkpoints: dict[str, Path], questions: dict[str, Path], data_dir: Path, tmp_path_factory: Any
) -> tuple[Path, Mapping[str, Finished]]:
    """The evaluators' runs, and the folder of their answers."""
    folder, commands = tmp_path_factory.mktemp("answers"), {}
    for kind, checkpoint in checkpoints.items():
        common = ["--model-path", checkpoint, "--temperature", 0, "--conv-mode", "vicuna_v1"]
        for module in EVALUATORS:
            files = ["--question-file", questions[module], "--image-folder", data_dir / "images"]
            answers = ["--answers-file", folder / f"{kind}-{module}.jsonl"]
            commands[f"{kind}-{module}"] = [f"llava.eval.{module}", *common, *files, *answers]
        query = ["--image-file", data_dir / "images" / "0.png", "--query", QUESTIONS[0]["text"]]
        commands[f"{kind}-run_llava"] = ["llava.eval.run_llava", *common, *query]
    return folder, succeeded(run_modules(commands, folder))


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path], data_dir: Path) -> dict[str, list[str]]:
    """Answers through the Python API, for each question with its image; for the last also without."""
    from llava_vlora.integration.api import load, pixel_values, prompt_ids

    answers = {}
    for kind, checkpoint in checkpoints.items():
        loaded, found = load(str(checkpoint)), []
        for question, seen in [*((q, True) for q in QUESTIONS), (QUESTIONS[2], False)]:
            ids = prompt_ids(loaded, str(question["text"]), image=seen)[None]
            picture = Image.open(data_dir / "images" / str(question["image"]))
            images = pixel_values([picture], loaded).half() if seen else None
            with torch.inference_mode():
                out = loaded.model.generate(
                    ids,
                    images=images,
                    image_sizes=[picture.size],
                    do_sample=False,
                    max_new_tokens=1024,
                )
            found.append(loaded.tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip())
        answers[kind] = found
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("module", EVALUATORS)
def test_evaluators_answer_as_the_python_api(
    finished: tuple[Path, Mapping[str, Finished]],
    expected: dict[str, list[str]],
    kind: str,
    module: str,
) -> None:
    lines = (finished[0] / f"{kind}-{module}.jsonl").read_text().splitlines()
    answers = [json.loads(line) for line in lines]
    assert [a["question_id"] for a in answers] == [q["question_id"] for q in QUESTIONS]
    for answer in answers:
        assert set(answer) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert answer["model_id"] == f"{kind}-short"
    wanted = expected[kind][:2] + expected[kind][3 if module == "model_vqa_science" else 2 :][:1]
    assert [a["text"] for a in answers] == wanted
    assert any(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_run_llava_answers_as_the_python_api(
    finished: tuple[Path, Mapping[str, Finished]], expected: dict[str, list[str]], kind: str
) -> None:
    assert finished[1][f"{kind}-run_llava"].output.strip().endswith(expected[kind][0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_chat_streams_two_turns(
    checkpoints: dict[str, Path], expected: dict[str, list[str]], data_dir: Path, kind: str
) -> None:
    """The public code could not stream, so that LLaVA's chat crashed at the first answer."""
    command = [
        "llava.serve.cli",
        *("--model-path", checkpoints[kind], "--image-file", data_dir / "images" / "0.png"),
        *("--conv-mode", "vicuna_v1", "--temperature", 0, "--max-new-tokens", 20),
    ]
    done = run_module(*command, stdin=f"{QUESTIONS[0]['text']}\nWhy?\n")
    assert done.code == 0, done.errors[-3000:]
    turns = done.output.split("ASSISTANT: ")
    assert len(turns) == 3
    assert turns[1].split("USER: ")[0].strip() == expected[kind][0]
    assert turns[2].strip().endswith("exit...")


@pytest.mark.slow
def test_launcher_names_what_it_cannot_run(tmp_path: Path) -> None:
    commands = {"module": [], "llava.nothing": ["llava.nothing"], "nothing": ["nothing.at.all"]}
    for part, done in run_modules(commands, tmp_path).items():
        assert done.code == 2, done.errors
        assert part in done.errors
        assert "Traceback" not in done.errors


def test_importing_the_package_is_cheap() -> None:
    done = run_python(
        "-c",
        "import sys, llava_vlora; print({'torch', 'llava', 'transformers'} & set(sys.modules))",
    )
    assert done.output.strip() == "set()", done.errors


_ORDER = """
import llava.eval.model_vqa_loader as early, llava.serve.cli as chat
stock = early.load_pretrained_model
from llava_vlora.integration.registration import register
first = register()
import llava.eval.model_vqa as late
from llava_vlora.integration.loading import load_pretrained_model as ours
assert stock is not ours
assert early.load_pretrained_model is chat.load_pretrained_model is late.load_pretrained_model is ours
from llava.train import train
patched = train.ModelArguments, train.LlavaLlamaForCausalLM, train.LazySupervisedDataset.__getitem__
assert register() is first
assert patched == (train.ModelArguments, train.LlavaLlamaForCausalLM, train.LazySupervisedDataset.__getitem__)
"""


@pytest.mark.slow
def test_order_of_imports_does_not_matter_and_registering_twice_is_harmless() -> None:
    done = run_python("-c", _ORDER)
    assert done.code == 0, done.errors[-3000:]

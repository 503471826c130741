"""Mistakes on the command line of ``llava-vlora ima``: each ends in one line that names it, none in a traceback."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava_vlora.cli import main
from llava_vlora.errors import ConfigError, IMAError
from llava_vlora.ima.curves import feed
from llava_vlora.ima.masks import MaskSet
from llava_vlora.ima.scores import magnitude_scores
from llava_vlora.ima.selecting import make_mask
from llava_vlora.ima.self_similarity import SelfSimilarity
from llava_vlora.integration.api import load
from tests.test_benchmarks import make_pope
from tests.test_evaluation import paint
from tests.tiny import make_llm
from tests.two_stacks import train_all, trained


@pytest.fixture(scope="module")
def models(llm_dir: Path, tower_dir: Path, data_dir: Path) -> dict[str, Path]:
    train_all(llm_dir, tower_dir, data_dir)
    found = {name: trained(data_dir) / f"{name}-finetune" for name in ("mlp", "vlora")}
    return {**found, "llm": llm_dir}


@pytest.fixture
def examples(data_dir: Path) -> str:
    return f"{data_dir / 'finetune.json'}:{data_dir / 'images'}"


def ima(verb: str, model: Path, examples: str, out: Path, *more: object) -> int:
    words: list[object] = ["ima", verb, "--model", f"m={model}", "--set", examples]
    words += ["--limit", 3, "--device", "cpu", "--out", out]
    return main([*map(str, words), *map(str, more)])


def assert_named(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    errors = capsys.readouterr().err
    assert re.search(message, errors), errors
    assert errors.startswith("llava-vlora ima: ")
    assert "Traceback" not in errors


# --- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["score", "wanda"])
def test_models_that_read_no_images(
    verb: str,
    models: dict[str, Path],
    examples: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ima(verb, models["llm"], examples, tmp_path) == 2
    assert_named("m .* is a plain language model, which reads no images; give a", capsys)


@pytest.mark.parametrize(
    ("verb", "more", "message"),
    [
        ("wanda", ["--tokens", "P"], "no tokens of the kind 'P'. A model without visual tokens"),
        ("score", ["--perceptual-layer", "input"], 'There is no perceptual layer "input"'),
        ("norms", ["--layers", "0"], "Perceptual weights change nothing before block"),
    ],
)
def test_models_without_perceptual_tokens(
    verb: str,
    more: list[str],
    message: str,
    models: dict[str, Path],
    examples: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ima(verb, models["vlora"], examples, tmp_path, *more) == 2
    assert_named(message, capsys)


@pytest.fixture(scope="module")
def damaged(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One weight of the third block is NaN."""
    root = tmp_path_factory.mktemp("damaged")
    for name in ("mlp", "vlora"):
        shutil.copytree(models[name], root / name)
        file = root / name / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    return {name: root / name for name in ("mlp", "vlora")}


@pytest.mark.parametrize(
    ("verb", "model", "message"),
    [
        *((verb, "mlp", "'x' of block 3 .* is not finite") for verb in ("norms", "score", "vocab")),
        ("score", "vlora", "'x' of block 3 .* is not finite"),
        ("wanda", "mlp", "Inputs of 'mlp.down_proj' in block 3 are not finite"),
        ("views", "vlora", r"What .* adds in block 4 .* is not finite"),
        ("ablate", "vlora", r"no finite log-probability with the weights 'whole'"),
    ],
)
def test_damaged_weights(
    verb: str,
    model: str,
    message: str,
    damaged: dict[str, Path],
    examples: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ima(verb, damaged[model], examples, tmp_path) == 2
    assert_named(message, capsys)


# --- examples --------------------------------------------------------------------------------------


def record(question: object = "What?", answer: object = "red", image: object = "0.png") -> Any:
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "1", "image": image, "conversations": said}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", None, "x.json is missing; run"),
        ("x.json", "[]", "x.json has no questions with an image"),
        ("x.json", "[{", "x.json is not valid JSON"),
        ("x.json", [record(), record(None)], "x.json, record 1 has no question with an answer"),
        ("x.json", [record(answer=3)], "x.json, record 0 has no question with an answer"),
        ("x.json", [{"conversations": ["value", "value"]}], "record 0 has no question"),
        (
            "x.json",
            [record(image=["0.png", "1.png"])],
            r"record 0: 'image' is \['0.png', '1.png'\]",
        ),
        ("x.json", [record(image="absent.png")], "absent.png cannot be read as an image"),
        ("x.json", [record("what " * 3000)], "longer than the model reads"),
        ("x.jsonl", '{"text": "a", "image": "0.png"}\n{', "x.jsonl, line 2: not valid JSON"),
        ("x.jsonl", '{"text": 5, "image": "0.png"}', "x.jsonl, line 1: 'text' is 5; one text"),
        (
            "x.jsonl",
            '{"text": "a", "image": "0.png", "answer": 5}',
            "x.jsonl, line 1: 'answer' is 5; one text",
        ),
        ("x.jsonl", '{"text": "a", "image": "0.png"}', "has no answer to read behind the question"),
    ],
)
def test_files_of_examples(
    name: str,
    content: Any,
    message: str,
    models: dict[str, Path],
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / name).write_text(text)
    examples = f"{tmp_path / name}:{data_dir / 'images'}"
    assert ima("score", models["mlp"], examples, tmp_path / "out") == 2
    assert_named(message, capsys)


def test_folders_and_names_of_examples(
    models: dict[str, Path], examples: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ima("score", models["mlp"], f"{tmp_path}:{tmp_path}", tmp_path / "out") == 2
    assert_named("cannot be read", capsys)
    assert ima("score", models["mlp"], examples, tmp_path / "out", "--set", examples) == 2
    assert_named("--set names 'finetune' twice", capsys)


# --- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "more", "message"),
    [
        ("norms", ["--points", "x,x"], "A state is named twice"),
        ("norms", ["--layers", "1,1"], "--layers 1,1: give each number once"),
        ("selfsim", ["--steps", "0"], "The step is 0; states are compared 1 or more"),
        ("selfsim", ["--steps=-1"], "The step is -1; states are compared 1 or more"),
        ("selfsim", ["--steps", "9"], "are 9 apart; leave 9 out of the steps"),
        ("wanda", ["--pattern", "2:4", "--sparsity", "0.3"], "2:4 prunes 0.5 .* not 0.3"),
        ("wanda", ["--sequential", "--group", "global"], "cannot be compared globally"),
        ("wanda", ["--sequential", "--context", "alone"], "'all' cannot be read alone"),
        ("wanda", ["--measure", "magnitude", "--tokens", "P"], "'magnitude' reads no tokens"),
        ("wanda", ["--measure", "random", "--context", "alone"], "'random' reads no tokens"),
    ],
)
def test_settings(
    verb: str,
    more: list[str],
    message: str,
    models: dict[str, Path],
    examples: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ima(verb, models["mlp"], examples, tmp_path, *more) == 2
    assert_named(message, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("wanda", ["--layers", "9"]),
        ("wanda", ["--points", "fc1"]),
        ("score", ["--points", "fc1"]),
        ("score", ["--seed", "-1"]),
        ("score", ["--limit", "0"]),
    ],
)
def test_settings_that_a_verb_has_not(
    verb: str,
    more: list[str],
    models: dict[str, Path],
    examples: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        ima(verb, models["mlp"], examples, tmp_path, *more)
    assert ended.value.code == 2
    assert more[0] in capsys.readouterr().err


def test_sequential_masks_have_the_pattern_that_is_asked_for(
    models: dict[str, Path], examples: str, tmp_path: Path
) -> None:
    assert ima("wanda", models["mlp"], examples, tmp_path, "--sequential", "--pattern", "2:4") == 0
    (file,) = tmp_path.glob("*.safetensors")
    mask = MaskSet.load(file)
    assert mask.about["order"] == "sequential"
    for place in mask.shapes:
        assert mask.kept(place).unflatten(1, (-1, 4)).sum(-1).eq(2).all()


def test_steps_of_the_library() -> None:
    from tests.test_ima_similarity import example

    with pytest.raises(ConfigError, match="The step is 0"):
        feed([example("a")], SelfSimilarity([0]))
    with pytest.raises(IMAError, match="There is no example"):
        feed([], SelfSimilarity([1]))


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["norms", "score", "wanda", "collect", "chair", "iou", "subnet"])
def test_folders_that_cannot_be_written(
    verb: str,
    models: dict[str, Path],
    examples: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        if verb == "chair":
            words = ["--captions", "a=b", "--objects", "c", "--synonyms", "d", "--out", str(out)]
            assert main(["ima", verb, *words]) == 2
        elif verb in ("iou", "subnet"):
            assert main(["ima", verb, "mask", "--out", str(out)]) == 2
        else:
            assert ima(verb, models["mlp"], examples, out) == 2
        assert_named(r"file(/below)? cannot be written .*; give another folder", capsys)


@pytest.fixture(scope="module")
def mask_file(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    make_mask(magnitude_scores(load(str(models["mlp"]), device="cpu").model), 0.5).save(file)
    return file


def broken(kind: str, mask: Path, folder: Path) -> Path:
    file = folder / kind
    content = mask.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "flipped":
        file.write_bytes(content[:-100] + bytes([content[-100] ^ 255]) + content[-99:])
    elif kind == "weights":
        save_file({"a": torch.zeros(2)}, file)
    elif kind == "text":
        file.write_text("{}")
    elif kind == "folder":
        file.mkdir()
    return file


@pytest.mark.parametrize("kind", ["truncated", "flipped", "weights", "text", "folder", "absent"])
def test_files_that_are_no_masks(
    kind: str,
    mask_file: Path,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = str(broken(kind, mask_file, tmp_path))
    make_pope(tmp_path / "data")
    for words in (
        ["subnet", file],
        ["iou", file, str(mask_file)],
        ["iou", str(mask_file), file],
        ["prune-eval", "--mask", file, "--model", f"m={models['mlp']}", "--benchmarks", "pope"],
    ):
        data = ["--data", str(tmp_path / "data")] if words[0] == "prune-eval" else []
        assert main(["ima", *words, *data, "--out", str(tmp_path / "out")]) == 2
        assert_named(f"{kind} .*; make it with `llava-vlora ima wanda`", capsys)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vlora", "shapes agree, weights do not. Make one for this model"),
        ("other", "q_proj.* of block"),
    ],
)
def test_masks_of_other_models(
    model: str,
    message: str,
    mask_file: Path,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_pope(tmp_path / "data")
    paint(tmp_path / "data")
    mask = mask_file
    if model == "other":
        from transformers import AutoModelForCausalLM

        larger = AutoModelForCausalLM.from_pretrained(make_llm(tmp_path / "llm", layers=5))
        mask = tmp_path / "larger.safetensors"
        made = make_mask(magnitude_scores(larger), 0.5)
        made.save(mask)
        message = "of another model: 'self_attn.q_proj' of block 5 is .* and absent in"
    flags = ["--model", f"m={models['vlora']}", "--benchmarks", "pope", "--mask", str(mask)]
    place = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["ima", "prune-eval", *flags, *place]) == 2
    assert_named(message, capsys)


def test_benchmarks_and_meanings_that_are_none(
    mask_file: Path,
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["ima", "prune-eval", "--model", f"m={models['mlp']}", "--mask", str(mask_file)]
    flags += ["--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    assert main(flags) == 2
    assert_named("Give --benchmarks; `llava-vlora ima prune-eval --help` lists them", capsys)
    make_pope(tmp_path)
    for delta, message in (
        ("dens", "delta 'dens' is unknown"),
        ("masked", "m .* has no perceptual weights; delta 'masked' is of VLoRA models"),
    ):
        assert main([*flags, "--benchmarks", "pope", "--delta", delta]) == 2
        assert_named(message, capsys)


@pytest.mark.parametrize("content", ['{"models": {"a": {}}, "command": "", "versions": {}}', "[]"])
def test_pages_of_damaged_results(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "score.json").write_text(content)
    assert main(["ima", "report", str(tmp_path)]) == 2
    assert_named("score.json", capsys)


@pytest.mark.parametrize(
    ("scores", "metrics", "message"),
    [
        ("abc", "abc", "3 points say nothing about a correlation; give at least 4"),
        ("abcd", "abc", "has no figure of 'd'"),
    ],
)
def test_too_few_figures_to_correlate(
    scores: str,
    metrics: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, models in (("scores", scores), ("metrics", metrics)):
        figures = {model: i for i, model in enumerate(models)}
        (tmp_path / f"{name}.json").write_text(json.dumps(figures))
    files = ["--scores", f"{tmp_path / 'scores.json'}", "--metrics", f"{tmp_path / 'metrics.json'}"]
    assert main(["ima", "correlate", *files, "--out", str(tmp_path)]) == 2
    assert_named(message, capsys)

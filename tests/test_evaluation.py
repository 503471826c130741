"""``llava-vlora eval`` with real models: resumable, the same at any batch size and number of processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llava_vlora import provenance
from llava_vlora.benchmarks import find
from llava_vlora.benchmarks.base import Sample
from llava_vlora.cli import main
from llava_vlora.errors import AnswersError
from llava_vlora.evaluation import running
from llava_vlora.evaluation.answer_log import AnswerLog
from llava_vlora.evaluation.files import alone, is_model_name, read_rows
from llava_vlora.evaluation.fingerprint import fingerprint
from llava_vlora.integration.api import Loaded, prompt_ids
from tests.test_benchmarks import make_pope, make_scienceqa, make_textvqa
from tests.tiny import COLOURS
from tests.two_stacks import run_processes, train_all, trained

CLI = "import sys\nfrom llava_vlora.cli import main\nraise SystemExit(main(sys.argv[1:]))\n"


def paint(root: Path) -> None:
    """The images of POPE and ScienceQA, in colours that the tiny models were trained to name."""
    places = [f"pope/val2014/{i}.jpg" for i in range(4)]
    places += ["scienceqa/images/test/4/image.png", "scienceqa/images/test/7/image.png"]
    for i, place in enumerate(places):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 44 + i), list(COLOURS.values())[i % 4]).save(root / place)


@pytest.fixture(scope="module")
def model(llm_dir: Path, tower_dir: Path, data_dir: Path) -> Path:
    """A VLoRA model of LLaVA's trainer."""
    train_all(llm_dir, tower_dir, data_dir)
    return trained(data_dir) / "vlora-finetune"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Benchmarks with their images."""
    root = tmp_path_factory.mktemp("eval")
    for make in (make_pope, make_scienceqa, make_textvqa):
        make(root)
    paint(root)
    return root


def evaluate(model: Path, data: Path, out: Path, *more: object) -> int:
    flags = [
        "--model",
        model,
        "--name",
        "m",
        "--data",
        data,
        "--out",
        out,
        "--device",
        "cpu",
        *more,
    ]
    if "--benchmarks" not in flags:
        flags += ["--benchmarks", "pope"]
    return main(["eval", *map(str, flags)])


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of both benchmarks."""
    out = tmp_path_factory.mktemp("whole")
    assert evaluate(model, data, out, "--benchmarks", "pope,scienceqa") == 0
    return out


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_answers_are_in_llavas_format_and_order(whole: Path, data: Path) -> None:
    for name in ("pope", "scienceqa"):
        samples = find(name).read(data)
        found = rows(whole / name / "m.jsonl")
        assert [row["question_id"] for row in found] == [s.question_id for s in samples]
        assert [row["prompt"] for row in found] == [s.row_prompt for s in samples]
        assert set(found[0]) == {
            "question_id",
            "prompt",
            "text",
            "answer_id",
            "model_id",
            "metadata",
        }
        score = json.loads((whole / name / "m.score.json").read_text())
        again = find(name).score(
            samples, {s.id: row["text"] for s, row in zip(samples, found, strict=True)}
        )
        assert score["metrics"] == again.metrics
        assert score["versions"]["transformers"]
    assert len({row["text"] for row in rows(whole / "pope" / "m.jsonl")}) > 1


@pytest.mark.parametrize("size", [1, 3])
def test_answers_do_not_depend_on_the_batch(
    size: int, whole: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    more = ["--benchmarks", "pope,scienceqa", "--batch-size", size]
    assert evaluate(model, data, tmp_path, *more) == 0
    for name in ("pope", "scienceqa"):
        same = (whole / name / "m.jsonl").read_bytes()
        assert (tmp_path / name / "m.jsonl").read_bytes() == same


@pytest.mark.slow
def test_two_processes_answer_as_one(whole: Path, model: Path, data: Path, tmp_path: Path) -> None:
    flags = ["--model", model, "--name", "m", "--data", data, "--out", tmp_path, "--device", "cpu"]
    done = run_processes("eval", *flags, "--benchmarks", "pope,scienceqa", code=CLI)
    assert done.code == 0, done.errors[-3000:]
    for name in ("pope", "scienceqa"):
        found = tmp_path / name
        assert (found / "m.jsonl").read_bytes() == (whole / name / "m.jsonl").read_bytes()
        assert sorted(f.name for f in found.iterdir()) == ["m.jsonl", "m.score.json"]


def test_a_rerun_goes_on(
    whole: Path, model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a crash in the middle of a line, and with what another process had answered."""
    lines = (whole / "pope" / "m.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "pope").mkdir()
    (tmp_path / "pope" / "m.jsonl").write_text("".join(lines[2:4]) + lines[1][:30])
    (tmp_path / "pope" / "m.part1.jsonl").write_text(lines[0] + lines[2] + lines[5][:-1])
    asked: list[Sample] = []
    stock = running._answer

    def answer(loaded: Any, ids: Any, samples: list[Sample], *rest: Any) -> Any:
        asked.extend(samples)
        return stock(loaded, ids, samples, *rest)

    monkeypatch.setattr(running, "_answer", answer)
    assert evaluate(model, data, tmp_path) == 0
    order = [s.id for s in find("pope").read(data)]
    assert {s.id for s in asked} == {order[1], order[4], order[5]}
    assert (tmp_path / "pope" / "m.jsonl").read_text() == "".join(lines)
    asked.clear()
    assert evaluate(model, data, tmp_path) == 0
    assert not asked


def test_answers_of_another_model_are_neither_used_nor_lost(
    whole: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "out", shutil.copytree(model, tmp_path / "other")
    shutil.copytree(whole / "pope", out / "pope")
    before = (out / "pope" / "m.jsonl").read_bytes()
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"][5] *= 2
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert evaluate(other, data, out) == 2
    message = capsys.readouterr().err
    assert "m.jsonl, line 1 was answered by another model" in message
    assert "--fresh" in message
    assert (out / "pope" / "m.jsonl").read_bytes() == before
    assert evaluate(other, data, out, "--fresh") == 0
    assert (out / "pope" / "m.1.jsonl").read_bytes() == before
    assert evaluate(other, data, out, "--conv-mode", "plain") == 2  # another way of asking


def test_blind_answers_stand_beside(whole: Path, model: Path, data: Path, tmp_path: Path) -> None:
    assert evaluate(model, data, tmp_path, "--blind") == 0
    blind, seeing = rows(tmp_path / "pope" / "m.blind.jsonl"), rows(whole / "pope" / "m.jsonl")
    assert blind[0]["metadata"] != seeing[0]["metadata"]
    # The same question about two images has one answer for the blind.
    asked: dict[str, set[str]] = {}
    for row in blind:
        asked.setdefault(row["prompt"], set()).add(row["text"])
    assert all(len(texts) == 1 for texts in asked.values())


def test_a_plain_language_model_is_asked_blind(
    llm_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(llm_dir, data, tmp_path) == 2
    assert "is a plain language model, which reads no images; ask it with --blind" in (
        capsys.readouterr().err
    )
    assert evaluate(llm_dir, data, tmp_path, "--blind") == 0


def test_two_evaluations_do_not_share_a_file(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(tmp_path / ".m.lock", "test"):
        assert evaluate(model, data, tmp_path) == 2
        assert "Another evaluation of m works in" in capsys.readouterr().err
        assert evaluate(model, data, tmp_path, "--blind") == 0  # another file


def test_missing_images_are_named_at_once(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(data, tmp_path / "data")
    (broken / "pope" / "val2014" / "3.jpg").unlink()
    assert evaluate(model, broken, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "1 of 6 images of pope are missing" in message
    assert "3.jpg of question 3" in message


def test_a_damaged_image_loses_no_answer(
    whole: Path, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(data, tmp_path / "data")
    image = broken / "pope" / "val2014" / "3.jpg"
    image.write_bytes(image.read_bytes()[:100])
    assert evaluate(model, broken, tmp_path / "out", "--batch-size", 1) == 2
    assert "3.jpg" in capsys.readouterr().err
    kept = rows(tmp_path / "out" / "pope" / "m.jsonl")
    shutil.copy(data / "pope" / "val2014" / "3.jpg", broken / "pope" / "val2014")
    assert evaluate(model, broken, tmp_path / "out") == 0
    found = rows(tmp_path / "out" / "pope" / "m.jsonl")
    assert [row["text"] for row in found] == [r["text"] for r in rows(whole / "pope" / "m.jsonl")]
    assert len(kept) < len(found)


# --- the log ---------------------------------------------------------------------------------------

SAMPLES = [Sample(i, f"Question {i}?") for i in range(3)]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (
            '{"question_id": 7, "prompt": "?", "text": "", "metadata": {"run": "k"}}',
            "question 7, which is not",
        ),
        (
            '{"question_id": 1, "prompt": "?", "text": "", "metadata": {"run": "k"}}',
            "another prompt to question 1",
        ),
        (
            '{"question_id": 0, "prompt": "Question 0?", "text": "", "metadata": {"run": "k"}}',
            "a second time",
        ),
        (
            '{"question_id": 1, "prompt": "Question 1?", "text": "", "metadata": {}}',
            "another model",
        ),
        ("[1]", "is no answer"),
        ("half", "is no answer"),
        ('{"question_id": [1], "prompt": "?", "text": "", "metadata": {}}', "is no answer"),
    ],
)
def test_rows_that_do_not_belong_are_named(line: str, part: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    log = AnswerLog(file, "m", "k", SAMPLES)
    log.append({0: "yes"})
    text = file.read_text() + line + "\n"
    file.write_text(text)
    with pytest.raises(AnswersError, match=r"a\.jsonl, line 2 .*") as caught:
        AnswerLog(file, "m", "k", SAMPLES)
    assert part in str(caught.value)
    assert file.read_text() == text
    with pytest.raises(AnswersError, match="lacks 2 answers, the first to 1"):
        log.finish()


def test_answers_with_odd_line_ends_and_other_scripts_stay_whole(tmp_path: Path) -> None:
    """Lines end at a line feed alone; files are ASCII, as LLaVA writes them."""
    said = {0: "one\u2028two\x85three\x0cfour", 1: "图\n中", 2: "\x1c"}
    log = AnswerLog(tmp_path / "a.jsonl", "m", "k", SAMPLES)
    log.append(said)
    log.finish()
    assert AnswerLog(tmp_path / "a.jsonl", "m", "k", SAMPLES).answers == said
    (tmp_path / "a.jsonl").read_bytes().decode("ascii")
    assert [r["text"] for r in read_rows(tmp_path / "a.jsonl", ("text",))] == list(said.values())


@pytest.mark.parametrize("marked", [False, True])
def test_prompts_have_the_marks_a_model_was_trained_with(model: Path, marked: bool) -> None:
    """LLaVA's evaluators put <im_start> and <im_end> around the image for models that know them."""
    tokenizer = AutoTokenizer.from_pretrained(model, use_fast=False)
    config = SimpleNamespace(mm_use_im_start_end=marked)
    loaded = Loaded(tokenizer, SimpleNamespace(config=config), None, 2048)
    conversation = conv_templates["vicuna_v1"].copy()
    slot = "<im_start><image><im_end>" if marked else "<image>"
    conversation.append_message(conversation.roles[0], f"{slot}\nWhat?")
    conversation.append_message(conversation.roles[1], None)
    theirs = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")
    assert prompt_ids(loaded, "What?").equal(theirs)


def test_checkpoints_of_two_runs_have_two_names(model: Path, data: Path, tmp_path: Path) -> None:
    link = tmp_path / "run" / "checkpoint-5"
    link.parent.mkdir()
    shutil.copytree(model, link)
    flags = ["--model", link, "--benchmarks", "scienceqa", "--data", data, "--device", "cpu"]
    assert main(["eval", *map(str, flags), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "scienceqa" / "run_checkpoint-5.jsonl").is_file()


def test_models_and_parts_of_answers_keep_apart(tmp_path: Path) -> None:
    """A model may be called almost like the files of several processes of another one."""
    other = AnswerLog(tmp_path / "m.part.2.jsonl", "m.part.2", "k", SAMPLES)
    other.append({0: "other"})
    log = AnswerLog(tmp_path / "m.jsonl", "m", "k", SAMPLES)
    log.part(1).append({1: "yes"})
    log.collect()
    assert log.answers == {1: "yes"}
    assert not (tmp_path / "m.part1.jsonl").exists()
    assert AnswerLog(other.path, "m.part.2", "k", SAMPLES).answers == {0: "other"}


@pytest.mark.parametrize("name", ["m.blind", "m.part2", "a/b", "..", "a b", "a[1]"])
def test_names_that_other_files_may_have_are_refused(
    name: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", model, "--name", name, "--benchmarks", "scienceqa", "--data", data]
    assert main(["eval", *map(str, flags), "--out", str(tmp_path / "out")]) == 2
    assert "give --name" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_fresh_sets_the_answers_of_several_processes_aside(
    whole: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    """What an interrupted run left, of this or another model, is neither used nor in the way nor lost."""
    left = {0: (whole / "pope" / "m.jsonl").read_text().splitlines()[0], 1: '{"of": "another"}'}
    (tmp_path / "pope").mkdir()
    for rank, line in left.items():
        line = line.replace('"text": "', '"text": "stale ')
        (tmp_path / "pope" / f"m.part{rank}.jsonl").write_text(line + "\n")
    assert evaluate(model, data, tmp_path, "--fresh") == 0
    assert "stale" not in (tmp_path / "pope" / "m.jsonl").read_text()
    assert "stale" in (tmp_path / "pope" / "m.part0.1.jsonl").read_text()
    assert (tmp_path / "pope" / "m.part1.1.jsonl").is_file()


@pytest.mark.parametrize(
    ("program", "ranks", "expected"),
    [
        ("/v/bin/llava-vlora", {}, "/v/bin/llava-vlora eval --name 'a b'"),
        ("/v/llava_vlora/__main__.py", {}, "python -m llava_vlora eval --name 'a b'"),
        (
            "/v/llava_vlora/__main__.py",
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nproc_per_node 8 -m llava_vlora eval --name 'a b'",
        ),
        (
            "/v/llava_vlora/__main__.py",
            {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
            "torchrun --nnodes 2 --nproc_per_node 4 -m llava_vlora eval --name 'a b'",
        ),
    ],
)
def test_commands_can_be_typed_again(
    program: str, ranks: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [program, "eval", "--name", "a b"])
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert provenance.command() == expected


@pytest.mark.parametrize("name", ["llava-v1.5-7b", "blind", "a=1+c-seed-0", "m.partial", "模型"])
def test_names_of_models_and_of_sweeps_are_taken(name: str) -> None:
    assert is_model_name(name)


def test_fingerprint_follows_weights_and_config(tmp_path: Path, model: Path) -> None:
    before = fingerprint(model)
    copy = shutil.copytree(model, tmp_path / "copy")
    assert fingerprint(copy) == before
    (copy / "trainer_state.json").write_text("{}")
    assert fingerprint(copy) == before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"mm_vision_select_layer": -1}))
    assert fingerprint(copy) != before
    assert fingerprint(copy, "base") != fingerprint(copy)

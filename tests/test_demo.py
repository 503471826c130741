"""The demo's plan, its child processes, and answering and measuring with real tiny models."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import COLOURS, make_vlora, trainer
from transformers import AutoTokenizer

from llava_vlora.cli import demo as verb
from llava_vlora.cli import main
from llava_vlora.demo import plan
from llava_vlora.demo.pipeline import clear, pick_samples, shell_line
from llava_vlora.demo.plan import RunFolder, Settings, recipe_flags, training_command
from llava_vlora.demo.process import Job, StageError, TrainerProgress, run_jobs, worker_progress
from llava_vlora.errors import ConfigError, DataError
from llava_vlora.evaluation.answering import answer, open_images
from llava_vlora.evaluation.files import Question
from llava_vlora.evaluation.measuring import (
    measure_times,
    parameter_counts,
    sequence_length,
    text_length,
)
from llava_vlora.generators import KINDS
from llava_vlora.integration.api import Loaded
from llava_vlora.sceneqa import SIZES, dataset_files, scene_size

SETTINGS = Settings("small", 7, None, "cpu", 8, 2, 1)


# --- the plan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", plan.STAGES)
@pytest.mark.parametrize("kind", ["mlp2x_gelu", *KINDS])
@pytest.mark.parametrize("size", SIZES)
def test_a_recipe_has_the_flags_of_its_kind_and_no_other(
    size: str, kind: str, stage: plan.Stage
) -> None:
    recipe, files = scene_size(size).recipe, dataset_files(Path("data"))
    plain = recipe_flags(size, recipe, files, stage)
    flags = recipe_flags(size, recipe, files, stage, kind)
    own = {name: value for name, value in flags.items() if name not in plain}
    assert plain == {name: value for name, value in flags.items() if name in plain}
    if kind in KINDS:
        assert own == recipe.generators[kind]
        assert own.keys() <= KINDS[kind].config.names().keys()
        assert KINDS[kind].config.from_keys(own, where="the recipe").layers(4) == (0, 1, 2, 3)
    else:
        assert not own


def test_the_papers_recipe_is_what_it_was() -> None:
    settings = {"vlora_depth": 2, "vlora_heads": 16, "vlora_rank": 32, "vlora_alpha": 32}
    settings |= {"vlora_type": "qkvom", "skip_layers": 1}
    for size, width in (("small", 128), ("full", 256)):
        assert scene_size(size).recipe.settings("vlora") == settings | {"vlora_dim": width}


def test_a_kind_without_a_recipe_gets_its_defaults_in_every_layer() -> None:
    assert scene_size("small").recipe.settings("another") == {"skip_layers": 1}


def test_printed_commands_mean_the_same_to_a_shell(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a run's folder")
    command = training_command(SETTINGS, folder, "vlora", "finetune")
    line = shell_line(command, folder).removeprefix("python ")
    script = 'RUN="$1"; ASSETS="$2"; printf "%s\\n" ' + line
    shell = ["bash", "-c", script, "bash", str(folder.root), str(plan.ASSETS)]
    words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == command[1:]


def test_steps_scale_both_stages() -> None:
    full = SETTINGS.recipe()
    half = Settings("small", 7, full.finetune_steps // 2, "cpu", 8, 2, 1).recipe()
    assert half.finetune_steps * 2 == full.finetune_steps
    assert half.pretrain_steps * 2 == pytest.approx(full.pretrain_steps, abs=1)
    # A sixth of a step is still one step.
    assert Settings("full", 7, 1, "cpu", 8, 2, 1).recipe().pretrain_steps == 1


def test_samples_show_every_category_and_are_the_same_every_time() -> None:
    questions = [Question(i, f"{i}.png", "?", "abcdefg"[i % 7]) for i in range(70)]
    chosen = pick_samples(questions, 12, 3)
    assert chosen == pick_samples(questions, 12, 3)
    assert chosen != pick_samples(questions, 12, 4)
    assert {q.category for q in chosen} == set("abcdefg")
    assert len({q.id for q in chosen}) == 12
    assert len(pick_samples(questions[:3], 12, 0)) == 3


def test_a_new_run_takes_away_an_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "models" / "llava").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and no demo run"):
        clear(folder)
    folder.run.write_text("{}")
    clear(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_command_line_refuses_what_cannot_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--steps", "0"])
    assert "0 is not 1 or more" in capsys.readouterr().err
    assert main(["demo", "--only-report", "--out", str(tmp_path)]) == 2
    assert "run.json is missing" in capsys.readouterr().err


def test_help_names_every_option() -> None:
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers())
    args = parser.parse_args(["demo"])
    names = ("size", "seed", "steps", "out", "device", "batch_size", "only_report")
    assert [getattr(args, name) for name in names] == [
        *("small", 0, None, Path("runs/demo"), "auto", 32, False)
    ]


# --- child processes --------------------------------------------------------------------------------


def python_job(tmp_path: Path, name: str, code: str) -> Job:
    return Job(name, [sys.executable, "-c", code], tmp_path / f"{name}.log", 5, worker_progress)


def run_quietly(jobs: list[Job], parallel: int = 2) -> None:
    console = Console(quiet=True)
    run_jobs(jobs, parallel=parallel, environment={"ANSWER": "42"}, console=console)


def test_jobs_write_logs_and_get_the_environment(tmp_path: Path) -> None:
    code = "import os, sys; print('progress 5 5'); print(os.environ['ANSWER'], file=sys.stderr)"
    run_quietly([python_job(tmp_path, name, code) for name in ("one", "two", "three")])
    for name in ("one", "two", "three"):
        assert sorted((tmp_path / f"{name}.log").read_text().split()) == [
            "42",
            "5",
            "5",
            "progress",
        ]


def test_a_failing_job_shows_its_log_and_stops_the_others(tmp_path: Path) -> None:
    failing = python_job(tmp_path, "failing", "print('before'); raise SystemExit('the reason')")
    waiting = python_job(tmp_path, "waiting", "import time; time.sleep(120)")
    start = time.monotonic()
    with pytest.raises(StageError, match=r"failing ended with exit code 1(.|\n)*the reason"):
        run_quietly([waiting, failing])
    assert time.monotonic() - start < 60


def test_progress_is_read_from_the_lines_that_tell_it() -> None:
    assert worker_progress("progress 3 12\n") == 3
    assert worker_progress("progress is slow\n") is None
    steps = TrainerProgress(10)
    assert steps("Formatting inputs...\n") is None
    assert [steps("{'loss': 1.0, 'epoch': 0.1}\n") for _ in range(3)] == [10, 20, 30]
    assert steps("{'train_runtime': 3.0}\n") is None


# --- answering and measuring ------------------------------------------------------------------------


def load_tiny(kind: str, llm: Path, tower: Path) -> Loaded:
    if kind == "vlora":
        model = make_vlora(llm, tower)
    else:
        train = trainer()
        arguments = train.ModelArguments(
            model_name_or_path=str(llm),
            vision_tower=str(tower),
            mm_vision_select_layer=-2,
            mm_projector_type="mlp2x_gelu",
            mm_use_im_patch_token=False,
        )
        model = train.LlavaLlamaForCausalLM.from_pretrained(str(llm))
        model.get_model().initialize_vision_modules(arguments)
        model.config.mm_use_im_start_end = model.config.mm_use_im_patch_token = False
        model.get_vision_tower().float()
        model.eval()
    model.config.image_aspect_ratio = "pad"
    tokenizer = AutoTokenizer.from_pretrained(llm, use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token
    return Loaded(tokenizer, model, model.get_vision_tower().image_processor, 512)


@pytest.fixture(scope="module", params=["llava", "vlora"])
def tiny(request: pytest.FixtureRequest, llm_dir: Path, tower_dir: Path) -> tuple[str, Loaded]:
    torch.manual_seed(0)
    return request.param, load_tiny(request.param, llm_dir, tower_dir)


@pytest.fixture
def questions() -> list[Question]:
    texts = ("What colour is the image?", "How many?", "Is the image red?")
    return [Question(10 + i, f"{i % len(COLOURS)}.png", texts[i % 3], "c") for i in range(9)]


def test_batches_change_no_answer_and_keep_the_order(
    tiny: tuple[str, Loaded], questions: list[Question], data_dir: Path
) -> None:
    images, seen = data_dir / "images", []
    alone = answer(tiny[1], questions, images, batch_size=1, max_new_tokens=6)
    batched = answer(
        tiny[1], questions, images, batch_size=4, max_new_tokens=6,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert batched == alone
    assert len(set(alone)) > 1
    assert seen[-1] == (9, 9)


def test_blind_answers_need_no_image_and_do_not_depend_on_it(
    tiny: tuple[str, Loaded], questions: list[Question], tmp_path: Path
) -> None:
    blind = answer(tiny[1], questions, tmp_path, see=False, batch_size=4, max_new_tokens=6)
    assert blind[0] == blind[3] == blind[6]
    with pytest.raises(DataError, match="png cannot be read"):
        answer(tiny[1], questions, tmp_path)


def test_the_language_model_reads_the_patches_or_the_text_alone(
    tiny: tuple[str, Loaded], questions: list[Question], data_dir: Path
) -> None:
    kind, loaded = tiny
    image = open_images([questions[0].image], data_dir / "images")[0]
    text = text_length(loaded, questions[0].text)
    patches = {"llava": 16, "vlora": 0}[kind]
    assert sequence_length(loaded, questions[0].text, image) == text + patches


def test_times_are_measured_and_parameters_counted(
    tiny: tuple[str, Loaded], questions: list[Question], data_dir: Path
) -> None:
    kind, loaded = tiny
    image = open_images([questions[0].image], data_dir / "images")[0]
    times = measure_times({kind: loaded}, questions[0].text, image, new_tokens=5, repeats=3)[kind]
    assert times.first_token_range[0] <= times.first_token <= times.first_token_range[1]
    assert times.first_token > 0
    assert times.repeats == 3
    counts = parameter_counts(loaded)
    whole = sum(p.numel() for p in loaded.model.parameters())
    assert counts["vision_tower"] + counts["trainable_finetune"] == whole
    projector: Any = loaded.model.get_model().mm_projector
    assert counts["trainable_pretrain"] == sum(p.numel() for p in projector.parameters())


# --- all of it --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a few scenes, more than the steps take."""
    small = SIZES["small"]
    few = replace(small.recipe, train_images=200, test_images=20)
    monkeypatch.setitem(SIZES, "small", replace(small, recipe=few))
    out = tmp_path / "run"
    assert main(["demo", "--steps", "4", "--out", str(out), "--device", "cpu", "--seed", "5"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["run"]["settings"]["seed"] == 5
    assert report["accuracy"]["vlora"]["overall"]["total"] == report["data"]["test_questions"]
    for check in report["batch_check"].values():
        assert check["same_as_batch_of_one"] == check["checked"]
    models = report["cost"]["models"]
    for model in models.values():
        assert model["sequence"] == model["flops"]["sequence"]
    (out / "report.html").unlink()
    assert main(["demo", "--only-report", "--out", str(out)]) == 0
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "report.html").stat().st_size > 100_000

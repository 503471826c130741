"""The demo's plan, its child processes, what it does again after a break, and all of it with few steps."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import make_vlora, trainer
from transformers import AutoTokenizer

from llava_vlora.benchmarks.base import Sample
from llava_vlora.cli import demo as verb
from llava_vlora.cli import main
from llava_vlora.demo import plan
from llava_vlora.demo.look import pick_samples
from llava_vlora.demo.pipeline import Demo
from llava_vlora.demo.plan import (
    RunFolder,
    Settings,
    recipe_flags,
    training_command,
    training_flags,
)
from llava_vlora.demo.process import EvalProgress, Job, StageError, TrainerProgress, run_jobs, tied
from llava_vlora.demo.state import States, Step, told
from llava_vlora.errors import ConfigError
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


def test_llava_and_every_generator_are_trained() -> None:
    models = plan.models()
    assert [model.projector for model in models] == ["mlp2x_gelu", *KINDS]
    assert [model.title for model in models[1:]] == [kind.label for kind in KINDS.values()]


@pytest.mark.parametrize("stage", plan.STAGES)
def test_trainings_differ_in_projector_settings_and_folders_alone(
    stage: plan.Stage, tmp_path: Path
) -> None:
    folder, recipe = RunFolder(tmp_path), SETTINGS.recipe()
    flags = {m.name: training_flags(SETTINGS, folder, m, stage) for m in plan.models()}
    names = {"output_dir", "pretrain_mm_mlp_adapter", "mm_projector_type"}
    for name, found in flags.items():
        own = set(recipe.settings(name)) if name in KINDS else set()
        same = {n: v for n, v in found.items() if n not in names | own}
        assert same == {n: v for n, v in flags["llava"].items() if n not in names}
        folders = [str(found[n]) for n in names - {"mm_projector_type"} if n in found]
        assert all(f"models/{name}/" in text for text in folders)
        assert plan.effective(found).keys() & {"output_dir", "save_steps", "data_path"} == set()


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
        wanted = {"vlora": (0, 1, 2, 3), "vlora_fast": (1, 3)}[kind]
        assert KINDS[kind].config.from_keys(own, where="the recipe").layers(4) == wanted
    else:
        assert not own


def test_the_papers_recipe_is_what_it_was() -> None:
    settings = {"vlora_depth": 2, "vlora_heads": 16, "vlora_rank": 32, "vlora_alpha": 32}
    settings |= {"vlora_type": "qkvom", "skip_layers": 1}
    for size, width in (("small", 128), ("full", 256)):
        assert scene_size(size).recipe.settings("vlora") == settings | {"vlora_dim": width}


def test_a_kind_without_a_recipe_gets_its_defaults_in_every_layer() -> None:
    assert scene_size("small").recipe.settings("another") == {"skip_layers": 1}


@pytest.mark.parametrize("which", ["training", "compare"])
def test_printed_commands_mean_the_same_to_a_shell(which: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "a run's folder")
    model = plan.models()[-1]
    command = training_command(SETTINGS, training_flags(SETTINGS, folder, model, "finetune"))
    if which == "compare":
        command = plan.compare_command(SETTINGS, folder, ["llava", model.name])
    line = plan.shell_line(command, folder)
    assert "a run" not in line
    script = 'RUN="$1"; ASSETS="$2"; printf "%s\\n" ' + line.removeprefix("python ")
    shell = ["bash", "-c", script, "bash", str(folder.root), str(plan.ASSETS)]
    words = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert words == command[1:]


def test_steps_scale_both_stages() -> None:
    full = scene_size("small").recipe
    half = SETTINGS.recipe()
    assert half.finetune_steps * 2 == full.finetune_steps
    assert half.pretrain_steps * 2 == pytest.approx(full.pretrain_steps, abs=1)
    assert Settings("small", 7, full.finetune_steps, "cpu", 8, 2, 1).recipe() == full
    # A sixth of a step is still one step.
    assert Settings("full", 7, 1, "cpu", 8, 2, 1).recipe().pretrain_steps == 1


def test_samples_show_every_category_and_are_the_same_every_time() -> None:
    questions = [Sample(i, "?", category="abcdefg"[i % 7]) for i in range(70)]
    chosen = pick_samples(questions, 12, 3)
    assert chosen == pick_samples(questions, 12, 3)
    assert chosen != pick_samples(questions, 12, 4)
    assert {q.category for q in chosen} == set("abcdefg")
    assert len({q.id for q in chosen}) == 12
    assert len(pick_samples(questions[:3], 12, 0)) == 3


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    demo = Demo(SETTINGS, RunFolder(tmp_path), Console(quiet=True))
    with pytest.raises(ConfigError, match="not empty and no demo run"):
        demo.run()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_older_demos_run_is_named_and_taken_away_by_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.run.write_text(json.dumps({"recipe": {}, "settings": {}}))
    (tmp_path / "answers").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    for command in (["report", str(tmp_path)], ["demo", "--only-report", "--out", str(tmp_path)]):
        assert main(command) == 2
        assert f"llava-vlora demo --out {tmp_path}` again" in capsys.readouterr().err
    monkeypatch.setattr(Demo, "_write_data", interrupt)
    assert main(["demo", "--out", str(tmp_path), "--device", "cpu"]) == 130
    captured = capsys.readouterr()
    assert "is of an older demo: all of it begins anew" in captured.out
    assert "The same command goes on" in captured.out
    assert not (tmp_path / "answers").exists()
    assert (tmp_path / "notes.txt").exists()


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# --- what is done again -----------------------------------------------------------------------------


def chain(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> list[Step]:
    one, two, beside = (folder / name for name in ("one", "two", "beside"))
    return [
        Step("data", first, (), (one,), (one,)),
        Step("train", second, ("data",), (two,), (two,)),
        Step("other", {}, (), (beside,), (beside,)),
    ]


def finish(states: States, steps: list[Step]) -> None:
    for found in states.find(steps):
        if found.status != "finished":
            states.begin(found, ["command"])
            found.step.leaves[0].write_text("made")
            states.end(found, 2.0)


def status(states: States, steps: list[Step]) -> dict[str, str]:
    return {found.step.name: found.status for found in states.find(steps)}


def test_finished_steps_are_kept_and_a_changed_setting_begins_what_depends_on_it(
    tmp_path: Path,
) -> None:
    states = States(tmp_path / "steps")
    steps = chain(tmp_path, {"seed": 0}, {"lr": 1})
    assert set(status(states, steps).values()) == {"new"}
    finish(states, steps)
    assert set(status(states, steps).values()) == {"finished"}
    changed = chain(tmp_path, {"seed": 0}, {"lr": 2, "more": "x"})
    assert status(states, changed) == {"data": "finished", "train": "anew", "other": "finished"}
    said = told(states.find(changed))
    assert said == [
        "Kept from an earlier run: data, other.",
        "Begins anew (lr was 1, is 2, more was not given, is x): train.",
    ]
    changed = chain(tmp_path, {"seed": 1}, {"lr": 1})
    assert status(states, changed) == {"data": "anew", "train": "anew", "other": "finished"}
    assert "Begins anew (what they depend on begins anew): train." in told(states.find(changed))


def test_what_begins_anew_loses_what_it_left_and_what_goes_on_does_not(tmp_path: Path) -> None:
    states = States(tmp_path / "steps")
    steps = chain(tmp_path, {"seed": 0}, {"lr": 1})
    finish(states, steps)
    data, train, _ = states.find(chain(tmp_path, {"seed": 0}, {"lr": 2}))
    states.begin(train, ["command"])
    assert not (tmp_path / "two").exists()
    (tmp_path / "two").write_text("half")  # and the process is killed
    data, train, _ = states.find(chain(tmp_path, {"seed": 0}, {"lr": 2}))
    assert (data.status, train.status) == ("finished", "continued")
    states.begin(train, ["command"])
    assert (tmp_path / "two").read_text() == "half"
    states.end(train, 3.0)
    assert states.read("train")["seconds"] == 3.0
    (tmp_path / "one").unlink()  # lost: made again, and all that came of it
    assert status(states, chain(tmp_path, {"seed": 0}, {"lr": 2})) == {
        "data": "continued",
        "train": "anew",
        "other": "finished",
    }


def test_settings_reach_the_steps_that_depend_on_them(tmp_path: Path) -> None:
    """Not folders, threads, processes, batches of questions, or how often a training is saved."""

    def keys(settings: Settings, root: Path) -> dict[str, str]:
        demo = Demo(settings, RunFolder(root), Console(quiet=True))
        return {found.step.name: found.key for found in demo.states.find(demo.steps())}

    before = keys(SETTINGS, tmp_path / "a")
    assert {"data", "finetune vlora_fast", "look vlora", "answer llava.blind", "costs"} <= set(
        before
    )
    assert "look llava" not in before
    same = replace(SETTINGS, batch_size=1, parallel=1, threads=3)
    assert keys(same, tmp_path / "b") == before
    steps = keys(replace(SETTINGS, steps=5), tmp_path / "a")
    assert {name for name in before if steps[name] == before[name]} == {"data"}
    seed = keys(replace(SETTINGS, seed=8), tmp_path / "a")
    assert not {name for name in before if seed[name] == before[name]}


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
    names = ("size", "seed", "steps", "out", "device", "batch_size", "fresh", "only_report")
    assert [getattr(args, name) for name in names] == [
        *("small", 0, None, Path("runs/demo"), "auto", 32, False, False)
    ]


# --- child processes --------------------------------------------------------------------------------


def python_job(tmp_path: Path, name: str, code: str, **more: Any) -> Job:
    log = tmp_path / f"{name}.log"
    return Job(name, [sys.executable, "-c", code], log, 5, EvalProgress(), **more)


def run_quietly(*chains: list[Job], parallel: int = 2) -> None:
    console = Console(quiet=True)
    run_jobs(chains, parallel=parallel, environment={"ANSWER": "42"}, console=console)


def test_jobs_write_logs_and_get_the_environment(tmp_path: Path) -> None:
    code = (
        "import os, sys; print('x: 5 of 5 answered'); print(os.environ['ANSWER'], file=sys.stderr)"
    )
    run_quietly(*([python_job(tmp_path, name, code)] for name in ("one", "two", "three")))
    for name in ("one", "two", "three"):
        assert sorted((tmp_path / f"{name}.log").read_text().splitlines()) == [
            "42",
            "x: 5 of 5 answered",
        ]


def test_jobs_of_a_chain_follow_each_other(tmp_path: Path) -> None:
    """The second finds what the first has written; chains run side by side."""
    seen: list[str] = []
    file = tmp_path / "file"
    first = f"import time; time.sleep(.3); open({str(file)!r}, 'w').write('x')"
    jobs = [
        python_job(tmp_path, "first", first, ended=lambda seconds: seen.append("first")),
        python_job(
            tmp_path, "second", f"open({str(file)!r}).read()", begun=lambda: seen.append("second")
        ),
    ]
    run_quietly(jobs, [python_job(tmp_path, "beside", "pass")])
    assert seen == ["first", "second"]


def test_a_failing_job_shows_its_log_and_stops_the_others(tmp_path: Path) -> None:
    failing = python_job(tmp_path, "failing", "print('before'); raise SystemExit('the reason')")
    waiting = python_job(tmp_path, "waiting", "import time; time.sleep(120)")
    behind = python_job(tmp_path, "behind", "pass")
    start = time.monotonic()
    with pytest.raises(StageError, match=r"failing ended with exit code 1(.|\n)*the reason"):
        run_quietly([waiting], [failing, behind])
    assert time.monotonic() - start < 60
    assert not (tmp_path / "behind.log").exists()


def test_a_tied_command_waits_for_the_one_before_it(tmp_path: Path) -> None:
    if os.name != "posix":
        pytest.skip("no file locks")
    out, lock = tmp_path / "out", tmp_path / "lock"
    code = f"import time; time.sleep(.5); open({str(out)!r}, 'a').write('first ')"
    first = subprocess.Popen(tied([sys.executable, "-c", code], lock))
    until(lambda: lock.is_file() and lock.read_text() != "")
    second = f"open({str(out)!r}, 'a').write('second')"
    subprocess.run(tied([sys.executable, "-c", second], lock), check=True)
    assert first.wait() == 0
    assert out.read_text() == "first second"


def until(true: Callable[[], object], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_progress_is_read_from_the_lines_that_tell_it() -> None:
    answers = EvalProgress()
    assert answers("sceneqa: 30 of 60 answered\n") == 30
    assert answers("sceneqa: 60 of 60 answered\n") == 60
    assert answers("pope: 4 of 40 answered\n") == 64
    assert answers("progress is slow\n") is None
    steps = TrainerProgress(10)
    assert steps("Formatting inputs...\n") is None
    assert [steps("{'loss': 1.0, 'epoch': 0.1}\n") for _ in range(3)] == [10, 20, 30]
    assert steps("{'train_runtime': 3.0}\n") is None
    assert TrainerProgress(10, start=150)("{'loss': 1.0}\n") == 160


# --- measuring ----------------------------------------------------------------------------------------


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


QUESTION = "What colour is the image?"


@pytest.fixture
def picture(data_dir: Path) -> Image.Image:
    return Image.open(data_dir / "images" / "0.png").convert("RGB")


def test_the_language_model_reads_the_patches_or_the_text_alone(
    tiny: tuple[str, Loaded], picture: Image.Image
) -> None:
    kind, loaded = tiny
    patches = {"llava": 16, "vlora": 0}[kind]
    text = text_length(loaded, QUESTION)
    assert sequence_length(loaded, QUESTION, picture) == text + patches


def test_times_are_measured_and_parameters_counted(
    tiny: tuple[str, Loaded], picture: Image.Image
) -> None:
    kind, loaded = tiny
    few = {"new_tokens": 5, "repeats": 3}
    times = measure_times({kind: loaded}, QUESTION, picture, **few)[kind]
    assert times.first_token_range[0] <= times.first_token <= times.first_token_range[1]
    assert times.first_token > 0
    assert times.repeats == 3
    more = measure_times({kind: loaded}, QUESTION, picture, **few, most_repeats=6, seconds=300)
    assert more[kind].repeats == 6
    counts = parameter_counts(loaded)
    whole = sum(p.numel() for p in loaded.model.parameters())
    assert counts["vision_tower"] + counts["trainable_finetune"] == whole
    projector: Any = loaded.model.get_model().mm_projector
    assert counts["trainable_pretrain"] == sum(p.numel() for p in projector.parameters())


# --- all of it --------------------------------------------------------------------------------------


#: The demo of a few scenes, more than the steps take; a process of its own, so that it can be killed.
FEW = """
import sys
from dataclasses import replace
from llava_vlora.cli import main
from llava_vlora.sceneqa import SIZES
small = SIZES["small"]
SIZES["small"] = replace(small, recipe=replace(small.recipe, train_images=200, test_images=12))
sys.exit(main(["demo", "--device", "cpu", "--seed", "5", *sys.argv[1:]]))
"""


def demo(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FEW, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_whole_demo_stops_goes_on_and_hands_its_folder_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    first = demo("--steps", 8, "--out", out)
    until(lambda: list(out.glob("models/*/finetune/checkpoint-*/trainer_state.json")))
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = json.loads((out / "steps" / "pretrain-llava.json").read_text())
    assert kept["done"]
    second = demo("--steps", 8, "--out", out)
    printed, errors = second.communicate()
    assert second.returncode == 0, errors[-3000:]
    assert "Kept from an earlier run: data, pretrain llava" in printed
    assert "Goes on where it stopped: " in printed
    assert json.loads((out / "steps" / "pretrain-llava.json").read_text()) == kept
    report = json.loads((out / "report.json").read_text())
    check_report(report)
    assert not list(out.glob("models/*/*/checkpoint-*"))
    for line in ("chat ", "--beside ", "compare ", "ima views ", "report.html"):
        assert line in printed
    # Other verbs take the folder as it is: compare finds all answers and costs, and loads nothing.
    costs = {file: file.read_bytes() for file in (out / "eval").glob("*.cost.json")}
    assert len(costs) == 1 + len(KINDS)
    command = next(text for text in printed.splitlines() if "llava_vlora compare " in text).split()[
        3:
    ]
    assert main([*command, "--device", "cpu"]) == 0
    assert {file: file.read_bytes() for file in costs} == costs
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    again = json.loads((out / "report.json").read_text())
    for one in (report, again):  # say which command answered last
        one["comparison"] = {
            k: v for k, v in one["comparison"].items() if k not in ("runs", "plan")
        }
    assert again == report
    assert (out / "report.html").stat().st_size > 100_000
    command = next(
        text for text in printed.splitlines() if "llava_vlora ima views " in text
    ).split()[3:]
    assert main([*command, "--limit", "4", "--device", "cpu"]) == 0
    assert (out / "ima" / "views.json").is_file()
    capsys.readouterr()
    # With other steps the data are kept; the same command again has nothing to do.
    again = demo("--steps", 8, "--out", out)
    assert "All of it is finished" in again.communicate()[0]
    other = demo("--steps", 2, "--out", out)
    until(lambda: not (out / "models" / "llava" / "finetune").exists() or other.poll() is not None)
    other.send_signal(signal.SIGINT)
    printed, errors = other.communicate()
    assert other.returncode == 130, errors[-3000:]
    assert "Kept from an earlier run: data." in printed
    assert "max_steps was 8, is 2" in printed


def check_report(report: dict[str, Any]) -> None:
    comparison = report["comparison"]
    titles = ["LLaVA", *(kind.label for kind in KINDS.values())]
    assert comparison["rows"] == [*titles, "LLaVA, blind"]
    assert [b["name"] for b in comparison["benchmarks"]] == ["sceneqa", "pope"]
    assert comparison["benchmarks"][0]["questions"] == report["data"]["test_questions"]
    assert list(report["training"]) == list(comparison["costs"]) == titles
    for stages in report["training"].values():
        assert stages["finetune"]["loss"][-1][0] == 8
    for title, cost in comparison["costs"].items():
        assert cost["sequence"] == cost["flops"]["sequence"]
        assert cost["turns"] == ["llava", *KINDS]
        assert cost["image_bytes"] > 0
        assert (cost["sequence"] == cost["text_tokens"]) == (title != "LLaVA")
    for sample in report["samples"]:
        assert list(sample["looks"]) == titles[1:]
        for maps in sample["looks"].values():
            assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in maps.values())
    assert report["run"]["resumed"]

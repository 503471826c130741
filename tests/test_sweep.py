"""``llava-vlora sweep``: what a file asks for, what is shared and repeated, and a sweep that is killed and goes on."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from llava_vlora.cli import main
from llava_vlora.demo import child
from llava_vlora.demo.plan import STAGES
from llava_vlora.errors import CheckpointError, ConfigError
from llava_vlora.evaluation.files import alone
from llava_vlora.generators import KINDS
from llava_vlora.integration.trainer_flags import trainer_flags
from llava_vlora.sceneqa import scene_size
from llava_vlora.sweep import results, state, tables
from llava_vlora.sweep.flags import meaning
from llava_vlora.sweep.pipeline import Sweep
from llava_vlora.sweep.plan import Run, Step, plan
from llava_vlora.sweep.running import Place, duration, run_steps
from llava_vlora.sweep.spec import Spec, read_spec
from tests.two_stacks import REPO, environment, run_python

KNOWN = trainer_flags()
PLACE = Place(1, (), 1)
#: Flags of all generators.
SETTINGS = {name for kind in KINDS.values() for name in kind.config.names()}
#: A sweep file: what stands behind each key, one line each.
LINES = {
    "out": "OUT",
    "sceneqa": "{train_images: 16, test_images: 2}",
    "base": "{vlora_rank: 32}",
    "evaluate": "{benchmarks: [sceneqa]}",
    "axes": "{vlora_rank: [8, 32]}",
}


def spec(folder: Path, **lines: str | None) -> Spec:
    """A file with some lines changed, added, or taken away."""
    given = {"out": str(folder / "out"), **{k: v for k, v in LINES.items() if k != "out"}, **lines}
    text = "".join(f"{key}: {value}\n" for key, value in given.items() if value is not None)
    file = folder / "sweep.yaml"
    file.write_text(text)
    return read_spec(file, KNOWN)


# --- the file ---------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, str | None], int, list[str]]] = [
    ({"outt": "x"}, 6, ["'outt'", "valid: 'out'", "'axes'"]),
    ({"base": "{vlora_rnk: 3}"}, 3, ["'vlora_rnk'", "mean 'vlora_rank'", "Valid: ", "learning_rate"]),
    ({"base": "{vlora_rank: many}"}, 3, ["vlora_rank", "'many'"]),
    ({"base": "{vlora_rank: }"}, 3, ["vlora_rank has no value"]),
    ({"base": "\n  vlora_rank: 3\n  vlora_rank: 4"}, 5, ["'vlora_rank' stands twice"]),
    ({"base": "{vlora_dim: 100}"}, 3, ["vlora_dim 100", "vlora_heads 16"]),
    ({"base": "{lr_scheduler_type: cosinus}"}, 3, ["'cosinus'", "'cosine'"]),
    ({"base": "{output_dir: x}"}, 3, ["output_dir", "`out`"]),
    ({"base": "{seed: 3}"}, 3, ["seeds: [0, 1, 2]"]),
    ({"base": "{tune_mm_mlp_adapter: True}"}, 3, ["tune_mm_mlp_adapter", "stage 1"]),
    ({"base": "{finetune: {bf16: maybe}}"}, 3, ["bf16", "'maybe'"]),
    ({"evaluate": "{}"}, 4, ["`benchmarks`"]),
    ({"evaluate": "{benchmarks: [pope,\n  popes]}"}, 5, ["'popes'", "'pope'"]),
    ({"evaluate": "{benchmarks: [sceneqa], data: x}"}, 4, ["`data` contradicts `sceneqa`"]),
    ({"evaluate": "{benchmarks: [sceneqa], limit: 0}"}, 4, ["limit", "at least 1, not '0'"]),
    ({"evaluate": "{benchmarks: [sceneqa], blind: 1}"}, 4, ["blind must be true or false"]),
    ({"sceneqa": "{size: huge}"}, 2, ["'huge'", "'small'"]),
    ({"axes": "\n  vlora_rank: [8,\n    x]"}, 7, ["vlora_rank", "'x'"]),
    ({"axes": "{warmup.vlora_rank: [8]}"}, 5, ["'warmup.vlora_rank'", "'pretrain.'"]),
    ({"axes": "{vlora_rank: [8, 16, 8]}"}, 5, ["'vlora_rank-8' is taken", "line 5"]),
    ({"axes": "{learning_rate: [1e-3, 0.001]}"}, 5, ["have the same settings", "line 5"]),
    ({"axes": "{vlora_rank: [32, 032]}"}, 5, ["default stands twice"]),
    ({"axes": "{vlora_heads: [16, 7]}"}, 5, ["vlora_heads-7", "vlora_heads 7"]),
    ({"axes": "{skip_layers: [1, 5]}"}, 5, ["skip_layers-5", "skip_layers 5 does not divide"]),
    ({"base": "{mm_projector_type: mlp}"}, 5, ["'mlp' is unknown", "'vlora', 'vlora_fast'"]),
    ({"base": "{vlora_gate: False}"}, 3, ["vlora has no setting 'vlora_gate'", "Nor do other"]),
    ({"axes": "{vlora_gate: [True,\n  False]}"}, 5, ["vlora has no setting 'vlora_gate'", "'vlora_rank'"]),
    ({"base": "{mm_projector_type: linear}"}, 5, ["linear has no setting 'vlora_rank'; it has none"]),
    ({"axes": None, "variants": "[{name: a},\n {name: b, mm_projector_type: vlora_fast,\n  vlora_rank: 8}]"}, 7,
     ["vlora_fast has no setting 'vlora_rank'", "'vlora_stride'"]),
    ({"axes": "{other: {a: {mm_projector_type: vlora_fast,\n pretrain: {\n vlora_window: 0}}}}"}, 5,
     ["vlora_window", "at least 1"]),
    ({"evaluate": "{benchmarks: [sceneqa], blind:\n  [default,\n  rank-8]}"}, 6, ["no variant 'rank-8'", "'default'"]),
    ({"axes": "[]"}, 5, ["`axes`", "key: value"]),
    ({"axes": None, "variants": "[{vlora_rank: 8}]"}, 5, ["needs a `name`"]),
    ({"axes": None, "variants": "[{name: a b}]"}, 5, ["'a b'"]),
    ({"axes": None, "variants": "[{name: a},\n {name: a, vlora_rank: 8}]"}, 6, ["taken", "line 5"]),
    ({"seeds": "[1, 1]"}, 6, ["twice"]),
    ({"launcher": "torchrun -m"}, 6, ["-m"]),
    ({"seeds": "[1"}, 7, ["no YAML"]),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "number", "parts"), MISTAKES)
def test_mistakes_are_named_with_their_line(
    lines: dict[str, str | None], number: int, parts: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(tmp_path, **lines)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/sweep.yaml, line {number}"), message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        ({"axes": None}, "needs one of 'variants', 'axes', 'grid'"),
        ({"grid": "{vlora_rank: [8]}"}, "not 'axes', 'grid'"),
        ({"evaluate": None}, "lacks 'evaluate'"),
        ({"sceneqa": None}, "pretrain lacks 'model_name_or_path', 'data_path'"),
    ],
)
def test_what_is_missing_is_said(lines: dict[str, str | None], part: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(part)):
        spec(tmp_path, **lines)


def test_words_that_yaml_takes_for_truth_values_stay_words(tmp_path: Path) -> None:
    found = spec(tmp_path, base="{save_strategy: no, learning_rate: 1e-3, report_to: none}")
    flags = found.variants[0].flags["finetune"]
    assert (flags["save_strategy"], flags["report_to"]) == ("no", "none")
    assert flags["learning_rate"] == "1e-3"


MODELS = "model_name_or_path: a, vision_tower: b, data_path: c"


# --- variants ---------------------------------------------------------------------------------------


def test_each_axis_is_varied_alone_around_the_default(tmp_path: Path) -> None:
    axes = "{vlora_rank: [8, 32], vlora_depth: [1], pretrain.learning_rate: [1e-4], "
    axes += "connector: {VLoRA: {}, LLaVA: {mm_projector_type: mlp2x_gelu, finetune: {bits: 16}}}}"
    found = spec(tmp_path, axes=axes)
    names = [v.name for v in found.variants]
    assert names == [
        *("default", "vlora_rank-8", "vlora_depth-1"),
        *("pretrain.learning_rate-1e-4", "connector-LLaVA"),
    ]
    rows = {b.title: [(r.label, r.variant) for r in b.rows] for b in found.blocks}
    assert rows["vlora_rank"] == [("8", "vlora_rank-8"), ("32", "default")]
    # The recipe's depth is not in the list, and stands before it.
    assert rows["vlora_depth"] == [("2", "default"), ("1", "vlora_depth-1")]
    assert rows["connector"] == [("VLoRA", "default"), ("LLaVA", "connector-LLaVA")]
    assert {b.default for b in found.blocks} == {"default"}
    default, *_, rate, connector = (v.flags for v in found.variants)
    assert rate["pretrain"] == {**default["pretrain"], "learning_rate": "1e-4"}
    assert rate["finetune"] == default["finetune"]
    changed = {"mm_projector_type": "mlp2x_gelu"}
    shared = {s: {n: t for n, t in default[s].items() if n not in SETTINGS} for s in STAGES}
    assert shared["pretrain"] != default["pretrain"]
    assert connector["pretrain"] == {**shared["pretrain"], **changed}
    assert connector["finetune"] == {**shared["finetune"], **changed, "bits": "16"}


def test_the_default_is_found_by_what_it_means(tmp_path: Path) -> None:
    """Without a word the paper's generator has a depth of 8 and a scale of 1."""
    plain = {"sceneqa": None, "base": "{mm_projector_type: vlora, " + MODELS + "}"}
    found = spec(tmp_path, **plain, axes="{vlora_depth: [4, 8], vlora_alpha: [32, 64.0]}")
    assert [v.name for v in found.variants] == ["default", "vlora_depth-4", "vlora_alpha-32"]


def test_a_variant_has_the_recipe_and_the_settings_of_its_own_generator(tmp_path: Path) -> None:
    """The rank of the base is the paper's alone; the width is everyone's; LLaVA has neither."""
    found = spec(
        tmp_path,
        base="{vlora_rank: 24, vlora_dim: 64, vlora_gate: False}",
        axes=None,
        variants="[{name: paper}, {name: fast, mm_projector_type: vlora_fast},\n"
        " {name: joined, mm_projector_type: vlora_fast, vlora_stride: 2}, {name: mlp, mm_projector_type: mlp2x_gelu}]",
    )
    own = {
        v.name: {n: t for n, t in v.flags["finetune"].items() if n in SETTINGS}
        for v in found.variants
    }
    recipe = scene_size("small").recipe
    paper = {n: str(v) for n, v in recipe.settings("vlora").items() if n != "vlora_alpha"}
    fast = {n: str(v) for n, v in recipe.settings("vlora_fast").items()}
    assert own["paper"] == {**paper, "vlora_rank": "24", "vlora_dim": "64"}
    assert own["fast"] == {**fast, "vlora_dim": "64", "vlora_gate": "False"}
    assert own["joined"] == {**own["fast"], "vlora_stride": "2"}
    assert own["mlp"] == {}
    values = meaning(found.variants[1].flags["finetune"], KNOWN)
    assert set(KINDS["vlora_fast"].config.names()) <= values.keys()
    # The tower of `small` has 16 patches, which are few enough for one vector each.
    assert (values["vlora_window"], values["vlora_stride"], values["vlora_alpha"]) == (1, 1, 1.0)


def test_what_a_generator_resolves_is_the_default(tmp_path: Path) -> None:
    """From 64 patches on, fast weights join neighbours: a window of 4 and a stride of 2 on the 144 of `full`."""
    axes = "{windows: {own: {}, 1/1: {vlora_window: 1, vlora_stride: 1}, 4/2: {vlora_window: 4, vlora_stride: 2}}}"
    for size, same in (("small", "1/1"), ("full", "4/2")):
        lines = {"sceneqa": f"{{size: {size}}}", "base": "{mm_projector_type: vlora_fast}"}
        with pytest.raises(ConfigError, match=f"windows {same}: the default stands twice"):
            spec(tmp_path, **lines, axes=axes)


def test_a_grid_has_every_pair(tmp_path: Path) -> None:
    found = spec(tmp_path, axes=None, grid="{vlora_rank: [8, 32], vlora_type: [qk, qkvom]}")
    assert [v.name for v in found.variants] == [
        *("vlora_rank-8_vlora_type-qk", "vlora_rank-8_vlora_type-qkvom"),
        *("vlora_rank-32_vlora_type-qk", "vlora_rank-32_vlora_type-qkvom"),
    ]
    assert found.blocks[0].default == "vlora_rank-32_vlora_type-qkvom"
    assert found.variants[0].flags["finetune"]["vlora_type"] == "qk"


def test_the_examples_are_the_papers_tables() -> None:
    for file, default in (("sceneqa", "32"), ("paper", "64")):
        found = read_spec(REPO / "eval" / f"sweep-{file}.yaml", KNOWN)
        rows = {b.title: [r.label for r in b.rows] for b in found.blocks}
        assert rows["vlora_type"] == ["qkvom", "qkvm", "qkv", "qko", "qk"]
        (label,) = (r.label for r in found.blocks[-2].rows if r.variant == "default")
        assert (found.blocks[-2].title, label) == ("vlora_rank", default)
    assert rows["vlora_rank"] == ["16", "32", "64", "128"]
    assert rows["vlora_depth"] == ["4", "8", "12"]


# --- steps ------------------------------------------------------------------------------------------


def keys(runs: Sequence[Run], kind: str) -> list[str]:
    return [step.key for run in runs for step in run.steps if step.kind == kind]


def test_stage_1_is_shared_by_what_differs_in_stage_2_alone(tmp_path: Path) -> None:
    axes = "{finetune.learning_rate: [1e-4, 1e-5], vlora_rank: [8]}"
    first, second = (keys(plan(spec(tmp_path, axes=axes, seeds="[0, 5]")), s) for s in STAGES)
    # default, two rates, a rank; then the same with the other seed.
    assert len(set(first)) == 4
    assert first[0] == first[1] == first[2] != first[3]
    assert first[4] == first[5] == first[6] not in first[:4]
    assert len(set(second)) == 8


def test_a_step_is_named_by_all_that_its_result_depends_on(tmp_path: Path) -> None:
    data = tmp_path / "pretrain.json"
    data.write_text("[1]")
    place = f"{{pretrain: {{data_path: {data}}}}}"
    base = plan(spec(tmp_path, base=place))[0]

    def changed(folder: Path = tmp_path, **lines: str) -> list[bool]:
        other = plan(spec(folder, **{"base": place, **lines}))[0]
        return [a.key != b.key for a, b in zip(base.steps, other.steps, strict=True)]

    rate = f"{{pretrain: {{data_path: {data}, learning_rate: 1e-3}}}}"
    spelt = f"{{pretrain: {{data_path: {data}, learning_rate: 0.00150, logging_steps: 7}}}}"
    assert changed(base=rate) == [True, True, True]
    assert changed(base=spelt) == [False, False, False]
    assert changed(launcher="torchrun --nproc_per_node 2") == [True, True, True]
    assert changed(seeds="[1]") == [True, True, True]
    assert changed(evaluate="{benchmarks: [sceneqa], limit: 3}") == [False, False, True]
    assert changed(evaluate="{benchmarks: [sceneqa, pope]}") == [False, False, False]
    assert changed(sceneqa="{train_images: 17, test_images: 2}") == [True, True, True]
    (tmp_path / "elsewhere").mkdir()
    assert changed(tmp_path / "elsewhere") == [False, False, False]
    data.write_text("[2]")
    assert changed() == [True, True, True]


def option(step: Step, name: str) -> str | None:
    words = step.command
    return words[words.index(f"--{name}") + 1] if f"--{name}" in words else None


def test_commands_are_those_that_users_run(tmp_path: Path) -> None:
    found = spec(tmp_path, seeds="[4]", launcher="deepspeed --num_gpus 2")
    pretrain, finetune, evaluate = plan(found)[1].steps
    start = "deepspeed --num_gpus 2 --module llava_vlora.run --seed 4 llava.train.train".split()
    for step in (pretrain, finetune):
        assert list(step.command[: len(start)]) == start
        words = step.command[len(start) :]
        flags = dict(zip(words[::2], words[1::2], strict=True))
        assert len(flags) == len(words) / 2  # each once
        for name, text in flags.items():
            KNOWN[name.removeprefix("--")](text)
        assert flags["--vlora_rank"] == "8"
        assert flags["--output_dir"] == str(step.folder)
        assert flags["--seed"] == "4"
    assert (option(pretrain, "version"), option(finetune, "version")) == ("plain", "v1")
    assert option(pretrain, "tune_mm_mlp_adapter") == "True"
    assert option(finetune, "tune_mm_mlp_adapter") is None
    assert option(finetune, "pretrain_mm_mlp_adapter") == f"{pretrain.folder}/mm_projector.bin"
    assert evaluate.command[:4] == ("python", "-m", "llava_vlora", "eval")
    assert option(evaluate, "model") == str(finetune.folder)
    assert option(evaluate, "model-base") is None
    below = plan(spec(tmp_path, launcher="torchrun --nproc_per_node 2"))[0].evaluations[0]
    assert below.command[:5] == ("torchrun", "--nproc_per_node", "2", "-m", "llava_vlora")


@pytest.mark.parametrize("partial", ["lora_enable", "vlora_freeze_llm"])
def test_parts_are_evaluated_with_their_base_and_a_given_projector_needs_no_stage_1(
    partial: str, tmp_path: Path
) -> None:
    (tmp_path / "p.bin").write_bytes(b"1")
    base = f"{{finetune: {{{partial}: True, pretrain_mm_mlp_adapter: {tmp_path}/p.bin}}}}"
    run = plan(spec(tmp_path, base=base))[0]
    assert [step.kind for step in run.steps] == ["finetune", "evaluate"]
    assert (
        option(run.evaluations[0], "model-base")
        == run.variant.flags["finetune"]["model_name_or_path"]
    )
    (tmp_path / "p.bin").write_bytes(b"2")
    assert plan(spec(tmp_path, base=base))[0].finetune.key != run.finetune.key


def test_blind_answers_of_some_variants(tmp_path: Path) -> None:
    found = spec(tmp_path, evaluate="{benchmarks: [sceneqa], blind: [default]}")
    kinds = {run.variant.name: [step.kind for step in run.evaluations] for run in plan(found)}
    assert kinds == {"default": ["evaluate", "blind"], "vlora_rank-8": ["evaluate"]}
    every = spec(tmp_path, evaluate="{benchmarks: [sceneqa], blind: true}")
    assert all(len(run.evaluations) == 2 for run in plan(every))
    (table,) = tables.text_tables(results.collect(found, plan(found)))
    assert table.columns[1:3] == ("SceneQA", "SceneQA, blind")


def test_the_evidence_for_fast_weights_is_planned_whole() -> None:
    small, full = (
        read_spec(REPO / "eval" / f"sweep-{n}.yaml", KNOWN) for n in ("fast", "fast-full")
    )
    assert small.seeds == (0, 1, 2)
    rows = {b.title: [r.label for r in b.rows] for b in small.blocks}
    assert rows["connector"] == ["fast weights", "LLaVA", "VLoRA"]
    assert rows["vlora_type"] == ["vo", "qkvom"]
    assert rows["windows"] == ["1/1", "3/1", "2/2", "4/2"]
    # What the default resolves to is not trained twice: 1/1 of 16 patches, 4/2 of 144.
    defaults = {
        s: next(r.label for r in f.blocks[-1].rows if r.variant == "default")
        for s, f in (("s", small), ("f", full))
    }
    assert defaults == {"s": "1/1", "f": "4/2"}
    steps = {
        (v.flags[s]["max_steps"], v.flags[s]["per_device_train_batch_size"])
        for v in small.variants
        for s in STAGES
    }
    assert steps == {("300", "32"), ("320", "32")}
    frozen = [v.name for v in small.variants if "vlora_freeze_llm" in v.flags["finetune"]]
    assert len(frozen) == 3


# --- what is left to do -----------------------------------------------------------------------------


def leave(step: Step, score: float = 50.0) -> None:
    """What a step leaves when it succeeds: a small model or a score."""
    state.begin(step)
    step.folder.mkdir(parents=True, exist_ok=True)
    if step.flags is not None:
        (step.folder / "config.json").write_text("{}")
        tensors = {
            "model.layers.0.weight": torch.zeros(2, 3),
            "model.mm_projector.0.weight": torch.zeros(4),
            "model.vision_tower.weight": torch.zeros(5),
        }
        if step.kind == "pretrain":
            torch.save(
                {"model.mm_projector.0.weight": torch.zeros(4)}, step.folder / "mm_projector.bin"
            )
        else:
            save_file(tensors, step.folder / "model.safetensors")
    for benchmark in step.benchmarks:
        step.score(benchmark).parent.mkdir(parents=True, exist_ok=True)
        right = round(score)
        stated = {
            "metrics": {"accuracy": score, "other": 1.0},
            "samples": [
                {"id": i, "credit": float(i < right), "image": f"{i}.png"} for i in range(100)
            ],
            "questions": 100,
            "chance": 25.0,
            "breakdown": {},
        }
        step.score(benchmark).write_text(json.dumps(stated))
    state.end(step, 2.0)


def left(found: Spec) -> list[list[str]]:
    return [[step.kind for step in state.todo(found, run)] for run in plan(found)]


def test_steps_are_repeated_only_where_something_changed_or_is_lost(tmp_path: Path) -> None:
    found = spec(tmp_path)
    everything = ["pretrain", "finetune", "evaluate"]
    assert left(found) == [everything, everything]
    runs = plan(found)
    leave(runs[0].steps[0])
    assert left(found) == [everything[1:], everything]
    for run in runs:
        for step in run.steps:
            leave(step)
    assert left(found) == [[], []]
    # A changed variant leaves the other alone, and its old files too; the way back costs nothing.
    assert left(spec(tmp_path, axes="{vlora_rank: [16, 32]}")) == [[], everything]
    assert left(found) == [[], []]
    # A renamed variant is the same one.
    renamed = spec(tmp_path, axes=None, variants="[{name: a}, {name: b, vlora_rank: 8}]")
    assert left(renamed) == [[], []]
    shutil.rmtree(runs[1].finetune.folder)
    assert left(found) == [[], []]  # models may be deleted once they are evaluated
    shutil.rmtree(runs[0].evaluations[0].folder)
    assert left(found) == [["evaluate"], []]
    shutil.rmtree(runs[1].evaluations[0].folder / "sceneqa")
    retrained = state.todo(found, plan(found)[1])
    assert [step.kind for step in retrained] == everything[1:]
    assert retrained[-1].command[-1] == "--fresh"  # answers of the model before are not used


def test_a_new_benchmark_is_answered_alone(tmp_path: Path) -> None:
    for step in plan(spec(tmp_path))[0].steps:
        leave(step)
    more = spec(tmp_path, evaluate="{benchmarks: [sceneqa, pope]}")
    (step,) = state.todo(more, plan(more)[0])
    assert option(step, "benchmarks") == "pope"


def test_a_step_that_leaves_nothing_has_failed(tmp_path: Path) -> None:
    pretrain, _, evaluate = plan(spec(tmp_path))[0].steps
    for step in (pretrain, evaluate):
        state.begin(step)
        with pytest.raises(CheckpointError, match="ended without an error, but"):
            state.end(step, 1.0)
        assert not state.finished(step)


def test_parameters_are_counted_in_what_a_stage_leaves(tmp_path: Path) -> None:
    run = plan(spec(tmp_path))[0]
    for step in run.steps:
        leave(step)
    assert state.read(run.steps[0])["parameters"] == {"connector": 4, "trained": 4}
    assert state.read(run.finetune)["parameters"] == {"connector": 4, "trained": 6 + 4}
    folder = run.finetune.folder
    assert state.parameters(folder, {"freeze_mm_mlp_adapter": "True"})["trained"] == 6
    assert state.parameters(folder, {"freeze_backbone": "True"})["trained"] == 4


# --- child processes --------------------------------------------------------------------------------


def python_step(root: Path, name: str, code: str, *needs: str) -> Step:
    return Step("evaluate", name, f"key-{name}", ("python", "-c", code), root, needs)


def test_what_fails_stops_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    steps = [
        python_step(tmp_path, "bad", "print('the reason'); raise SystemExit(3)"),
        python_step(tmp_path, "after", "print(1)", "key-bad"),
        python_step(tmp_path, "last", "print(1)", "key-after"),
        python_step(tmp_path, "good", "import os; print(os.environ['OMP_NUM_THREADS'])"),
        python_step(tmp_path, "then", "print(1)", "key-good"),
    ]
    console = Console(record=True, quiet=False, file=open(os.devnull, "w"))
    failures = run_steps(steps, Place(2, (), 6), console)
    said = {failure.step.name: failure.reason for failure in failures}
    assert list(said) == ["bad", "after", "last"]
    assert "exit code 3" in said["bad"]
    assert "the reason" in said["bad"]
    assert said["after"] == "evaluate after was not run, because evaluate bad failed."
    assert [state.finished(step) for step in steps] == [False, False, False, True, True]
    assert steps[3].log.read_text().splitlines()[-1] == os.environ.get("OMP_NUM_THREADS", "3")
    text = console.export_text()
    assert "[5/5]" in text
    # The next attempt keeps the log of this one.
    (again,) = run_steps(steps[:1], PLACE, Console(quiet=True))
    assert again.reason.count("the reason") == 1
    assert steps[0].log.read_text().count("the reason\n") == 2
    assert state.read(steps[0])["attempts"] == 2


def test_ctrl_c_ends_the_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    steps = [python_step(tmp_path, "long", code), python_step(tmp_path, "next", "print(1)")]

    def interrupt() -> None:
        while not note.exists() or not note.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_steps(steps, PLACE, Console(quiet=True))
    assert not alive(int(note.read_text()))
    assert state.read(steps[0])["done"] is False
    assert not state.read(steps[1])


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a child of its parent's death"
)
def test_a_step_ends_with_a_sweep_that_was_killed_and_nobody_else_has_its_lock(
    tmp_path: Path,
) -> None:
    lock, note = tmp_path / "lock", tmp_path / "note"
    start = f"import os, subprocess; subprocess.run([{sys.executable!r}, {child.__file__!r}, {str(lock)!r}, "
    start += "str(os.getpid()), 'sleep', '60'])"
    first = subprocess.Popen([sys.executable, "-c", start])
    until(lambda: lock.exists() and lock.read_text())
    held = int(lock.read_text())
    command = [sys.executable, child.__file__, str(lock), str(os.getpid()), "touch", str(note)]
    second = subprocess.Popen(command)
    time.sleep(0.6)
    assert alive(held)
    assert not note.exists()
    first.kill()
    first.wait()
    until(lambda: not alive(held))
    assert second.wait(30) == 0
    assert note.exists()


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        alone(tmp_path / ".lock", "sweep"),
        pytest.raises(ConfigError, match="Another sweep works in"),
    ):
        with alone(tmp_path / ".lock", "sweep"):
            pass
    with alone(tmp_path / ".lock", "sweep"):
        pass


def test_gpus_are_divided_among_jobs() -> None:
    place = Place(2, ("0", "1", "2", "5"), 8)
    step = Step("finetune", "a", "k", ("torchrun",), Path())
    assert place.environment(0, step)["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert place.environment(1, step)["CUDA_VISIBLE_DEVICES"] == "1,5"
    alone_ = Step("finetune", "a", "k", ("python",), Path())
    assert place.environment(1, alone_)["CUDA_VISIBLE_DEVICES"] == "1"
    place.check(("torchrun", "--standalone"))
    with pytest.raises(ConfigError, match="one port"):
        place.check(("deepspeed",))
    with pytest.raises(ConfigError, match="there are 1 GPUs"):
        Place(2, ("0",), 8).check(("python",))


def test_times_are_readable() -> None:
    assert [duration(s) for s in (3.4, 89, 90, 5399, 5400)] == [
        *("3 s", "89 s", "1.5 min", "90.0 min", "1.5 h")
    ]


# --- tables -----------------------------------------------------------------------------------------


def test_what_stands_out_by_chance_is_not_called_best() -> None:
    three = {"a": [7.0, 8.0, 9.0], "b": [4.0, 5.0, 6.0], "c": [1.0, 2.0, 3.0]}
    assert results.best(three) == ("a", pytest.approx(3 * 6 / (9 * 8 * 7)))
    # One more overlap, and no variant has all its seeds above the others.
    assert results.best({**three, "b": [4.0, 5.0, 7.5]})[0] is None
    # Two variants with three seeds: 2 of the 20 ways to draw the three highest are of one variant.
    two = {n: three[n] for n in "ab"}
    assert results.best(two) == (None, pytest.approx(0.1))
    assert results.best({"a": [2.0], "b": [1.0]}) == (None, 1.0)
    assert results.best({"a": [2.0, 3.0], "b": []}) == (None, 1.0)


def test_chance_is_that_of_all_orders() -> None:
    counts = {"a": 2, "b": 3}
    owners = [name for name, count in counts.items() for _ in range(count)]
    orders = list(itertools.permutations(range(5)))

    def stands_out(order: Sequence[int]) -> bool:
        own = {n: [v for v, o in zip(order, owners, strict=True) if o == n] for n in counts}
        return any(min(own[n]) > max(own[m]) for n, m in (("a", "b"), ("b", "a")))

    share = sum(map(stands_out, orders)) / len(orders)
    assert results.best({"a": [1.0, 2.0], "b": [3.0, 4.0, 5.0]})[1] == pytest.approx(share)


def swept(tmp_path: Path, scores: Mapping[str, Sequence[float]], **lines: str | None) -> Spec:
    """A finished sweep with given scores, one a seed."""
    found = spec(tmp_path, seeds=str(list(range(len(scores["default"])))), **lines)
    for run in plan(found):
        for step in run.steps:
            if not state.finished(step):
                leave(step, scores[run.variant.name][run.seed])
    return found


def test_tables_of_several_seeds(tmp_path: Path) -> None:
    scores = {
        "default": [60.0, 62, 64],
        "vlora_rank-8": [50.0, 51, 52],
        "vlora_rank-16": [40, 60, 41],
    }
    found = swept(tmp_path, scores, axes="{vlora_rank: [8, 16, 32]}")
    Sweep(found, Console(quiet=True), PLACE).report()
    text = (found.out / "sweep.md").read_text()
    assert "| vlora_rank | SceneQA, accuracy | connector | training |" in text
    assert "| 8 | 51.0 (50.0 to 52.0) | 4e-06 M | 4 s |" in text
    assert "| 32 (default) | 62.0 (60.0 to 64.0) | 4e-06 M | 4 s |" in text  # 60 is no more than 60
    assert "Mean of 3 seeds (lowest to highest)." in text
    assert "in 3.6 % of such blocks" in text
    assert "**" not in text
    rows = list(csv.DictReader((found.out / "sweep.csv").open()))
    assert [row["variant"] for row in rows] == ["vlora_rank-8", "vlora_rank-16", "default"]
    assert [float(row["sceneqa mean"]) for row in rows] == [51.0, 47.0, 62.0]
    assert [row["default"] for row in rows] == ["0", "0", "1"]
    assert rows[0]["sceneqa runs"] == "3"
    result = json.loads((found.out / "sweep.json").read_text())
    run = result["variants"]["vlora_rank-8"]["runs"][1]
    assert run["seed"] == 1
    assert run["scores"]["evaluate"]["sceneqa"]["metrics"] == {"accuracy": 51.0, "other": 1.0}
    assert run["steps"]["finetune"]["versions"]["torch"]
    assert run["steps"]["finetune"]["parameters"] == {"connector": 4, "trained": 10}
    assert result["benchmarks"]["sceneqa"]["chance"] == 25.0
    assert (found.out / "sweep.png").stat().st_size > 10_000


def test_a_value_above_all_others_is_bold(tmp_path: Path) -> None:
    scores = {
        "default": [60.0, 62, 64],
        "vlora_rank-8": [50.0, 51, 52],
        "vlora_rank-16": [40, 59, 41],
    }
    found = swept(tmp_path, scores, axes="{vlora_rank: [8, 16, 32]}")
    (table,) = tables.text_tables(results.collect(found, plan(found)))
    assert [row[1] for row in table.rows] == [
        *("51.0 (50.0 to 52.0)", "46.7 (40.0 to 59.0)", "**62.0 (60.0 to 64.0)**")
    ]


def test_single_trainings_have_the_interval_of_their_questions_and_no_best(tmp_path: Path) -> None:
    found = swept(tmp_path, {"default": [50.0], "vlora_rank-8": [90.0]})
    (table,) = tables.text_tables(results.collect(found, plan(found)))
    # 50 right of 100: one half -+ 1.96 sqrt(1/4 / 100), in percent.
    low, high = map(float, re.findall(r"[0-9.]+", table.rows[1][1])[1:])
    assert (low, high) == (pytest.approx(40.2, abs=1.5), pytest.approx(59.8, abs=1.5))
    assert "**" not in table.rows[0][1]
    assert "no spread between trainings" in table.notes[0]
    assert main(["sweep", str(found.file), "--only-report"]) == 0


def test_what_is_not_there_yet_is_said(tmp_path: Path) -> None:
    found = spec(tmp_path)
    (table,) = tables.text_tables(results.collect(found, plan(found)))
    assert table.rows[0][1:] == ("-", "-", "-")
    assert "Not all runs are there of: vlora_rank-8, default." in table.notes


# --- the command ------------------------------------------------------------------------------------


def test_a_dry_run_prints_every_command_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = spec(tmp_path, seeds="[0, 1]", base="{pretrain: {data_path: nowhere.json}}")
    assert main(["sweep", str(found.file), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("python -m llava_vlora.run --seed") == 2 * 2 * 2
    assert said.count("python -m llava_vlora eval") == 2 * 2
    assert "2 variants, 2 seeds: 12 of 12 steps to do (4 of 4 pretrain" in said
    assert f"MISSING: {found.file}, line 5 (default): pretrain has data_path nowhere.json" in said
    assert not found.out.exists()
    assert main(["sweep", str(found.file)]) == 2
    error = capsys.readouterr().err
    assert "nowhere.json, which is not there" in error
    assert not found.out.exists()


def test_an_unknown_variant_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = spec(tmp_path)
    assert main(["sweep", str(found.file), "--only", "rank-8"]) == 2
    assert "no variant 'rank-8'; valid: 'default', 'vlora_rank-8'" in capsys.readouterr().err


TINY = """\
out: {out}
sceneqa: {{train_images: 12, test_images: 2}}
base:
  vlora_rank: 4
  vlora_dim: 16
  vlora_depth: 1
  vlora_heads: 2
  per_device_train_batch_size: 2
  logging_steps: 1
  save_strategy: steps
  save_steps: 2
  pretrain: {{max_steps: 2}}
  finetune: {{max_steps: 4}}
evaluate: {{benchmarks: [sceneqa], limit: 4}}
axes:
  vlora_rank: [2, 4]
"""


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_and_ends_in_a_table(tmp_path: Path) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(TINY.format(out=out))
    command = [sys.executable, "-m", "llava_vlora", "sweep", str(file)]
    first = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    until(lambda: list(out.glob("models/finetune-*/checkpoint-2")), 120)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = run_python(*command[1:])
    assert done.code == 0, done.output + done.errors
    assert "2 variants, 1 seeds: 5 of 6 steps to do (1 of 2 pretrain" in done.output
    runs = plan(read_spec(file, KNOWN))
    pretrain, finetune, _ = (state.read(step) for step in runs[0].steps)
    assert (pretrain["attempts"], finetune["attempts"]) == (1, 2)
    log = runs[0].finetune.log.read_text()
    assert "going on from" in log
    result = json.loads((out / "sweep.json").read_text())
    for run in runs:
        assert not state.todo(read_spec(file, KNOWN), run)
        (row,) = result["variants"][run.variant.name]["runs"]
        score = json.loads(run.evaluations[0].score("sceneqa").read_text())
        assert row["scores"]["evaluate"]["sceneqa"]["metrics"] == score["metrics"]
        assert score["questions"] == 4
    counts = [
        result["variants"][r.variant.name]["runs"][0]["steps"]["finetune"]["parameters"]
        for r in runs
    ]
    assert counts[0]["connector"] > counts[1]["connector"]
    assert "| 4 (default) |" in (out / "sweep.md").read_text()

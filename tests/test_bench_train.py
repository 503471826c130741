"""The training benchmark: real steps of the right parameters on the right tokens, and figures that follow from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from llava_vlora.bench.shapes import SHAPES, shape
from llava_vlora.bench.steps import STAGES, USUAL_STAGES, quiet_checkpoints
from llava_vlora.bench.summary import Ratio
from llava_vlora.bench.training import TrainBench, TrainOptions
from llava_vlora.bench.training_summary import speed, targets
from llava_vlora.cli import main
from llava_vlora.errors import ConfigError
from llava_vlora.generators import KINDS

OPTIONS = TrainOptions(
    shape("tiny"),
    torch.device("cpu"),
    "float32",
    rounds=2,
    batch=2,
    text_tokens={"pretrain": 8, "finetune": 12, "frozen": 12},
)
PATCHES = 64


@pytest.fixture(scope="module")
def bench() -> TrainBench:
    return TrainBench(OPTIONS)


@pytest.fixture(scope="module")
def ticks() -> list[str]:
    return []


@pytest.fixture(scope="module")
def result(bench: TrainBench, ticks: list[str]) -> dict[str, Any]:
    return bench.run(ticks.append)


def parts(model: Any) -> dict[str, list[torch.nn.Parameter]]:
    """Parameters of the language model, the tower and what connects them."""
    found: dict[str, list[torch.nn.Parameter]] = {"language": [], "tower": [], "connector": []}
    for name, parameter in model.named_parameters():
        part = {"vision_tower": "tower", "mm_projector": "connector"}
        found[next((p for key, p in part.items() if key in name), "language")].append(parameter)
    return found


# --- steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_flow_where_the_stage_trains_and_only_there(
    stage: str, checkpointing: bool
) -> None:
    bench = TrainBench(replace(OPTIONS, checkpointing=checkpointing))
    steps = bench.stage(stage)
    for system in ("llava", *KINDS):
        with quiet_checkpoints():
            steps.backward(system)
        found = parts(bench.models.pictured[system])
        # A key's bias adds the same to every score: its gradient is zero, and there is no other without one.
        assert all(p.grad is not None for p in found["connector"])
        assert all(p.grad.any() for p in found["connector"] if p.ndim > 1)
        assert all(p.grad is None for p in found["tower"])
        if stage != "finetune":
            assert all(p.grad is None for p in found["language"])
        else:
            assert all(p.grad.any() for p in found["language"])
        for parameter in steps.trained[system]:
            parameter.grad = None


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_changes_what_trains_and_leaves_no_gradients(bench: TrainBench, kind: str) -> None:
    for stage, changing in (
        ("pretrain", {"connector"}),
        ("finetune", {"connector", "language"}),
        ("frozen", {"connector"}),
    ):
        steps, model = bench.stage(stage), bench.models.vlora[kind]
        for optimizer in steps._optimizers[kind]:
            optimizer.param_groups[0]["lr"] = 1e-3
        found = parts(model)
        before = {part: [p.clone() for p in found[part]] for part in found}
        with quiet_checkpoints():
            steps.step(kind)
        changed = {
            part
            for part in found
            if any(not torch.equal(a, b) for a, b in zip(before[part], found[part], strict=True))
        }
        assert changed == changing
        assert all(p.grad is None for p in model.parameters())


def test_a_step_is_the_models_own_loss(bench: TrainBench) -> None:
    """The loss of a step equals the mean cross entropy of the learned tokens, computed by hand."""
    steps = bench.stage("finetune")
    for system in ("text", *KINDS):
        batch = steps.batches[system]
        model = steps._models[system]
        with torch.no_grad(), quiet_checkpoints():
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            logits = model(**inputs).logits
        labels = batch["labels"][batch["input_ids"] != -200].view(2, -1)
        assert (labels != -100).sum() == 2 * 6  # half of a conversation are answers
        expected = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        with quiet_checkpoints():
            assert steps.backward(system).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_language_model_is_in_memory_once(bench: TrainBench) -> None:
    models = bench.models
    for name, parameter in models.text.named_parameters():
        for model in models.pictured.values():
            assert model.get_parameter(name) is parameter
    steps = bench.stage("finetune")
    for system in OPTIONS.systems:
        with quiet_checkpoints():
            steps.step(system)
    language = sum(p.numel() * p.element_size() for p in models.text.parameters())
    # And a counter for each tensor.
    assert steps.state_bytes("text") == pytest.approx(2 * language, rel=1e-4)
    for kind, model in models.vlora.items():
        generator = sum(p.numel() * p.element_size() for p in model.generator.parameters())
        assert steps.state_bytes(kind) == pytest.approx(2 * (language + generator), rel=1e-3)


def test_autocast_holds_the_generator_in_float32() -> None:
    bench = TrainBench(replace(OPTIONS, dtype="autocast"))
    steps = bench.stage("pretrain")
    for kind, model in bench.models.vlora.items():
        with quiet_checkpoints():
            assert steps.step(kind).isfinite()
        assert {p.dtype for p in model.generator.parameters()} == {torch.float32}
    assert {p.dtype for p in bench.models.text.parameters()} == {torch.bfloat16}


# --- figures ---------------------------------------------------------------------------------------


def test_every_system_is_measured_in_every_stage(
    result: dict[str, Any], bench: TrainBench, ticks: list[str]
) -> None:
    cells = {(c["stage"], c["system"]): c for c in result["cells"]}
    assert set(cells) == {(stage, system) for stage in USUAL_STAGES for system in OPTIONS.systems}
    for cell in cells.values():
        assert len(cell["seconds"]) == 2
        assert cell["samples_per_second"] == pytest.approx(2 / median(cell["seconds"]))
        # Random weights know nothing of the next token.
        assert cell["loss"] == pytest.approx(torch.tensor(4000.0).log().item(), abs=0.5)
    assert len(ticks) == bench.work()
    assert result["options"]["text_tokens"] == {"pretrain": 8, "finetune": 12}
    assert {"device", "versions", "commit", "machine", "minutes"} <= result.keys()


@pytest.mark.parametrize(("stage", "text"), [("pretrain", 8), ("finetune", 12)])
def test_tokens_of_a_sample(stage: str, text: int, result: dict[str, Any]) -> None:
    """LLaVA reads the visual tokens; VLoRA reads the text, its image's slot being dropped."""
    tokens = {c["system"]: c["tokens"] for c in result["cells"] if c["stage"] == stage}
    assert tokens == {"text": text, "llava": text + PATCHES, **dict.fromkeys(KINDS, text)}


def test_parameters_and_memory(result: dict[str, Any]) -> None:
    cells = {(c["stage"], c["system"]): c for c in result["cells"]}
    width = SHAPES["tiny"].language["hidden_size"]
    projector = 128 * width + width + width**2 + width
    assert cells["pretrain", "llava"]["trained"] == projector
    assert cells["pretrain", "text"]["trained"] == 0
    assert cells["pretrain", "text"]["optimizer"] == 0
    language = cells["finetune", "text"]["trained"]
    assert cells["finetune", "llava"]["trained"] == language + projector
    for cell in cells.values():
        if cell["peak"] is not None:
            assert cell["peak"] >= cell["weights"] + cell["optimizer"]


def test_samples_per_second_are_compared_round_by_round() -> None:
    fast, slow = ({"seconds": [1.0, 2.0, 4.0]}, {"seconds": [3.0, 4.0, 16.0]})
    assert speed(fast, slow) == Ratio(3.0, 2.0, 4.0)


def cell(stage: str, system: str, seconds: float, peak: int | None) -> dict[str, Any]:
    return {"stage": stage, "system": system, "seconds": [seconds], "batch": 1, "peak": peak}


def made_up(**peaks: int | None) -> dict[str, Any]:
    return {
        "shape": {"name": "7b"},
        "kinds": {"vlora": "VLoRA", "fast": "Fast"},
        "cells": [
            cell(stage, system, seconds, peaks[system])
            for stage, seconds_of in (
                ("pretrain", {"llava": 3.3, "vlora": 1.0, "fast": 1.5}),
                ("finetune", {"llava": 1.7, "vlora": 1.0, "fast": 0.8}),
                ("frozen", {"llava": 1.7, "vlora": 1.0, "fast": 0.8}),
            )
            for system, seconds in seconds_of.items()
        ],
    }


def test_targets_are_judged_by_their_numbers() -> None:
    found = targets(made_up(llava=80, vlora=60, fast=80))
    assert [(t.kind, t.goal, t.met) for t in found] == [
        ("vlora", ">= 3.0", True),
        ("vlora", "< 1", True),
        ("fast", ">= 3.0", False),
        ("fast", "< 1", False),
        ("vlora", ">= 1.8", False),
        ("vlora", "< 1", True),
        ("fast", ">= 1.8", True),
        ("fast", "< 1", False),
    ]
    unknown = targets(made_up(llava=None, vlora=None, fast=None))
    assert [t.met for t in unknown] == [True, False, False, True]
    assert found[0].paper == pytest.approx(2.32, abs=0.005)
    tiny = {**made_up(llava=8, vlora=8, fast=8), "shape": {"name": "tiny"}}
    assert targets(tiny) == []


# --- command ---------------------------------------------------------------------------------------


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"bench train --rounds 1 --stages pretrain,frozen --text-tokens 8 --out {tmp_path}"
    assert main([*command.split(), "--optimizer", "none", "--no-checkpointing"]) == 0
    shown = capsys.readouterr().out
    assert "forward pass alone" in shown
    assert "no optimizer, without gradient checkpointing" in shown
    written = json.loads((tmp_path / "train-tiny-cpu-bfloat16.json").read_text())
    assert {c["stage"] for c in written["cells"]} == {"pretrain", "frozen"}
    assert written["systems"]["vlora_fast"] == "VLoRA fast"
    assert {c["optimizer"] for c in written["cells"]} == {0}
    assert (tmp_path / "train-tiny-cpu-bfloat16.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--shape 70b", "'1b', '7b', '13b'"),
        ("--stages pretraining", "'pretrain', 'finetune', 'frozen'"),
        ("--optimizer adam", "'adamw', 'sgd', 'none'"),
        ("--dtype float16", "'bfloat16', 'autocast'"),
        ("--rounds 0", "--rounds"),
        ("--batch 0", "--batch"),
        ("--text-tokens 1", "--text-tokens"),
    ],
)
def test_mistakes_are_named(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "train", *wrong.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_flag_before_train_is_not_lost(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main("bench --rounds 2 train".split())
    assert stop.value.code == 2
    assert "--rounds stands before 'train'" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_an_error(bench: TrainBench) -> None:
    weight = bench.models.text.lm_head.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.inf)
    try:
        with pytest.raises(ConfigError, match="loss"):
            bench.run()
    finally:
        with torch.no_grad():
            weight.copy_(before)

"""The estimate against the real thing: parameters by name, bytes of real steps, DeepSpeed's partitions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, MistralForCausalLM

from llava_vlora.bench.shapes import SHAPES, Shape
from llava_vlora.bench.steps import quiet_checkpoints
from llava_vlora.bench.training import TrainBench, TrainOptions, needed_bytes
from llava_vlora.cli import main
from llava_vlora.config import VLoRAConfig
from llava_vlora.errors import CheckpointError, ConfigError, DataError, UnsupportedDecoderError
from llava_vlora.estimate.activations import activations
from llava_vlora.estimate.memory import count_parameters, memory, quantised_bytes
from llava_vlora.estimate.models import find_shape
from llava_vlora.estimate.parameters import (
    connector_parameters,
    language_parameters,
    projectors,
    vision_parameters,
)
from llava_vlora.estimate.plan import Plan
from llava_vlora.estimate.speed import read_speed
from llava_vlora.generators import KINDS
from llava_vlora.integration.fresh import random_models

CPU = torch.device("cpu")
#: Projector -> its name in the benchmark.
SYSTEMS = {"mlp2x_gelu": "llava"} | {kind: kind for kind in KINDS}
OLD = Version(transformers.__version__) < Version("4.48")
TINY = SHAPES["tiny"]
#: Grouped-query attention, the FFN's own types, other widths.
GROUPED = replace(
    TINY,
    language={**TINY.language, "num_key_value_heads": 2, "num_hidden_layers": 8},
).with_settings(types="qkvogud", every=2)
#: Many small query groups, so that the paper's generator attends in the usual order.
WIDE = TINY.with_settings(dim=32, every=1)
#: Fast weights of another make: wider, deeper, of one patch each or gathered, places learned, no gate.
OTHER = TINY.only(["vlora_fast"]).with_settings(
    dim=64, depth=3, types="qvom", window=1, gate=False, positions="learned"
)


def counted(shape: Shape, kind: str) -> dict[str, int]:
    parts = (language_parameters(shape.language), vision_parameters(shape.vision))
    return {**parts[0], **parts[1], **connector_parameters(shape, kind)}


# --- parameters ------------------------------------------------------------------------------------

SHAPES_TO_COUNT = {
    "tiny": TINY,
    "1b": SHAPES["1b"],
    "7b": SHAPES["7b"],
    "grouped": GROUPED,
    "biased": replace(TINY, language={**TINY.language, "attention_bias": True}),
    "one generator": TINY.only(["vlora"]).with_settings(separate=False),
    "listed layers": TINY.with_settings(layer_list=(0, 3), types="qd"),
    "other fast weights": OTHER,
}


@pytest.mark.parametrize("name", SHAPES_TO_COUNT)
def test_parameters_are_those_of_the_real_models(name: str) -> None:
    shape = SHAPES_TO_COUNT[name]
    models = random_models(
        LlamaConfig(**shape.language),
        CLIPVisionConfig(**shape.vision),
        shape.generators,
        device=torch.device("meta"),
        dtype=torch.bfloat16,
    )
    for projector, model in zip(projectors(shape), models.pictured.values(), strict=True):
        assert counted(shape, projector) == {n: p.numel() for n, p in model.named_parameters()}


def test_mistral_is_counted_too() -> None:
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=90,
    )
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    real = {n: p.numel() for n, p in model.named_parameters()}
    assert language_parameters(config.to_dict()) == real


def test_published_sizes() -> None:
    shape = SHAPES["7b"]
    assert sum(language_parameters(shape.language).values()) == 6_738_415_616
    assert sum(connector_parameters(shape, "vlora").values()) == 851_891_712  # the public code's


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", ["lora", "pretrain", "finetune", "frozen"])
def test_what_a_stage_trains(stage: str, kind: str) -> None:
    peft = pytest.importorskip("peft")
    plan = Plan(stage, 0, lora_rank=4)
    parameters = count_parameters(GROUPED, kind, plan)
    bench = TrainBench(TrainOptions(GROUPED, CPU, batch=1))
    trained = sum(parameters.trained.values())
    if stage != "lora":
        steps = bench.stage(stage)
        assert trained == sum(p.numel() for p in steps.trained[kind])
        return
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(bench.models.text, config)
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    generator = sum(p.numel() for p in bench.models.vlora[kind].generator.parameters())
    assert trained == own + generator


# --- memory of one process, against real steps -------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "autocast"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune", "frozen"])
def test_bytes_of_weights_gradients_and_optimizer(stage: str, dtype: str) -> None:
    bench = TrainBench(TrainOptions(TINY, CPU, dtype, text_tokens={stage: 8}, stages=(stage,)))
    steps = bench.stage(stage)
    plan = Plan(stage, 0, dtype="float32" if dtype == "float32" else "bfloat16")
    for kind, system in SYSTEMS.items():
        with quiet_checkpoints():
            steps.backward(system)
            gradients = sum(p.grad.nbytes for p in steps.trained[system] if p.grad is not None)
            steps.step(system)
        kept = memory(TINY, kind, plan).kept
        weights = sum(size for name, size in kept.items() if name.startswith("weights"))
        assert weights == steps.weight_bytes(system)
        assert kept["gradients"] == gradients
        counters = 4 * len(steps.trained[system])
        assert kept["optimizer: AdamW's moments"] == steps.state_bytes(system) - counters
    if stage == "finetune":
        # Language model, tower and both connectors, with moments; one system's gradients.
        language = memory(TINY, "vlora", plan).kept["weights: language model"]
        assert needed_bytes(bench.options) > 4 * language


def kept_for_backward(steps: Any, system: str) -> int:
    """Bytes of the tensors that autograd keeps in a forward pass, weights and inputs apart."""
    models, batch = steps._models, steps.batches[system]
    known = {
        t.untyped_storage().data_ptr()
        for model in models.values()
        for t in (*model.parameters(), *model.buffers(), *batch.values())
    }
    held: dict[int, int] = {}
    alive = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)  # or another tensor could take its place
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
    with hooks, steps._precision(), quiet_checkpoints():
        models[system](**batch)
    return sum(held.values())


SHAPES_TO_RUN = {"tiny": TINY, "grouped": GROUPED, "wide": WIDE, "other fast weights": OTHER}


@pytest.mark.parametrize("name", SHAPES_TO_RUN)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_activations_are_within_five_percent(name: str, checkpointing: bool, dtype: str) -> None:
    shape = SHAPES_TO_RUN[name]
    text = {"pretrain": 40, "finetune": 90, "frozen": 90}
    options = TrainOptions(
        shape, CPU, dtype, batch=3, text_tokens=text, checkpointing=checkpointing
    )
    bench = TrainBench(options)
    for stage, tokens in text.items():
        plan = Plan(
            stage,
            2 if dtype == "bfloat16" else 0,
            batch=3,
            text_tokens=tokens,
            checkpointing=checkpointing,
            dtype="float32" if dtype == "float32" else "bfloat16",
        )
        steps = bench.stage(stage)
        for kind in projectors(shape):
            system = SYSTEMS[kind]
            one = activations(shape, kind, plan)
            expected = one.decoder + one.connector + one.logits // 3
            # A checkpointed layer holds the factors without autograd.
            expected += 0 if checkpointing else one.factors
            # Older transformers repeat grouped keys and values for every query head.
            repeated = name == "grouped" and not checkpointing and OLD
            found = kept_for_backward(steps, system)
            close = pytest.approx(expected, rel=0.1 if repeated else 0.05)
            assert found == close, (stage, kind)


def allocated(call: Any) -> int:
    """The most bytes of tensors that ``call`` has beyond what was there, by PyTorch's own records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()
    current = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        current += size
        peak = max(peak, current)
    return peak


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("stage", ["pretrain", "finetune", "frozen"])
def test_peak_of_a_step_is_within_five_percent(stage: str, checkpointing: bool) -> None:
    """Where the logits are the most, before there are gradients."""
    options = TrainOptions(
        TINY, CPU, "float32", (stage,), batch=16, text_tokens={stage: 100},
        checkpointing=checkpointing,
    )  # fmt: skip
    steps = TrainBench(options).stage(stage)
    plan = Plan(stage, 0, batch=16, text_tokens=100, checkpointing=checkpointing, dtype="float32")
    for kind, system in SYSTEMS.items():
        with quiet_checkpoints():
            measured = allocated(lambda system=system: steps.backward(system))
        found = activations(TINY, kind, plan)
        assert found.logits > found.layer
        assert found.peak == pytest.approx(measured, rel=0.05)
        for parameter in steps.trained[system]:
            parameter.grad = None


@pytest.mark.parametrize("stage", ["pretrain", "finetune", "frozen"])
def test_peak_of_a_step_with_few_words_is_bounded(stage: str) -> None:
    """Where a decoder layer going backward is the most; gradients of the others are counted as if all were there."""
    shape = replace(TINY, language={**TINY.language, "vocab_size": 200})
    options = TrainOptions(shape, CPU, "float32", (stage,), batch=8, text_tokens={stage: 100})
    steps = TrainBench(options).stage(stage)
    plan = Plan(stage, 0, batch=8, text_tokens=100, dtype="float32")
    for kind, system in SYSTEMS.items():
        with quiet_checkpoints():
            measured = allocated(lambda system=system: steps.backward(system))
        found = memory(shape, kind, plan)
        assert found.activations.layer > found.activations.logits
        bound = found.activations.peak + found.kept["gradients"]
        assert measured < 1.05 * bound
        assert bound < 1.5 * measured
        for parameter in steps.trained[system]:
            parameter.grad = None


def test_quantised_weights() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(300, 200)
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    real = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert quantised_bytes(weight.numel(), 4) == real
    plan = Plan("qlora", 2)
    whole, small = (
        memory(TINY, "vlora", p).kept["weights: language model"] for p in (Plan("lora", 2), plan)
    )
    linear = sum(
        n for name, n in language_parameters(TINY.language).items()
        if "_proj" in name or "lm_head" in name
    )  # fmt: skip
    assert whole - small == pytest.approx(1.5 * linear - linear / 64, rel=1e-3)


# --- several GPUs ------------------------------------------------------------------------------------


def test_partitions_add_up() -> None:
    one, many = (
        {n: memory(TINY, "vlora", Plan("finetune", zero, gpus=gpus)).kept for zero in (2, 3) for n in (zero,)}
        for gpus in (1, 4)
    )  # fmt: skip
    trained = sum(count_parameters(TINY, "vlora", Plan("finetune", 2)).trained.values())
    for zero in (2, 3):
        for name, size in one[zero].items():
            shared = "1 / GPUs" in name or "optimizer" in name
            share = many[zero][name]
            assert share == pytest.approx(size / 4, rel=1e-3) if shared else share == size
        assert one[zero]["optimizer: float32 copies"] == pytest.approx(4 * trained, abs=8)
    assert "weights: 1 / GPUs" in many[3]


def test_offload_moves_what_is_shared() -> None:
    for zero in (2, 3):
        here, there = (
            memory(TINY, "vlora", Plan("finetune", zero, gpus=2, offload=o)) for o in (False, True)
        )
        moved = sum(here.kept.values()) - sum(there.kept.values())
        # The CPU holds the step's float32 gradients too.
        assert there.host > moved > 0
        assert here.host == there.step == 0


_STEP = "from tests.estimate_deepspeed import main; main()"


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("pretrain", "vlora"),
        ("frozen", "vlora_fast"),
        # Both stacks have one DeepSpeed, which is called without transformers' trainer.
        pytest.param("finetune", "mlp2x_gelu", marks=pytest.mark.one_stack),
    ],
)
def test_partitions_are_deepspeeds(zero: int, stage: str, kind: str, tmp_path: Path) -> None:
    """Bytes of a real engine on two processes, after one step."""
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    from tests.two_stacks import run_processes

    out = tmp_path / "bytes.json"
    done = run_processes(zero, stage, kind, out, code=_STEP)
    assert done.code == 0, done.errors[-3000:]
    real = json.loads(out.read_text())
    kept = memory(TINY, kind, Plan(stage, zero, gpus=2)).kept
    assert kept["gradients: 1 / GPUs"] == real["gradients"]
    assert kept["optimizer: float32 copies"] == real["copies"]
    assert kept["optimizer: AdamW's moments"] == real["moments"]
    if zero == 3:
        assert kept["weights: 1 / GPUs"] == real["weights"]
        assert kept["weights: small, kept whole"] == real["whole"]
    else:
        assert sum(s for n, s in kept.items() if n.startswith("weights")) == real["weights"]


# --- a model folder ----------------------------------------------------------------------------------


def test_a_model_folder_counts_like_its_weights(
    llm_dir: Path, mistral_dir: Path, tower_dir: Path
) -> None:
    from safetensors import safe_open

    for folder in (llm_dir, mistral_dir):
        shape = find_shape(str(folder), str(tower_dir))
        with safe_open(folder / "model.safetensors", "pt") as file:
            real = {n: file.get_tensor(n).numel() for n in file.keys()}
        assert language_parameters(shape.language) == real
        with safe_open(tower_dir / "model.safetensors", "pt") as file:
            tower = sum(file.get_tensor(n).numel() for n in file.keys() if "position_ids" not in n)
        assert sum(vision_parameters(shape.vision).values()) == tower


def test_a_vlora_checkpoint_has_its_own_settings(llm_dir: Path, tmp_path: Path) -> None:
    config = json.loads((llm_dir / "config.json").read_text())
    settings = VLoRAConfig(dim=32, depth=2, heads=4, rank=4, every=2, types="qv")
    config |= {**settings.to_keys(), "model_type": "llava_vlora", "mm_projector_type": "vlora"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape = find_shape(str(tmp_path))
    assert shape.generators == {"vlora": settings}
    assert shape.patches == 576  # LLaVA-1.5's tower where none is named


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model_type": "mpt"}, UnsupportedDecoderError, "mpt"),
        ({"hidden_size": None}, CheckpointError, "lacks 'hidden_size'"),
        ({"mm_vision_tower": "google/siglip"}, ConfigError, "--vision-tower"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named(
    change: dict[str, Any], error: type[Exception], message: str, llm_dir: Path, tmp_path: Path
) -> None:
    config = json.loads((llm_dir / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        find_shape(str(tmp_path))


# --- hours -------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A result in the format of ``bench train``: 10 and 40 samples a second."""
    result = {
        "kind": "train",
        "shape": TINY.facts(),
        "options": {
            "batch": 16, "text_tokens": {"finetune": 256}, "checkpointing": True, "dtype": "bfloat16",
        },
        "device": {"name": "an abacus", "threads": 1},
        "commit": "0123456789",
        "cells": [
            {"stage": "finetune", "system": s, "samples_per_second": v}
            for s, v in (("text", 50), ("llava", 10), ("vlora", 40), ("vlora_fast", 80))
        ],
    }  # fmt: skip
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result))
    return path


def test_hours_follow_from_measured_speed(measured: Path) -> None:
    speed = read_speed(measured, TINY, Plan("finetune", 2, gpus=4, batch=8))
    assert speed.hours("mlp2x_gelu", 36_000, 1) == pytest.approx(1.0)
    assert speed.hours("vlora", 36_000, 4) == pytest.approx(1 / 16)
    assert "an abacus, threads: 1, tiny, commit 0123456" in speed.measured_on
    assert speed.differences == ("batch 16 (here 8)",)


def test_a_real_result_is_read(tmp_path: Path) -> None:
    command = f"bench train --rounds 1 --stages pretrain --text-tokens 8 --out {tmp_path}"
    assert main(command.split()) == 0
    file = tmp_path / "train-tiny-cpu-bfloat16.json"
    speed = read_speed(file, TINY, Plan("pretrain", 2, batch=1, text_tokens=8))
    assert set(speed.samples_per_second) == set(projectors(TINY))
    assert speed.differences == ()


def test_a_measurement_of_something_else_is_refused(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="measured on tiny, whose 'num_hidden_layers'"):
        read_speed(measured, GROUPED, Plan("finetune", 2))
    with pytest.raises(ConfigError, match="no measurement of stage 'lora', only of 'finetune'"):
        read_speed(measured, TINY, Plan("lora", 2))
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(DataError, match="bench train"):
        read_speed(other, TINY, Plan("finetune", 2))
    broken = json.loads(measured.read_text())
    del broken["options"]
    other.write_text(json.dumps(broken))
    with pytest.raises(DataError, match="options"):
        read_speed(other, TINY, Plan("finetune", 2))


# --- command -----------------------------------------------------------------------------------------


def test_command_prints_all_side_by_side(
    capsys: pytest.CaptureFixture[str], measured: Path
) -> None:
    assert main("estimate --model 7b --stage pretrain --gpus 8".split()) == 0
    shown = capsys.readouterr().out
    assert "ZeRO-2, batch 32 a GPU, 32 text tokens" in shown
    row = next(line for line in shown.splitlines() if "projector, generator" in line)
    assert row.split()[-3:] == ["20,979,712", "851,891,712", "39,331,329"]
    command = f"estimate --model tiny --bench {measured} --samples 36000 --gpus 1 --projector vlora"
    assert main(command.split()) == 0
    shown = capsys.readouterr().out
    assert "hours for 36,000 samples" in shown
    assert "Measured on: an abacus" in shown
    assert "LLaVA" not in shown.split("parameters")[1].split("Gradients")[0]


def test_offload_and_qlora_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("estimate --stage finetune --zero 3 --offload --no-checkpointing".split()) == 0
    assert "on the CPU, for each GPU" in capsys.readouterr().out
    assert main("estimate --stage qlora --bits 8 --gpus 1 --types qkvo".split()) == 0
    assert "qlora (8 bits), 1 GPU, ZeRO-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--stage sft", "'pretrain', 'finetune', 'lora', 'qlora', 'frozen'"),
        ("--projector mlp", "'vlora', 'vlora_fast'"),
        ("--zero 1", "0, 2, 3"),
        ("--gpus 0", "--gpus must be at least 1"),
        ("--batch 0", "--batch"),
        ("--stage qlora --zero 3", "use --zero 2"),
        ("--stage qlora --bits 3", "4, 8"),
        ("--zero 0 --offload", "--zero 2 or --zero 3"),
        ("--model 70b", "no shape"),
        ("--samples 100", "--bench"),
        ("--bench nowhere.json", "nowhere.json is missing"),
        ("--types qx", "'x'"),
        ("--vision-tower siglip", "--vision-tower"),
    ],
)
def test_mistakes_are_named(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *wrong.split()]) == 2
    assert message in capsys.readouterr().err

"""Counted arithmetic against PyTorch's own counter on real modules and against known figures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_vlora.bench.calls import Calls
from llava_vlora.bench.shapes import SHAPES, Shape
from llava_vlora.cli import main
from llava_vlora.config import VLoRAConfig
from llava_vlora.costing.competitors import COMPETITORS, Competitor, competitor_cost
from llava_vlora.costing.figure4 import figure4
from llava_vlora.costing.result import Question, compare
from llava_vlora.decoder import DecoderShape, decoder_shape
from llava_vlora.evaluation.cost import (
    CLIP_L_336,
    VICUNA_7B,
    LanguageShape,
    VisionShape,
    answer_cost,
    generator_macs,
    language_shape,
    low_rank_macs,
    merge_macs,
    projector_macs,
    vision_shape,
)
from llava_vlora.generators import KINDS, PerceptualWeightsGenerator
from llava_vlora.injection import seeing
from llava_vlora.integration.fresh import random_models
from tests import toy_generator

CLIP = CLIPVisionConfig(
    hidden_size=48,
    num_hidden_layers=3,
    intermediate_size=80,
    num_attention_heads=4,
    image_size=56,
    patch_size=14,
)
LLAMA = LlamaConfig(
    hidden_size=64,
    num_hidden_layers=4,
    intermediate_size=112,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=90,
)
GQA = LlamaConfig(**{**LLAMA.to_dict(), "num_key_value_heads": 2})
CONFIG = VLoRAConfig(dim=32, depth=2, heads=4, rank=8, every=2)
#: Wider and deeper, grouped-query attention, the FFN's own types; and query groups that attend in the usual order.
DEEP = replace(
    SHAPES["tiny"],
    language={
        **SHAPES["tiny"].language,
        **{"hidden_size": 384, "intermediate_size": 1000, "num_hidden_layers": 8},
        **{"num_attention_heads": 6, "num_key_value_heads": 2},
    },
).with_settings(types="qkvogud", every=2)
#: The paper's query groups are so many that they attend in the usual order.
MANY = SHAPES["tiny"].with_settings(dim=32, every=1)
TEXT = 20
WAYS_TO_COUNT = ("batched", "merged")


def counted_macs(run: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    # PyTorch does not count its fused attention kernel for the CPU.
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops() / 2


def test_vision_tower() -> None:
    model = CLIPVisionModel._from_config(CLIP, attn_implementation="eager")
    measured = counted_macs(lambda: model(torch.zeros(1, 3, 56, 56)))
    assert vision_shape(CLIP.to_dict()).macs == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("config", [LLAMA, GQA], ids=["multi-head", "grouped-query"])
def test_language_model_prefill_and_decode(config: LlamaConfig) -> None:
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    shape = language_shape(config.to_dict())
    ids = torch.arange(23).unsqueeze(0)
    whole = counted_macs(lambda: model(ids))
    assert shape.prefill(23, logits=23) == pytest.approx(whole, rel=0.01)
    cache = model(ids, use_cache=True).past_key_values
    step = counted_macs(lambda: model(ids[:, :1], past_key_values=cache))
    assert shape.decode(24) == pytest.approx(step, rel=0.01)


@pytest.mark.parametrize("separate", [True, False])
def test_generator(separate: bool) -> None:
    config = VLoRAConfig(dim=32, depth=2, heads=4, rank=8, every=2, separate=separate)
    widths = dict.fromkeys(config.types, 64)
    generator = PerceptualWeightsGenerator(config, DecoderShape(4, widths, widths), 48, 16)
    vision, language = vision_shape(CLIP.to_dict()), language_shape(LLAMA.to_dict())
    measured = counted_macs(lambda: generator(torch.zeros(1, 16, 48)))
    assert generator_macs(config, vision, language) == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("config", [LLAMA, GQA], ids=["multi-head", "grouped-query"])
def test_ffn_weight_types_count_their_rectangular_factors(config: LlamaConfig) -> None:
    settings = VLoRAConfig(dim=32, depth=2, heads=4, rank=8, every=2, types="qkvogud")
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager")
    vision, language = vision_shape(CLIP.to_dict()), language_shape(config.to_dict())
    generator = PerceptualWeightsGenerator(settings, decoder_shape(model, settings.types), 48, 16)
    measured = counted_macs(lambda: generator(torch.zeros(1, 16, 48)))
    assert generator_macs(settings, vision, language) == pytest.approx(measured, rel=0.01)
    weights, ids = generator(torch.zeros(1, 16, 48)), torch.arange(23).unsqueeze(0)
    plain = counted_macs(lambda: model(ids))
    with seeing(model, weights):
        seen = counted_macs(lambda: model(ids))
    assert 23 * low_rank_macs(settings, language) == seen - plain


def test_projector_and_low_rank_paths() -> None:
    vision, language = vision_shape(CLIP.to_dict()), language_shape(LLAMA.to_dict())
    first, second = torch.nn.Linear(48, 64), torch.nn.Linear(64, 64)
    measured = counted_macs(lambda: second(first(torch.zeros(1, 16, 48))))
    assert projector_macs(vision, language) == measured
    down, up = torch.zeros(64, 8), torch.zeros(8, 64)
    one_path = counted_macs(lambda: torch.zeros(1, 64) @ down @ up)
    assert low_rank_macs(CONFIG, language) == one_path * 5 * 2


def test_grouped_query_attention_narrows_key_and_value_paths() -> None:
    multi, grouped = language_shape(LLAMA.to_dict()), language_shape(GQA.to_dict())
    saved = low_rank_macs(CONFIG, multi) - low_rank_macs(CONFIG, grouped)
    assert saved == 2 * 8 * 2 * (64 - 32)


def test_released_models_cost_what_is_known_of_them() -> None:
    released = VLoRAConfig()
    assert 2 * CLIP_L_336.macs == pytest.approx(381e9, rel=0.01)
    # 38.2e9 in the public code's order of products, which projects every patch for each of the 40 blocks.
    assert 2 * generator_macs(released, CLIP_L_336, VICUNA_7B) == pytest.approx(20.1e9, rel=0.01)
    llava = answer_cost(CLIP_L_336, VICUNA_7B, 32, None)
    vlora = answer_cost(CLIP_L_336, VICUNA_7B, 32, released)
    assert (llava.sequence, vlora.sequence) == (608, 32)
    # The paper's Fig. 4 (LLM alone, 32 text tokens, 576 visual tokens) shows a tenth.
    assert 0.04 < vlora.prefill / llava.prefill < 0.06
    assert 0.09 < vlora.first_token / llava.first_token < 0.11
    assert 2 * llava.image_values == 288 * 2**20
    assert 2 * vlora.image_values == 20 * 2**20


def test_low_rank_paths_are_part_of_prefill_and_decode() -> None:
    vision, language = vision_shape(CLIP.to_dict()), language_shape(LLAMA.to_dict())
    cost = answer_cost(vision, language, 20, CONFIG)
    assert cost.prefill - cost.low_rank == 2 * language.prefill(20)
    assert cost.decode == 2 * (language.decode(21) + low_rank_macs(CONFIG, language))


# --- whole models ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[SHAPES["tiny"], DEEP, MANY], ids=["tiny", "deep", "many"])
def real(request: pytest.FixtureRequest) -> tuple[Shape, Calls]:
    shape: Shape = request.param
    sizes = LlamaConfig(**shape.language), CLIPVisionConfig(**shape.vision)
    how: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    return shape, Calls(random_models(*sizes, shape.generators, **how), shape.patches)


def public_macs(settings: VLoRAConfig, vision: VisionShape, language: LanguageShape) -> int:
    """The paper's generator as the public code computes."""
    widths = language.decoder_shape(settings.types)
    return PerceptualWeightsGenerator.macs(
        settings, widths, vision.width, vision.patches, project=True
    )


@contextmanager
def visible() -> Iterator[None]:
    """PyTorch's counter knows nothing of the fused path of ``nn.MultiheadAttention``."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def flops(prepared: Any) -> float:
    with visible(), prepared() as call:
        return 2 * counted_macs(call)


@pytest.mark.parametrize("system", ["llava", *(f"{k}/{w}" for k in KINDS for w in WAYS_TO_COUNT)])
def test_first_and_further_tokens_of_real_models(system: str, real: tuple[Shape, Calls]) -> None:
    shape, calls = real
    vision, language = vision_shape(shape.vision), language_shape(shape.language)
    kind, _, way = system.partition("/")
    settings = shape.generators.get(kind)
    cost = answer_cost(vision, language, TEXT, settings, merged=way == "merged")
    # Transformers 4.57 makes rotary angles with a matrix product: one in a hundred thousand.
    close = {"rel": 1e-4}
    assert cost.prefill == pytest.approx(flops(calls.prefill(system, TEXT, shape.patches)), **close)
    assert cost.first_token == pytest.approx(flops(calls.first_token(system, TEXT)), **close)
    one = flops(calls.decode(system, 1, TEXT, shape.patches, 1))
    assert cost.decode == pytest.approx(one, **close)
    three = flops(calls.decode(system, 1, TEXT, shape.patches, 3))
    assert cost.answer(4) - cost.first_token == pytest.approx(three, **close)


def test_parts_of_real_models(real: tuple[Shape, Calls]) -> None:
    shape, calls = real
    vision, language = vision_shape(shape.vision), language_shape(shape.language)
    work = calls.image_work()
    assert flops(work["vision tower"]) == 2 * vision.macs
    assert flops(work["LLaVA's projector"]) == 2 * projector_macs(vision, language)
    for kind, settings in shape.generators.items():
        assert flops(work[f"{kind}/generator"]) == 2 * generator_macs(settings, vision, language)
        assert flops(work[f"{kind}/merge"]) == 2 * merge_macs(settings, language)


def test_generator_in_the_public_codes_order_of_products(real: tuple[Shape, Calls]) -> None:
    shape, calls = real
    vision, language = vision_shape(shape.vision), language_shape(shape.language)
    features, generator = calls.features(1, shape.patches), calls.generators["vlora"]
    with visible():  # looking at the attention takes the usual order, and spells out no factors
        counted = counted_macs(lambda: generator.look(features))
    latents = generator.latents(features)
    heads = counted_macs(lambda: generator.expand(latents))
    settings = shape.generators["vlora"]
    projecting = public_macs(settings, vision, language)
    assert projecting == counted + heads
    assert projecting >= generator_macs(settings, vision, language)


def test_attention_implementations_compute_the_same_and_fused_kernels_hide_it() -> None:
    shape, ids = language_shape(LLAMA.to_dict()), torch.arange(23).unsqueeze(0)
    model = LlamaForCausalLM._from_config(LLAMA, attn_implementation="sdpa")
    assert shape.prefill(23, logits=23) == pytest.approx(counted_macs(lambda: model(ids)), rel=1e-3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids)
    seen, attention = counter.get_total_flops() / 2, 23**2 * shape.attention
    # What the counter sees of the CPU's fused kernel is none of it, or all in a PyTorch that has learned to.
    parts = (shape.prefill(23, logits=23) - attention, shape.prefill(23, logits=23))
    assert any(seen == pytest.approx(part, rel=1e-3) for part in parts)


def test_bytes_are_those_of_real_models(real: tuple[Shape, Calls]) -> None:
    shape, calls = real
    found = compare(shape, Question(TEXT, dtype="float32"))["models"]
    live = calls.image_facts(TEXT, shape.patches)
    assert found["llava"]["bytes"]["image"] == live["llava"]["cache"]
    for name, model in calls.models.pictured.items():
        if name != "llava":
            assert live[name]["cache"] == 0
            assert found[name]["bytes"]["image"] == live[name]["weights"]
        sizes = found[name]["bytes"]
        weights = sum(sizes[part] for part in ("language", "vision", "connector"))
        parts = [*model.parameters(), *calls.models.tower.parameters()]
        assert weights == 4 * sum(p.numel() for p in {id(p): p for p in parts}.values())
    # What a prompt leaves in the cache, two times heads x head width for each layer and token.
    layers, kv = shape.language["num_hidden_layers"], shape.language["num_key_value_heads"]
    head = shape.language["hidden_size"] // shape.language["num_attention_heads"]
    assert found["vlora"]["bytes"]["text"] == 4 * 2 * layers * kv * head * TEXT


def test_a_merge_keeps_the_old_weights_and_saves_the_low_rank_paths() -> None:
    shape, question = SHAPES["7b"], Question(text_tokens=64, answer_tokens=3, merged=True)
    models = compare(shape, question)["models"]
    found, fast = models["vlora"], models["vlora_fast"]
    # q, k, v, o of 8 layers, 4096 x 4096 each: formed from rank 64, kept aside in float16; m stays beside.
    assert found["flops"]["merge"] == 2 * 32 * 64 * 4096**2
    assert found["bytes"]["aside"] == 2 * 32 * 4096**2 == 2**30
    assert found["flops"]["low_rank"] == 64 * found["flops"]["decode_low_rank"]
    assert found["flops"]["decode_low_rank"] == 2 * 8 * 64 * 2 * 4096
    # Fast weights: v and o, width 256; W M first, then by U. Nothing stays beside.
    assert fast["flops"]["merge"] == 2 * 16 * (4096 * 256**2 + 256 * 4096**2)
    assert fast["bytes"]["aside"] == 2 * 16 * 4096**2
    assert fast["flops"]["low_rank"] == fast["flops"]["decode_low_rank"] == 0
    # The answer's second token was read, its third was not.
    assert found["bytes"]["text"] == 2 * 2 * 32 * 4096 * (64 + 2)


def test_fast_weights_at_7b() -> None:
    """By hand: one matrix of 256 x 256 an image, U and W of v and o in 8 layers, 144 vectors of 4 x 4 patches."""
    models = compare(SHAPES["7b"], Question(dtype="bfloat16"))["models"]
    fast, d, h, p = models["vlora_fast"], 256, 4096, 144
    assert fast["bytes"]["image"] == 2 * d * d == 2**17
    assert fast["flops"]["low_rank"] == 64 * 2 * 8 * 2 * d * (h + d + h)
    trunk = p * 1024 * 16 * d + 2 * (p * 12 * d * d + 2 * p * p * d) + p * d + p * d * d
    assert fast["flops"]["connector"] == 2 * trunk
    learned = 2 * 8 * 2 * h * d
    assert learned < fast["bytes"]["connector"] / 2 < learned + 10e6 < 200e6


@pytest.fixture
def toy() -> Iterator[None]:
    toy_generator.register()
    try:
        yield
    finally:
        KINDS.pop(toy_generator.NAME, None)


@pytest.mark.usefixtures("toy")
def test_a_third_kind_of_generator_has_its_column(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = tmp_path / "cost.json"
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["cost", "--json", str(target), "--figure", str(tmp_path / "cost.png")]) == 0
    shown = capsys.readouterr().out
    label = KINDS[toy_generator.NAME].label
    assert f"{label}: vo in 8 of 32 layers, pool_width 8" in shown
    assert len(row(shown, "next token: low-rank")) == 5 + 3
    models = json.loads(target.read_text())["models"]
    assert list(models) == ["llava", "vlora", "vlora_fast", toy_generator.NAME]


@pytest.mark.usefixtures("toy")
def test_a_third_kind_of_generator_is_measured_and_estimated(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = (
        f"bench --projector {toy_generator.NAME} --rounds 1 --steps 2 --batch 1 --out {tmp_path}"
    )
    assert main([*command.split(), "--parts", "prefill,decode,image,memory,visual"]) == 0
    found = json.loads((tmp_path / "tiny-cpu-float32.json").read_text())
    assert f"{toy_generator.NAME}/merged" in found["systems"]
    assert found["memory"]["image"][toy_generator.NAME]["known"] > 0
    command = (
        f"bench train --projector {toy_generator.NAME} --rounds 1 --text-tokens 8 --out {tmp_path}"
    )
    assert main(command.split()) == 0
    assert main("estimate --model 7b --stage frozen".split()) == 0
    assert KINDS[toy_generator.NAME].label.split()[0] in capsys.readouterr().out


# --- the paper's figure ------------------------------------------------------------------------------


def test_every_point_that_was_read_off_the_papers_figure() -> None:
    read = json.loads((Path(__file__).parent / "data" / "figure4.json").read_text())["points"]
    points = {(point.text, point.visual): point for point in figure4()}
    assert len(points) == 33
    for one in read:
        assert points[one["text"], one["visual"]].paper == pytest.approx(one["ratio"], abs=0.01)


def test_the_fitted_formulas_by_hand() -> None:
    (point,) = figure4([576], [32])
    h, d = 4096, 512
    assert point.paper_llava == 32 * (24 * 608 * h**2 + 4 * 608**2 * h)
    text = 32 * (24 * 32 * h**2 + 4 * 32**2 * h)
    generators = 40 * (24 * 576 * d**2 + 4 * 576**2 * d)
    assert point.paper_vlora == text + generators + 2 * 64 * 8 * 12 * h**2 + 32 * 8 * 12 * h**2


def test_the_released_code_beside_the_figure() -> None:
    (point,) = figure4([576], [32])
    llava = answer_cost(CLIP_L_336, VICUNA_7B, 32, None)
    assert point.released_llava == llava.connector + llava.prefill
    assert point.vision == llava.vision
    assert 2 * public_macs(VLoRAConfig(), CLIP_L_336, VICUNA_7B) == pytest.approx(38.2e9, rel=0.01)
    # 381 for the tower, 38 for the generator, 425 and 8228 for the language model, in GFLOPs.
    assert point.with_vision == pytest.approx((381 + 38 + 425) / (381 + 8228), abs=0.002)
    assert point.released < point.with_vision < point.paper


# --- other methods -----------------------------------------------------------------------------------


def published(name: str, text: int, **changes: Any) -> Any:
    found = next(one for one in COMPETITORS if one.name == name)
    return competitor_cost(replace(found, **changes), CLIP_L_336, VICUNA_7B, text)


def test_a_method_that_drops_nothing_costs_what_llava_costs() -> None:
    llava = answer_cost(CLIP_L_336, VICUNA_7B, 40, None)
    for same in (Competitor("all", ""), Competitor("late", "", prune_after=3, kept=576)):
        assert competitor_cost(same, CLIP_L_336, VICUNA_7B, 40) == llava


def test_fastv_saves_what_its_authors_say() -> None:
    # Their README: 57 % of the language model's FLOPs at K=3 R=50%, for LLaVA-1.5 7B.
    whole = answer_cost(CLIP_L_336, VICUNA_7B, 32, None)
    cost = published("FastV K=3 R=50%", 32)
    assert cost.prefill / whole.prefill == pytest.approx(0.57, abs=0.01)
    # 3 layers keep all 576 tokens, 29 keep 288, of 4096 keys and values each.
    assert cost.image_values == 2 * 4096 * (3 * 576 + 29 * 288)
    assert published("FastV K=2 R=75%", 32).image_values == 2 * 4096 * (2 * 576 + 30 * 144)


def test_llava_mini_costs_what_its_authors_counted() -> None:
    # Table 6 of arXiv 2501.03895, in TFLOPs; with 40 text tokens, which the paper does not state, all fit.
    assert answer_cost(CLIP_L_336, VICUNA_7B, 40, None).first_token == pytest.approx(
        8.55e12, rel=0.02
    )
    for layers, table in ((0, 0.96e12), (1, 1.21e12), (2, 1.46e12), (4, 1.96e12)):
        assert published("LLaVA-Mini", 40, fusion=layers).first_token == pytest.approx(
            table, rel=0.025
        )
    # Table 8: compressing to one and to four tokens costs 2.42 and 2.44 GFLOPs.
    for tokens, table in ((1, 2.42e9), (4, 2.44e9)):
        inside = published("LLaVA-Mini", 40, tokens=tokens, fusion=0).connector
        vision, language = replace(CLIP_L_336, stated=576 + tokens), VICUNA_7B
        assert inside - 2 * projector_macs(vision, language) == pytest.approx(table, abs=0.005e9)
    assert 2 * published("LLaVA-Mini", 40).image_values == 2**19


# --- command -----------------------------------------------------------------------------------------


def row(text: str, name: str) -> list[str]:
    return next(line for line in text.splitlines() if line.strip().startswith(name)).split()


def test_command_prints_all_side_by_side(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "cost.json"
    assert main(f"cost --answer-tokens 100 --json {target}".split()) == 0
    shown = capsys.readouterr().out
    assert "576 patches), 64 text tokens, answer of 100 tokens" in shown
    assert row(shown, "the image")[-5:] == ["288", "20", "0.125", "0.069", "0.000"]
    assert row(shown, "tokens that")[-5:] == ["640", "64", "64", "0.100", "0.100"]
    assert row(shown, "LLaVA-Mini")[1] == "65"
    assert "not measured" in shown
    assert "2 FLOPs per multiply-accumulate" in shown
    result = json.loads(target.read_text())
    models = result["models"]
    cost = answer_cost(CLIP_L_336, VICUNA_7B, 64, VLoRAConfig())
    assert models["vlora"]["flops"]["answer"] == cost.answer(100)
    assert models["llava"]["bytes"]["total"] == sum(models["llava"]["bytes"].values()) / 2


def test_macs_are_half_the_flops(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for flag in ("", "--macs"):
        assert main(["cost", *flag.split()]) == 0
        shown[flag] = capsys.readouterr().out
    both = [float(row(text, "vision tower")[-3]) for text in shown.values()]
    assert both == [381.9, 191.0]
    assert "2 FLOPs" not in shown["--macs"]
    assert re.search(r"^MACs: multiply-accumulates of", shown["--macs"], re.MULTILINE)


def test_the_image_can_have_another_size(capsys: pytest.CaptureFixture[str]) -> None:
    for size in ("--image-size 224", "--image-tokens 256"):
        assert main(["cost", "--model", "13b", *size.split()]) == 0
        shown = capsys.readouterr().out
        assert "image 224 x 224 (256 patches)" in shown
        assert row(shown, "tokens that")[-5:-2] == ["320", "64", "64"]
        assert "Other methods are left out" in shown


def test_a_checkpoint_is_counted_by_its_own_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {**SHAPES["tiny"].language, "model_type": "llava_vlora", **VLoRAConfig().to_keys()}
    config |= {"mm_projector_type": "vlora", "vlora_type": "qv", "vlora_rank": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["cost", "--model", str(tmp_path), "--layers", "1,2"]) == 0
    shown = capsys.readouterr().out
    assert "VLoRA: qv in 2 of 4 layers, dim 512, depth 8, rank 8" in shown
    assert "fast" not in shown
    # Two types, two layers, 256 x 8 numbers of two bytes.
    assert row(shown, "the image")[-2] == "0.01562"


@pytest.mark.parametrize("flags", ["--paper", "", "--macs --merged"])
def test_figures_are_written(
    flags: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "figure.png"
    assert main(["cost", *flags.split(), "--figure", str(target)]) == 0
    assert target.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert ("0.105" in shown) is ("--paper" in flags)
    assert ("kept aside" in shown) is ("--merged" in flags)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--model 70b", "no shape"),
        ("--vision-tower siglip", "--vision-tower"),
        ("--text-tokens 0", "--text-tokens must be at least 1"),
        ("--answer-tokens 0", "--answer-tokens must be at least 1"),
        ("--dtype int8", "'float16', 'bfloat16', 'float32'"),
        ("--image-size 340", "14 pixels"),
        ("--image-size 0", "14 pixels"),
        ("--image-tokens 600", "576 and 625"),
        ("--image-tokens 0", "1 and 4"),
        ("--image-size 336 --image-tokens 576", "one of them"),
        ("--types qx", "'x'"),
        ("--rank 0", "vlora_rank"),
        ("--layers 3,40", "0 to 31"),
        ("--layers all", "3,7,11"),
        ("--layers=", "3,7,11"),
        ("--projector mlp", "'vlora', 'vlora_fast'"),
        ("--projector vlora_fast --rank 8", "has the setting 'rank'"),
        ("--figure cost.pdf", ".png"),
    ],
)
def test_mistakes_are_named(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", *wrong.split()]) == 2
    assert message in capsys.readouterr().err


def test_the_document_shows_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    docs, target = Path(__file__).parents[1] / "docs", tmp_path / "cost.json"
    text = (docs / "cost.md").read_text(encoding="utf-8")
    block = text.partition("<!-- cost:start -->")[2].partition("<!-- cost:end -->")[0]
    command = re.search(r"`llava-vlora (cost [^`]+)`", block)
    assert command is not None
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command[1].split(), "--json", str(target)]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()][:-1]
    assert block.partition("```text\n")[2].partition("\n```")[0].splitlines() == lines
    committed = json.loads((docs / "results" / "cost-7b.json").read_text(encoding="utf-8"))
    now = json.loads(target.read_text())
    same = now.keys() - {"versions", "commit"}
    assert {key: committed[key] for key in same} == {key: now[key] for key in same}

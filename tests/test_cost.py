"""Counted arithmetic against PyTorch's own counter on real modules and against known figures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_vlora.config import VLoRAConfig
from llava_vlora.decoder import DecoderShape, decoder_shape
from llava_vlora.evaluation.cost import (
    CLIP_L_336,
    VICUNA_7B,
    answer_cost,
    generator_macs,
    language_shape,
    low_rank_macs,
    projector_macs,
    vision_shape,
)
from llava_vlora.generator import PerceptualWeightsGenerator
from llava_vlora.injection import seeing

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

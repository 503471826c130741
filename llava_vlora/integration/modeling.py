"""LLaVA's model classes with perceptual weights, one family each."""

from __future__ import annotations

from llava.model.language_model.llava_llama import (
    LlavaConfig,
    LlavaLlamaForCausalLM,
    LlavaLlamaModel,
)
from llava.model.language_model.llava_mistral import (
    LlavaMistralConfig,
    LlavaMistralForCausalLM,
    LlavaMistralModel,
)
from transformers import LlamaForCausalLM, MistralForCausalLM

from .causal import VLoRAMetaForCausalLM
from .meta_model import VLoRAMetaModel


class LlavaVLoRAConfig(LlavaConfig):
    """Configuration of a Llama model with perceptual weights; the public code's ``model_type``."""

    model_type = "llava_vlora"


class LlavaVLoRAMistralConfig(LlavaMistralConfig):
    """Configuration of a Mistral model with perceptual weights."""

    model_type = "llava_vlora_mistral"


class LlavaVLoRALlamaModel(VLoRAMetaModel, LlavaLlamaModel):
    """Llama decoder with vision tower and generator."""

    config_class = LlavaVLoRAConfig


class LlavaVLoRALlamaForCausalLM(VLoRAMetaForCausalLM, LlavaLlamaForCausalLM):
    """LLaVA on Llama or Vicuna with perceptual weights."""

    config_class = LlavaVLoRAConfig
    base_class = LlamaForCausalLM
    model_class = LlavaVLoRALlamaModel


class LlavaVLoRAMistralModel(VLoRAMetaModel, LlavaMistralModel):
    """Mistral decoder with vision tower and generator."""

    config_class = LlavaVLoRAMistralConfig


class LlavaVLoRAMistralForCausalLM(VLoRAMetaForCausalLM, LlavaMistralForCausalLM):
    """LLaVA on Mistral with perceptual weights."""

    config_class = LlavaVLoRAMistralConfig
    base_class = MistralForCausalLM
    model_class = LlavaVLoRAMistralModel

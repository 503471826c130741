"""LLaVA and VLoRA models of any size with random weights, for measurements: no files, no downloads.

All share one language model and one vision tower, tensor by tensor, with the plain language model beside them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from ..config import GeneratorConfig
from ..errors import ConfigError
from .modeling import LlavaVLoRAConfig, LlavaVLoRALlamaForCausalLM
from .registration import register

_NOISE = 2**22
_STD = 0.02
#: Of LLaVA-1.5.
_VISION = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}


@dataclass(frozen=True)
class Models:
    """Models that share their language model and vision tower."""

    text: Any
    """The plain language model."""
    llava: Any
    vlora: Mapping[str, Any]
    """A model for each kind of generator, by its name."""
    tower: Any

    @property
    def pictured(self) -> dict[str, Any]:
        """The models that see images: ``llava``, then the kinds of generators."""
        return {"llava": self.llava, **self.vlora}


def random_models(
    language: LlamaConfig,
    vision: CLIPVisionConfig,
    generators: Mapping[str, GeneratorConfig],
    *,
    device: torch.device,
    dtype: torch.dtype,
    bits: int | None = None,
) -> Models:
    """Build the plain model, LLaVA, and a model for each kind of generator.

    Args:
        language: The language model.
        vision: The vision tower.
        generators: The settings of the generators, by kind.
        device: Where all weights go.
        dtype: Of all weights.
        bits: 8 or 4 quantises the decoder layers as LLaVA's loader does, with bitsandbytes.

    Raises:
        ConfigError: bitsandbytes is not installed, or a generator does not fit the models.
    """
    register()
    text = _random(lambda: LlamaForCausalLM(language), device, dtype)
    # An answer must not end before its length is reached.
    text.generation_config.eos_token_id, text.generation_config.pad_token_id = None, 0
    tower = _tower(vision, device, dtype)
    keys = {
        **language.to_dict(),
        **_VISION,
        "mm_hidden_size": vision.hidden_size,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
    }
    llava = _around(
        text, LlavaLlamaForCausalLM, LlavaConfig(**{**keys, "mm_projector_type": "mlp2x_gelu"})
    )
    llava.model.vision_tower = tower
    llava.model.mm_projector = _random(lambda: build_vision_projector(llava.config), device, dtype)
    patches = (vision.image_size // vision.patch_size) ** 2
    vlora = {}
    for name, settings in generators.items():
        stated = {"mm_projector_type": name, **settings.resolved(patches).to_keys()}
        model = _around(text, LlavaVLoRALlamaForCausalLM, LlavaVLoRAConfig(**{**keys, **stated}))
        model.model.vision_tower = tower
        with torch.device(device):
            model.model.build_generator("The shape")
        model.model.mm_projector = _filled(model.model.mm_projector.to(dtype))
        vlora[name] = model
    if bits is not None:
        _quantise((text, llava, *vlora.values()), bits, dtype)
    return Models(text, llava, vlora, tower)


def _random(make: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """What ``make`` builds, with noise for weights, made where it stays."""
    with init_empty_weights(include_buffers=False):  # rotary frequencies are buffers, made for real
        module = make()
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, device=device, dtype=dtype)
                child._parameters[name] = nn.Parameter(empty, requires_grad=False)
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    return _filled(module.to(device))


def _filled(module: nn.Module) -> nn.Module:
    """The module with noise for weights: one block of it again and again, or 7B would take minutes."""
    module.requires_grad_(False).eval()
    some = next(module.parameters())
    noise = torch.randn(_NOISE, device=some.device).to(some.dtype) * _STD
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2:  # norms and biases
            parameter.data.fill_(1 if name.endswith("weight") else 0)
            continue
        flat = parameter.data.view(-1)
        for part in torch.split(flat, _NOISE):
            part.copy_(noise[: len(part)])
    return module


def _quantise(models: Sequence[Any], bits: int, dtype: torch.dtype) -> None:
    """Put bitsandbytes layers in place of the decoder's linear layers, one for all models."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ConfigError(
            f"{bits} bits need bitsandbytes: pip install 'llava-vlora[quant]' ({error})."
        ) from error
    plain = {n: m for n, m in models[0].model.layers.named_modules() if isinstance(m, nn.Linear)}
    for name, linear in plain.items():
        sizes, device = (linear.in_features, linear.out_features), linear.weight.device
        new: Any
        if bits == 4:
            how = {"quant_type": "nf4", "compress_statistics": True}
            new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=dtype, **how)
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, **how)
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0)
            new.weight = bnb.nn.Int8Params(
                linear.weight.data, requires_grad=False, has_fp16_weights=False
            )
        new = new.to(device).eval()
        parent, _, own = name.rpartition(".")
        for model in models:
            setattr(model.model.layers.get_submodule(parent), own, new)


def _tower(vision: CLIPVisionConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """LLaVA's vision tower around a random CLIP model."""
    with tempfile.TemporaryDirectory() as folder:
        vision.save_pretrained(folder)
        holder = LlavaConfig(**_VISION, mm_vision_tower=folder)
        tower = cast(Any, build_vision_tower(holder, delay_load=True))
    tower.vision_tower = _random(lambda: CLIPVisionModel(vision), device, dtype)
    tower.is_loaded = True
    return tower


def _around(text: Any, model_class: Any, config: Any) -> Any:
    """A model of LLaVA's whose language model is ``text``."""
    with init_empty_weights(include_buffers=False):
        model = model_class(config)
    model.load_state_dict(text.state_dict(), assign=True)
    if getattr(config, "tie_word_embeddings", False):
        model.tie_weights()
    model.generation_config = text.generation_config
    return model.to(text.device).requires_grad_(False).eval()

"""Parameters of LLaVA and VLoRA by name, counted from the sizes in their configurations.

Names are those of ``named_parameters()`` of the real models, so that each tensor can be compared with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..bench.shapes import Shape
from ..decoder import TARGETS
from ..evaluation.cost import LanguageShape, language_shape
from ..generators import KINDS

#: Parameter name -> number of elements.
Counts = dict[str, int]
#: LLaVA's projector.
MLP = "mlp2x_gelu"


def projectors(shape: Shape) -> tuple[str, ...]:
    """What is compared, values of ``--mm_projector_type``: LLaVA's projector and the shape's kinds of generators."""
    return (MLP, *shape.generators)


def projector_label(projector: str) -> str:
    """Its name in tables."""
    return "LLaVA" if projector == MLP else KINDS[projector].label


def language_parameters(config: Mapping[str, Any]) -> Counts:
    """Parameters of a Llama-like language model from its ``config.json``."""
    shape = language_shape(config)
    found = {"model.embed_tokens.weight": shape.vocab * shape.width}
    for i in range(shape.layers):
        layer = f"model.layers.{i}"
        for path, (read, written) in linear_layers(shape).items():
            found[f"{layer}.{path}.weight"] = read * written
            biased = "attention_bias" if path.startswith("self_attn") else "mlp_bias"
            if config.get(biased):
                found[f"{layer}.{path}.bias"] = written
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = shape.width
    found["model.norm.weight"] = shape.width
    if not config.get("tie_word_embeddings"):
        found["lm_head.weight"] = shape.vocab * shape.width
    return found


def linear_layers(shape: LanguageShape) -> dict[str, tuple[int, int]]:
    """Input and output width of the linear layers of a decoder layer, by name."""
    return {TARGETS[letter].path: shape.widths(letter) for letter in "qkvogud"}


def lora_parameters(config: Mapping[str, Any], rank: int) -> Counts:
    """LoRA weights on all linear layers of the decoder layers, where LLaVA's trainer puts them."""
    shape = language_shape(config)
    found = {}
    for i in range(shape.layers):
        for path, (read, written) in linear_layers(shape).items():
            name = f"model.layers.{i}.{path}"
            found[f"{name}.lora_A.default.weight"] = rank * read
            found[f"{name}.lora_B.default.weight"] = rank * written
    return found


def vision_parameters(config: Mapping[str, Any]) -> Counts:
    """Parameters of LLaVA's CLIP vision tower from the tower's ``config.json``."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    patches = (config["image_size"] // config["patch_size"]) ** 2
    model = "model.vision_tower.vision_tower.vision_model"
    found = {
        f"{model}.embeddings.class_embedding": width,
        f"{model}.embeddings.patch_embedding.weight": 3 * config["patch_size"] ** 2 * width,
        f"{model}.embeddings.position_embedding.weight": (patches + 1) * width,
    }
    found |= _norm(f"{model}.pre_layrnorm", width)
    for i in range(config["num_hidden_layers"]):
        layer = f"{model}.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            found |= _linear(f"{layer}.self_attn.{name}", width, width)
        found |= _norm(f"{layer}.layer_norm1", width)
        found |= _linear(f"{layer}.mlp.fc1", width, mlp) | _linear(f"{layer}.mlp.fc2", mlp, width)
        found |= _norm(f"{layer}.layer_norm2", width)
    return found | _norm(f"{model}.post_layernorm", width)


def connector_parameters(shape: Shape, projector: str) -> Counts:
    """Parameters below ``model.mm_projector``.

    Args:
        shape: The models.
        projector: ``mlp2x_gelu`` or one of the shape's kinds of generators.

    Raises:
        ConfigError: The generator's settings do not fit the language model.
    """
    language, visual = language_shape(shape.language), shape.vision["hidden_size"]
    if projector == MLP:
        names = {**_linear("0", visual, language.width), **_linear("2", *[language.width] * 2)}
    else:
        settings = shape.generators[projector]
        widths = language.decoder_shape(settings.types)
        made_by = KINDS[projector].generator
        names = made_by.parameter_counts(settings, widths, visual, shape.patches)
    return {f"model.mm_projector.{name}": count for name, count in names.items()}


def _linear(name: str, read: int, written: int) -> Counts:
    return {f"{name}.weight": read * written, f"{name}.bias": written}


def _norm(name: str, width: int) -> Counts:
    return {f"{name}.weight": width, f"{name}.bias": width}

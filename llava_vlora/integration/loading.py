"""LLaVA's ``load_pretrained_model``, deciding by files and ``config.json`` instead of the model's name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from ..errors import CheckpointError, ConfigError
from .adapter import apply_adapter
from .base_model import other_base
from .checkpoint import (
    NON_LORA_FILE,
    PROJECTOR_FILE,
    Checkpoint,
    inspect_checkpoint,
    load_checked,
    load_projector,
    locate_vision_tower,
    plain_name,
    quantised_as,
    read_json,
    read_tensors,
)
from .frozen import FROZEN_KEY
from .modeling import (
    LlavaVLoRAConfig,
    LlavaVLoRALlamaForCausalLM,
    LlavaVLoRAMistralConfig,
    LlavaVLoRAMistralForCausalLM,
)
from .pruned_training import MASK_KEY

_logger = logging.getLogger("llava_vlora")

Loaded = tuple[Any, Any, Any, int]


def load_pretrained_model(
    model_path: str,
    model_base: str | None,
    model_name: str,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map: Any = "auto",
    device: str = "cuda",
    use_flash_attn: bool = False,
    **kwargs: Any,
) -> Loaded:
    """Load a checkpoint of VLoRA, LLaVA or a plain language model; LLaVA's signature and result.

    ``model_name`` is not looked at. Without a GPU, or with ``device="cpu"``, the model is loaded on the CPU in the
    dtype of its files (float16, which CPUs only emulate, becomes float32). ``torch_dtype`` overrides the dtype.

    Returns:
        Tokenizer, model, image processor (None for a plain language model) and context length in tokens.

    Raises:
        CheckpointError: A file is missing or does not fit; the message names it.
        UnsupportedDecoderError: A VLoRA checkpoint whose language model has no separate projections.
    """
    checkpoint = inspect_checkpoint(model_path)
    if device.startswith("cuda") and not torch.cuda.is_available():
        device = "cpu"
    options = {"low_cpu_mem_usage": True, **kwargs}
    options["device_map"] = device_map if device == "cuda" else {"": device}
    on_gpu = device.startswith("cuda")
    if load_8bit or load_4bit:
        options["quantization_config"] = _quantization(load_4bit)
    dtype = options.setdefault(
        "torch_dtype", torch.float16 if on_gpu else _cpu_dtype(checkpoint, model_base)
    )
    if use_flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    if not checkpoint.multimodal:
        tokenizer, model = _load_text_model(checkpoint, model_base, options)
        return tokenizer, model, None, getattr(model.config, "max_sequence_length", 2048)
    tokenizer, model = _load_multimodal(checkpoint, model_base, options)
    model.eval()
    _add_image_tokens(tokenizer, model)
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    tower.to(device=model.get_input_embeddings().weight.device, dtype=dtype)
    return (
        tokenizer,
        model,
        tower.image_processor,
        getattr(model.config, "max_sequence_length", 2048),
    )


def _load_multimodal(
    checkpoint: Checkpoint, base: str | None, options: dict[str, Any]
) -> tuple[Any, Any]:
    if "mpt" in str(checkpoint.config.get("model_type")):
        return _load_mpt(checkpoint, base, options)
    model_class, config_class = _classes(checkpoint)
    config = locate_vision_tower(config_class.from_pretrained(checkpoint.path), checkpoint.path)
    source = str(checkpoint.path)
    if checkpoint.kind != "full":
        source = checkpoint.base(base)
        config = quantised_as(config, source)
    elif base is not None:
        _logger.warning(
            "%s is a complete checkpoint; the model base %s is not used.", checkpoint.path, base
        )
    _require_tokenizer(source)
    tokenizer = AutoTokenizer.from_pretrained(source, use_fast=False)
    model = load_checked(model_class.from_pretrained, source, config=config, **options)
    if checkpoint.kind == "projector":
        load_projector(
            model.get_model().mm_projector,
            read_tensors(checkpoint.path / PROJECTOR_FILE),
            checkpoint.path,
        )
        _require_same_base(checkpoint, model)
        if MASK_KEY in checkpoint.config:
            _logger.warning(
                "%s was trained on a language model pruned by mask %s; prune %s in the same way, "
                "with apply_mask() or `llava-vlora ima prune-eval --mask`.",
                checkpoint.path,
                checkpoint.config[MASK_KEY],
                source,
            )
    elif checkpoint.kind == "lora":
        model = _merge_lora(checkpoint, model)
    return tokenizer, model


def _require_same_base(checkpoint: Checkpoint, model: Any) -> None:
    """Refuse another language model than a projector was trained beside in stage 2."""
    if checkpoint.config.get(FROZEN_KEY) and MASK_KEY not in checkpoint.config:
        described, advice = checkpoint.config.get("vlora_base"), "give that one as --model-base"
        reason = other_base(model, described, pruned=True, advice=advice)
        if reason:
            raise CheckpointError(f"{checkpoint.path} belongs to another language model: {reason}.")


def _merge_lora(checkpoint: Checkpoint, model: Any) -> Any:
    tensors = read_tensors(checkpoint.path / NON_LORA_FILE)
    load_projector(model.get_model().mm_projector, tensors, checkpoint.path / NON_LORA_FILE)
    rest = {
        plain_name(name): tensor for name, tensor in tensors.items() if "mm_projector." not in name
    }
    unknown = model.load_state_dict(rest, strict=False).unexpected_keys
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path / NON_LORA_FILE} has weights that the model lacks: {unknown[0]!r}."
        )
    return apply_adapter(model, checkpoint.path)


def _load_text_model(
    checkpoint: Checkpoint, base: str | None, options: dict[str, Any]
) -> tuple[Any, Any]:
    source = checkpoint.base(base) if checkpoint.kind != "full" else str(checkpoint.path)
    _require_tokenizer(source)
    tokenizer = AutoTokenizer.from_pretrained(source, use_fast=False)
    model = AutoModelForCausalLM.from_pretrained(source, **options)
    if checkpoint.kind == "lora":
        model = apply_adapter(model, checkpoint.path)
    return tokenizer, model.eval()


def _load_mpt(checkpoint: Checkpoint, base: str | None, options: dict[str, Any]) -> tuple[Any, Any]:
    if checkpoint.vlora:
        raise ConfigError(
            f"{checkpoint.path} asks for VLoRA on MPT, whose attention has one fused projection; "
            "use a Llama or Mistral model."
        )
    from llava.model.language_model.llava_mpt import LlavaMptForCausalLM

    source = str(checkpoint.path) if checkpoint.kind == "full" else checkpoint.base(base)
    config = AutoConfig.from_pretrained(str(checkpoint.path), trust_remote_code=True)
    model = LlavaMptForCausalLM.from_pretrained(source, config=config, **options)
    if checkpoint.kind == "projector":
        load_projector(
            model.get_model().mm_projector,
            read_tensors(checkpoint.path / PROJECTOR_FILE),
            checkpoint.path,
        )
    return AutoTokenizer.from_pretrained(source, use_fast=True), model


def _classes(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Model and config class; Mistral is told by its ``model_type``, everything else is Llama, as in LLaVA."""
    mistral = "mistral" in str(checkpoint.config.get("model_type"))
    if checkpoint.vlora:
        if mistral:
            return LlavaVLoRAMistralForCausalLM, LlavaVLoRAMistralConfig
        return LlavaVLoRALlamaForCausalLM, LlavaVLoRAConfig
    return (
        (LlavaMistralForCausalLM, LlavaMistralConfig)
        if mistral
        else (LlavaLlamaForCausalLM, LlavaConfig)
    )


def _quantization(four_bit: bool) -> BitsAndBytesConfig:
    # The generator and the tower stay as they are: their input is not worth the loss.
    skipped = ["mm_projector", "vision_tower", "lm_head"]
    if not four_bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=torch.float16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=skipped,
    )


def _cpu_dtype(checkpoint: Checkpoint, base: str | None) -> torch.dtype:
    config = checkpoint.config
    if checkpoint.kind != "full" and base is not None and (Path(base) / "config.json").is_file():
        config = read_json(Path(base) / "config.json")
    stored = str(config.get("torch_dtype") or config.get("dtype"))
    return torch.bfloat16 if stored == "bfloat16" else torch.float32


def _require_tokenizer(source: str) -> None:
    folder = Path(source).expanduser()
    names = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            f"{folder} has no tokenizer ({', '.join(names)}); copy the tokenizer files of its language model there."
        )


def _add_image_tokens(tokenizer: Any, model: Any) -> None:
    added = 0
    if getattr(model.config, "mm_use_im_patch_token", True):
        added += tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(model.config, "mm_use_im_start_end", False):
        added += tokenizer.add_tokens(
            [DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True
        )
    if added or len(tokenizer) != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))

"""LLaVA's loader, prompts and image preparation for the rest of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from PIL import Image
from torch import Tensor

from ..errors import ConfigError, ImageError, listing
from .loading import load_pretrained_model
from .registration import register


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer."""

    tokenizer: Any
    model: Any
    image_processor: Any
    """None for a plain language model."""
    context_len: int
    """Tokens."""


def load(
    path: str,
    base: str | None = None,
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
) -> Loaded:
    """Load a VLoRA, LLaVA or plain checkpoint.

    Args:
        path: Checkpoint folder.
        base: Language model, for a folder that holds only a projector or LoRA weights.
        device: ``cuda`` or ``cpu``; the GPU if there is one by default.
        dtype: Of the weights; by default float16 on a GPU, the checkpoint's on a CPU.
        bits: 4 or 8 to quantise the language model with bitsandbytes.

    Raises:
        CheckpointError: A file is missing or does not fit.
    """
    register()
    options: dict[str, Any] = {} if dtype is None else {"torch_dtype": dtype}
    return Loaded(
        *load_pretrained_model(
            path, base, "", bits == 8, bits == 4, device=device or "cuda", **options
        )
    )


def prompt_ids(
    loaded: Loaded,
    question: str,
    *,
    conv_mode: str = "vicuna_v1",
    image: bool = True,
    answer: str | None = None,
) -> Tensor:
    """Token ids ``[N]`` of one question in LLaVA's prompt, with -200 where the image goes.

    Args:
        loaded: The model.
        question: What is asked.
        conv_mode: LLaVA's conversation template.
        image: Put a slot for the image before the question.
        answer: Ends the prompt, with what ends an answer in the template; None leaves it to the model.

    Raises:
        ConfigError: LLaVA has no such conversation template.
    """
    message = f"{image_slot(loaded)}\n{question}" if image else question
    return _ids(_template(conv_mode), [(message, answer)], loaded.tokenizer)


def conversation_ids(
    loaded: Loaded, turns: Sequence[tuple[str, str | None]], *, conv_mode: str = "vicuna_v1"
) -> Tensor:
    """Token ids ``[N]`` of a conversation about one image, which the first question shows as -200.

    Args:
        loaded: The model that is to answer.
        turns: Questions with their answers; the last answer is None.
        conv_mode: LLaVA's conversation template.

    Raises:
        ConfigError: LLaVA has no such conversation template.
    """
    (first, answer), *later = turns
    shown = [(f"{image_slot(loaded)}\n{first}", answer), *later]
    return _ids(_template(conv_mode), shown, loaded.tokenizer)


def image_slot(loaded: Loaded) -> str:
    """Where the image goes, as LLaVA's evaluators write it for this model."""
    slot: str = DEFAULT_IMAGE_TOKEN
    if getattr(loaded.model.config, "mm_use_im_start_end", False):
        slot = f"{DEFAULT_IM_START_TOKEN}{slot}{DEFAULT_IM_END_TOKEN}"
    return slot


def stop_text(conv_mode: str) -> str:
    """What ends an answer in one of LLaVA's conversation templates, such as ``</s>``.

    Raises:
        ConfigError: LLaVA has no such conversation template.
    """
    template = _template(conv_mode)
    two = template.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
    return str(template.sep2 if two else template.sep)


def _template(conv_mode: str) -> Conversation:
    if conv_mode not in conv_templates:
        raise ConfigError(
            f"Conversation template {conv_mode!r} is unknown; LLaVA has {listing(conv_templates)}."
        )
    return conv_templates[conv_mode].copy()


def _ids(template: Conversation, turns: Sequence[tuple[str, str | None]], tokenizer: Any) -> Tensor:
    for question, answer in turns:
        template.append_message(template.roles[0], question)
        template.append_message(template.roles[1], answer)
    ids: Tensor = tokenizer_image_token(template.get_prompt(), tokenizer, return_tensors="pt")
    return ids


def plain_llm(model: Any) -> Any:
    """The language model inside a VLoRA model, as transformers' own class; the weights are shared."""
    known = model.base_class.config_class
    keys = known().to_dict().keys() - {"model_type", "architectures"}
    config = known(**{k: v for k, v in model.config.to_dict().items() if k in keys})
    with init_empty_weights():  # buffers, such as rotary frequencies, are made for real
        llm = model.base_class(config)
    names = llm.state_dict().keys()
    own = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    llm.load_state_dict(own, assign=True)
    llm.generation_config = model.generation_config
    return llm.eval()


def pixel_values(images: Sequence[Image.Image], loaded: Loaded) -> Tensor:
    """Images as the vision tower reads them: ``[B, 3, H, W]`` on the model's device and in its dtype."""
    if loaded.image_processor is None:
        raise ImageError("This model reads no images: it is a plain language model.")
    batch = process_images(
        [image.convert("RGB") for image in images], loaded.image_processor, loaded.model.config
    )
    batch = torch.stack(list(batch)) if isinstance(batch, list) else torch.as_tensor(batch)
    return batch.to(device=loaded.model.device, dtype=loaded.model.dtype)

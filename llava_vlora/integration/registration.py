"""Making LLaVA know the architecture."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import llava.model.builder
from transformers import AutoConfig, AutoModelForCausalLM

from . import compat
from .loading import load_pretrained_model
from .modeling import (
    LlavaVLoRAConfig,
    LlavaVLoRALlamaForCausalLM,
    LlavaVLoRAMistralConfig,
    LlavaVLoRAMistralForCausalLM,
)


@dataclass(frozen=True)
class Registration:
    """What :func:`register` did."""

    shims: tuple[str, ...]
    """Shims of :mod:`llava_vlora.integration.compat` that the installed versions need."""
    training: str | None
    """Why LLaVA's trainer cannot be imported here; ``None`` if it can."""


_DONE: list[Registration] = []


def register() -> Registration:
    """Teach the installed LLaVA the projector type ``vlora``. Calling it again does nothing.

    Afterwards LLaVA's trainer, loader, evaluators and servers work with VLoRA models, and transformers'
    ``AutoConfig`` and ``AutoModelForCausalLM`` know them. Models with another projector are not affected.
    """
    if not _DONE:
        for config, model in (
            (LlavaVLoRAConfig, LlavaVLoRALlamaForCausalLM),
            (LlavaVLoRAMistralConfig, LlavaVLoRAMistralForCausalLM),
        ):
            AutoConfig.register(config.model_type, config)
            AutoModelForCausalLM.register(config, model)
        shims = compat.apply_model_shims()
        _replace_loader()
        problem = None
        try:
            shims += compat.apply_training_shims()
        except ImportError as error:  # inference works without what training imports
            problem = f"{type(error).__name__}: {error}"
        else:
            from llava.train import train

            from .training import patch_training

            patch_training(train)
        _DONE.append(Registration(tuple(shims), problem))
    return _DONE[0]


def _replace_loader() -> None:
    # Evaluators bind the function by name when they are imported, so those already there are updated too.
    name, stock = "load_pretrained_model", llava.model.builder.load_pretrained_model
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] in ("llava", "__main__") and getattr(module, name, None) is stock:
            setattr(module, name, load_pretrained_model)

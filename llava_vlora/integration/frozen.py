"""``--vlora_freeze_llm``: stage 2 trains the generator, or LLaVA's projector, and leaves the language model alone.

What is saved is the projector, as in stage 1; the language model stays the file that it was, so its answers to text do
too. Works for LLaVA's projectors as it does for generators. Beside ``--lora_enable`` the adapter trains as well.
"""

from __future__ import annotations

import copy
from typing import Any

from ..errors import ConfigError

#: Key of ``config.json``: the projector was trained on conversations beside a language model that nothing trained.
FROZEN_KEY = "vlora_freeze_llm"


def frozen_alone(model: Any, training: Any) -> bool:
    """Whether a run trains the projector alone by ``--vlora_freeze_llm``.

    Args:
        model: LLaVA's model arguments, or None.
        training: LLaVA's training arguments, or None.
    """
    asked = bool(getattr(model, "vlora_freeze_llm", False))
    return asked and not getattr(training, "lora_enable", False)


def contradictions_of_frozen(model: Any, training: Any) -> tuple[tuple[bool, str], ...]:
    """What speaks against ``--vlora_freeze_llm`` in LLaVA's arguments: whether it is so, and what to say."""
    if not getattr(model, "vlora_freeze_llm", False):
        return ()
    frozen = "--vlora_freeze_llm True leaves the language model as it is"
    alone = frozen_alone(model, training)
    grows = "adds tokens to it, which nothing would train or save"
    return (
        (
            model.tune_mm_mlp_adapter,
            f"{frozen} in stage 2, --tune_mm_mlp_adapter True does so in stage 1",
        ),
        (
            alone and training.freeze_mm_mlp_adapter,
            f"{frozen}, --freeze_mm_mlp_adapter True freezes the projector: nothing would be trained",
        ),
        (
            not alone and training.lora_bias != "none",
            f"{frozen}, --lora_bias {training.lora_bias} trains its biases",
        ),
        (
            model.vision_tower is None,
            f"{frozen}, and without --vision_tower there is nothing else to train",
        ),
        (
            alone and model.mm_projector_type == "identity",
            f"{frozen}, and --mm_projector_type identity has nothing to train",
        ),
        (
            alone and model.mm_use_im_start_end,
            f"{frozen}, --mm_use_im_start_end True {grows}; give False",
        ),
        (
            alone and model.mm_use_im_patch_token,
            f"{frozen}, --mm_use_im_patch_token True, LLaVA's default, {grows}; give False",
        ),
    )


def freeze_all_but_projector(model: Any) -> None:
    """Let the projector alone have gradients.

    Raises:
        ConfigError: The model has none.
    """
    projector = getattr(model.get_model(), "mm_projector", None)
    if projector is None or not any(True for _ in projector.parameters()):
        raise ConfigError("--vlora_freeze_llm True: the model has no projector that could train.")
    model.requires_grad_(False)
    projector.requires_grad_(True)
    setattr(model.config, FROZEN_KEY, True)


def saving_projector(training: Any) -> Any:
    """A copy of LLaVA's training arguments by which its saving writes the projector alone, as in stage 1."""
    changed = copy.copy(training)
    changed.tune_mm_mlp_adapter = True
    return changed

"""``--vlora_prune_mask``: retrain the projector alone on a pruned language model.

arXiv 2405.16700, section 6, calls it repair. Works for all projectors of LLaVA.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from ..errors import ConfigError
from ..ima.masks import MaskSet
from ..ima.pruning import prune
from .checkpoint import inspect_checkpoint

#: Key of ``config.json`` with the digest of the mask that the language model had while its projector was trained.
MASK_KEY = "trained_with_mask"


def check_prune_flag(arguments: Any) -> None:
    """Refuse ``--vlora_prune_mask`` where LLaVA's trainer would not apply it.

    Raises:
        ConfigError: The model has no vision tower, or LLaVA takes it for an MPT model.
        CheckpointError: The file is missing or is no mask.
    """
    file = arguments.vlora_prune_mask
    if file is None:
        return
    if arguments.vision_tower is None:
        raise ConfigError(
            f"--vlora_prune_mask {file} needs --vision_tower: there is no projector to train without one."
        )
    if "mpt" in arguments.model_name_or_path:
        raise ConfigError(
            f"LLaVA's trainer takes {arguments.model_name_or_path!r} for an MPT model, because its path has 'mpt' in "
            f"it; --vlora_prune_mask {file} is for Llama and Mistral models."
        )
    MaskSet.load(file)


def mask_of_training(path: str) -> str | None:
    """Digest of the mask of the language model that a projector was trained on; None where it was dense.

    Full checkpoints have none: their language model is in them.

    Raises:
        CheckpointError: The folder holds no checkpoint.
    """
    checkpoint = inspect_checkpoint(path)
    return checkpoint.config.get(MASK_KEY) if checkpoint.kind == "projector" else None


def other_mask(trained: str | None, mask: str | None) -> str | None:
    """What to say where a projector answers on another language model than it was trained on.

    Args:
        trained: What :func:`mask_of_training` gives.
        mask: Digest of the mask that the language model has now; None where it is dense.
    """
    if trained in (None, mask):
        return None
    now = "this is the dense one" if mask is None else f"this one is pruned by mask {mask}"
    return f"the projector was trained on a language model pruned by mask {trained}; {now}."


def prune_for_training(model: Any, file: str | None) -> Any:
    """The model, pruned if there is a mask, which its config then names.

    Raises:
        IMAError: The mask is of another model.
    """
    if file is not None:
        mask = MaskSet.load(file)
        prune(model, mask)
        setattr(model.config, MASK_KEY, mask.digest)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(
                f"llava_vlora: {mask.sparsity:.1%} of the weights in decoder blocks are zero, by {file}",
                file=sys.stderr,
            )
    return model

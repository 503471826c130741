"""LLaVA's own call, for a VLoRA or LLaVA model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from ..integration.api import Loaded, pixel_values


def generate(
    loaded: Loaded, ids: Tensor, images: Sequence[Image.Image] | None, **options: object
) -> Tensor:
    """LLaVA's own call, greedy unless the options say otherwise.

    Args:
        loaded: The model.
        ids: Prompts of one length ``[B, N]``, with -200 where the image stands.
        images: One for each prompt, or None for prompts without an image.
        options: Further options of transformers' ``generate``.

    Returns:
        New tokens ``[B, M]``; transformers 4.37 puts a BOS token before them.
    """
    pixels = None if images is None else pixel_values(images, loaded)
    if hasattr(loaded.model, "vlora_config"):
        # One path whatever the batch, so that answers and costs do not depend on how questions are grouped.
        options = {"vlora_path": "batched", **options}
    result: Tensor = loaded.model.generate(
        ids.to(loaded.model.device),
        images=pixels,
        image_sizes=None if images is None else [image.size for image in images],
        attention_mask=torch.ones_like(ids, device=loaded.model.device),
        pad_token_id=loaded.tokenizer.pad_token_id,
        **{"do_sample": False, "use_cache": True, **options},
    )
    # A plain language model returns the prompt as well.
    return result[:, ids.shape[1] :] if loaded.image_processor is None else result

"""Greedy answers of a VLoRA or LLaVA model to the questions of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError, ImageError
from ..images import open_image
from ..integration.api import Loaded, pixel_values, prompt_ids
from .files import Question


def open_images(names: Sequence[str], folder: Path) -> list[Image.Image]:
    """Images of a folder as RGB.

    Raises:
        DataError: A file is missing or is no image.
    """
    try:
        return [open_image(folder / name) for name in names]
    except ImageError as error:
        raise DataError(str(error)) from error


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


def answer(
    loaded: Loaded,
    questions: Sequence[Question],
    image_folder: Path,
    *,
    see: bool = True,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Answer questions in batches of prompts of equal length, so that nothing is ever padded.

    Args:
        loaded: The model.
        questions: What to ask.
        image_folder: Where the questions' images lie.
        see: Show the image. Without, the prompt has no ``<image>`` and the model answers blind.
        batch_size: Largest number of prompts in one call.
        max_new_tokens: Longest answer.
        progress: Called with (answered, all).

    Returns:
        The answers in the order of the questions.
    """
    prompts = [prompt_ids(loaded, q.text, image=see) for q in questions]
    texts = [""] * len(questions)
    done = 0
    for batch in _equal_lengths(prompts, batch_size):
        ids = torch.stack([prompts[i] for i in batch])
        images = open_images([questions[i].image for i in batch], image_folder) if see else None
        tokens = generate(loaded, ids, images, max_new_tokens=max_new_tokens)
        decoded = loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for i, text in zip(batch, decoded, strict=True):
            texts[i] = text.strip()
        done += len(batch)
        if progress is not None:
            progress(done, len(questions))
    return texts


def _equal_lengths(prompts: Sequence[Tensor], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts of one length, at most ``batch_size`` at a time."""
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]

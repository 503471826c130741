"""Image tensors as LLaVA passes them, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ImageError

#: Images ``[B, 3, H, W]``, or a list of ``[3, H, W]``.
Images = Tensor | Sequence[Tensor]


def image_batch(images: Images, size: int) -> Tensor:
    """One tensor ``[B, 3, size, size]`` from the forms that LLaVA's callers use.

    Args:
        images: ``[B, 3, H, W]``, a single ``[3, H, W]``, ``[B, 1, 3, H, W]``, or a list of ``[3, H, W]`` or
            ``[1, 3, H, W]``.
        size: Side in pixels that the vision tower expects.

    Raises:
        ImageError: An image has another size, or comes in several tiles (anyres).
    """
    parts = list(images) if isinstance(images, Tensor) and images.ndim > 3 else images
    parts = [parts] if isinstance(parts, Tensor) else list(parts)
    if not parts:
        raise ImageError("No image was given: the list of images is empty.")
    flat = []
    for i, image in enumerate(parts):
        if image.ndim == 4 and image.shape[0] != 1:
            raise ImageError(
                f"Image {i} has {image.shape[0]} tiles (anyres). A VLoRA model reads one grid of patches an image: "
                "set image_aspect_ratio to 'pad' or 'square'."
            )
        image = image[0] if image.ndim == 4 else image
        if image.shape != (3, size, size):
            raise ImageError(
                f"Image {i} has shape {tuple(image.shape)}, but the vision tower reads (3, {size}, {size}); "
                "prepare images with the model's own image processor (process_images)."
            )
        flat.append(image)
    return torch.stack(flat)


def are_features(images: object) -> bool:
    """Whether images are stored features ``[B, 1, V, C]`` (V patches of width C), told by the single channel."""
    return isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 1

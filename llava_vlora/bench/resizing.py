"""A generator of a model as it would be for images of another size."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ..decoder import decoder_shape
from ..generators import Generator


def for_patches(generator: Generator, model: Any, patches: int) -> Generator:
    """The same generator for another number of patches.

    Weights that do not depend on the number are shared, others are noise.

    Args:
        generator: A generator of any kind.
        model: The model that it belongs to.
        patches: Patches of an image.

    Raises:
        ConfigError: Its kind takes no such number of patches.
    """
    if patches == generator.num_patches:
        return generator
    shape = decoder_shape(model, generator.config.types)
    with init_empty_weights(include_buffers=False):
        other = type(generator)(generator.config, shape, generator.visual_dim, patches)
    like, own = generator.like, dict(generator.named_parameters())
    for path, child in other.named_modules():
        for name, empty in child._parameters.items():
            if empty is None:
                continue
            weight = own.get(f"{path}.{name}" if path else name)
            if weight is None or weight.shape != empty.shape:
                noise = torch.randn(empty.shape, device=like.device).to(like.dtype)
                weight = nn.Parameter(noise, requires_grad=False)
            child._parameters[name] = weight
    return other.to(like.device).train(generator.training)

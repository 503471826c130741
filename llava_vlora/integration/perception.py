"""What an image becomes: the part of a VLoRA model between pixels and perceptual weights."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import injection, merging
from ..cache import PerceptionCache
from ..config import GeneratorConfig
from ..errors import ConfigError, PromptError
from ..generators import Generator
from ..weights import PerceptualWeights
from .images import Images, are_features, image_batch


class VLoRAPerception:
    """Images to perceptual weights, and perceptual weights shown to calls."""

    training: bool
    device: torch.device
    dtype: torch.dtype
    model: Any
    perception_cache: PerceptionCache | None = None
    """Remembers images between calls, if set."""

    def get_model(self) -> Any:
        """The decoder with tower and generator, as LLaVA's code expects."""
        return self.model

    @property
    def generator(self) -> Generator:
        """The generator, LLaVA's ``mm_projector``."""
        generator = getattr(self.model, "mm_projector", None)
        if not isinstance(generator, Generator):
            raise ConfigError(
                "This model has no generator yet: it was loaded from a plain language model."
            )
        return generator

    @property
    def vlora_config(self) -> GeneratorConfig:
        """The settings of the generator."""
        return self.generator.config

    def image_features(self, images: Images) -> Tensor:
        """Patch features ``[B, V, visual_dim]`` of images ``[B, 3, H, W]``.

        Stored features ``[B, 1, V, visual_dim]`` are passed on, whatever the model is called with images for.

        Raises:
            ImageError: The images are not all of the vision tower's size.
        """
        weight = self.generator.like
        if are_features(images):
            return cast(Tensor, images)[:, 0].to(weight.device, weight.dtype)
        tower = self._tower()
        # The tower returns the dtype of the images, which LLaVA's evaluators halve whatever the model is in.
        batch = image_batch(images, tower.config.image_size).to(weight.dtype)
        return cast(Tensor, tower(batch)).to(weight.device)

    def perceive(self, images: Images) -> PerceptualWeights:
        """The perceptual weights of images ``[B, 3, H, W]`` (or a list of ``[3, H, W]``), one row each.

        With a :class:`~llava_vlora.cache.PerceptionCache` in ``perception_cache``, an image that was seen before
        does not run the vision tower again; training and calls that need gradients never use it.
        """
        cache = None if are_features(images) else self.perception_cache
        if cache is not None and not torch.is_grad_enabled():
            tower = self._tower()
            batch = image_batch(images, tower.config.image_size)
            return cache.perceive(batch, self.generator, tower, self.image_features)
        return self.generator(self.image_features(images))

    def encode_images(self, images: Images) -> PerceptualWeights:
        """LLaVA's name for :meth:`perceive`."""
        return self.perceive(images)

    def look(self, images: Images) -> Tensor:
        """Which patches matter: ``[B, T, K, V]`` by weight type, injected layer and patch; rows sum to one."""
        return self.generator.look(self.image_features(images))

    def seeing(self, weights: PerceptualWeights) -> AbstractContextManager[None]:
        """While open, this thread's calls see the images behind ``weights``."""
        return injection.seeing(cast(nn.Module, self), weights)

    def merged(self, weights: PerceptualWeights) -> AbstractContextManager[None]:
        """While open, the one image behind ``weights`` is part of the weights; see :func:`llava_vlora.merged`."""
        return merging.merged(cast(nn.Module, self), weights)

    def _weights_for(self, images: Images, has_image: Tensor) -> PerceptualWeights | None:
        """Weights for a batch whose rows ``has_image [B]`` see an image; None where nothing is to be added.

        Only images that a row shows are encoded. In training at least one is, so that on every rank each
        parameter of the generator takes part.
        """
        images = images[None] if isinstance(images, Tensor) and images.ndim == 3 else images
        rows, size = has_image.nonzero().flatten(), len(has_image)
        if len(images) not in (size, len(rows)):
            raise PromptError(
                f"{len(images)} images for {size} prompts, of which {len(rows)} have an <image>; "
                "give one image for each prompt or for each <image>."
            )
        if not len(rows) and not self._trains():
            return None
        if len(rows) < len(images):
            chosen = rows.tolist() or [0]
            images = images[chosen] if isinstance(images, Tensor) else [images[i] for i in chosen]
        weights = self.perceive(images)
        if len(rows) == size:
            return weights
        return weights.scatter(rows, size) if len(rows) else weights.mask(has_image[:1])

    def _trains(self) -> bool:
        generator = getattr(self.model, "mm_projector", None)
        return (
            self.training
            and torch.is_grad_enabled()
            and generator is not None
            and any(p.requires_grad for p in generator.parameters())
        )

    def _tower(self) -> Any:
        """LLaVA's vision tower, loaded."""
        tower = cast(Any, self).get_vision_tower()
        if not tower.is_loaded:
            tower.load_model()
            tower.to(device=self.device, dtype=self.dtype)
        return tower

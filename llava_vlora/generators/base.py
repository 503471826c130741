"""What a generator of perceptual weights is. A new kind is one subclass in one file and one row in the registry.

Shapes: B images, V patches, T weight types, K injected layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import GeneratorConfig
from ..decoder import DecoderShape
from ..errors import ConfigError, ImageError
from ..weights import PerceptualWeights

#: What ``forward`` returns: tensors in plain containers.
Bare = dict[str, tuple[Tensor, ...]]


class Generator(nn.Module, ABC):
    """Patch features of an image -> perceptual weights.

    A subclass is built as ``(config, shape, visual_dim, num_patches)`` and defines :meth:`latents`, :meth:`expand`
    and :meth:`look`, and the class methods that tell its sizes and costs without building it. Its parameters are read
    inside a module's ``forward`` (ZeRO-3 gathers them there), and no name of theirs contains ``lora_``.
    """

    config: GeneratorConfig
    layers: tuple[int, ...]
    """Injected decoder layers, counted from zero."""
    num_patches: int
    """Patches of an image."""
    visual_dim: int
    """Width of a patch's features."""
    caches_rank: ClassVar[bool] = False
    """Whether latents can be shortened to a rank, see :meth:`shorten`."""

    def __init__(
        self, config: GeneratorConfig, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> None:
        """Build the generator for a decoder of ``shape`` and a vision tower.

        Args:
            config: Settings.
            shape: Widths of the decoder's linear layers, for each letter of ``config.types``.
            visual_dim: Width of the patch features.
            num_patches: Patches of an image.

        Raises:
            ConfigError: The injected layers do not fit the decoder.
        """
        super().__init__()
        self.config, self.layers = config, config.layers(shape.num_layers)
        self.num_patches, self.visual_dim = num_patches, visual_dim

    def __call__(self, features: Tensor) -> PerceptualWeights:
        """Patch features ``[B, V, visual_dim]`` -> the weights of B images."""
        return self.pack(super().__call__(features))

    def forward(self, features: Tensor) -> Bare:
        """The weights as bare tensors, because ZeRO-3's module hooks look into no other class."""
        return self.expand(self.latents(features)).bare()

    def pack(self, bare: Bare) -> PerceptualWeights:
        """The weights behind what :meth:`forward` returned."""
        return PerceptualWeights.from_bare(bare, self.layers)

    @abstractmethod
    def latents(self, features: Tensor) -> dict[str, Tensor]:
        """The image in its smallest form, rows first; what a cache keeps.

        Raises:
            ImageError: The features have another width or patch count than the generator was built for.
        """

    @abstractmethod
    def expand(self, latents: Mapping[str, Tensor]) -> PerceptualWeights:
        """The weights behind latents."""

    @abstractmethod
    def look(self, features: Tensor) -> Tensor:
        """Which patches matter: ``[B, T, K, V]``, each row sums to one."""

    def shorten(self, latents: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], Tensor]:
        """Latents of a lower rank, and the share ``[B]`` of the sum of squares that is lost with it.

        Raises:
            ConfigError: The latents of this kind have no rank.
        """
        raise ConfigError(
            f"The latents of {self.config.kind!r} have no rank to cut; leave the rank out."
        )

    @property
    def like(self) -> Tensor:
        """A weight that tells the dtype and device to which features are moved."""
        return next(self.parameters())

    def checked(self, features: Tensor) -> Tensor:
        """Features in the dtype of the generator.

        Raises:
            ImageError: They have another width or patch count than the generator was built for.
        """
        if features.ndim != 3 or features.shape[1:] != (self.num_patches, self.visual_dim):
            raise ImageError(
                f"Image features have shape {tuple(features.shape)}; the generator was built for "
                f"[images, {self.num_patches} patches, {self.visual_dim}]. Use the vision tower and the image "
                "size that the model was trained with."
            )
        return features.to(self.like.dtype)

    # --- sizes and costs, without building anything ----------------------------------------------------

    @classmethod
    @abstractmethod
    def parameter_counts(
        cls, config: Any, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> dict[str, int]:
        """Parameters by the names of ``named_parameters()``."""

    @classmethod
    @abstractmethod
    def macs(cls, config: Any, shape: DecoderShape, visual_dim: int, num_patches: int) -> int:
        """Multiply-accumulates of one image, from patch features to weights."""

    @classmethod
    @abstractmethod
    def token_macs(cls, config: Any, shape: DecoderShape, types: str) -> int:
        """Multiply-accumulates that the weights of ``types`` add to a token when applied beside the model."""

    @classmethod
    @abstractmethod
    def merge_macs(cls, config: Any, shape: DecoderShape, types: str) -> int:
        """Multiply-accumulates of forming the dense differences of ``types`` for one image."""

    @classmethod
    @abstractmethod
    def image_values(cls, config: Any, shape: DecoderShape) -> int:
        """Numbers that differ between images in the weights of one image."""

    @classmethod
    def shared_values(cls, config: Any, shape: DecoderShape) -> int:
        """Numbers in the learned factors that all images share, which decoder layers cast when they compute."""
        return 0

    @classmethod
    @abstractmethod
    def kept_values(
        cls, config: Any, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> int:
        """Numbers that training keeps of one image for the backward pass of the generator, weights left out."""

    @classmethod
    def cast_values(
        cls, config: Any, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> int:
        """Numbers in half precision that autocast keeps of an image besides: casts that no later product finds."""
        return 0

    @classmethod
    @abstractmethod
    def kept_token_values(cls, config: Any, shape: DecoderShape) -> int:
        """Numbers that training keeps of a token for the low-rank paths of one injected layer, inputs left out."""

    # --- for subclasses ---------------------------------------------------------------------------------

    def _owned(self, parameter: Tensor, scale: float = 1.0) -> Tensor:
        """A learned factor as it goes into weights.

        In training at a scale of one it is the parameter itself. Elsewhere it is a copy: weights that are kept must
        not change with the generator.
        """
        itself = self.training and torch.is_grad_enabled() and scale == 1
        return parameter if itself else scale * parameter


def linear_counts(name: str, read: int, written: int) -> dict[str, int]:
    """Parameters of a linear layer with bias."""
    return {f"{name}.weight": read * written, f"{name}.bias": written}


def norm_counts(name: str, width: int) -> dict[str, int]:
    """Parameters of a LayerNorm."""
    return {f"{name}.weight": width, f"{name}.bias": width}

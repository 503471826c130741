"""A third generator, registered from outside the package: the mean of an image's patches, between learned matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llava_vlora.config import GeneratorConfig, setting
from llava_vlora.decoder import DecoderShape
from llava_vlora.generators import KINDS, Generator, Kind
from llava_vlora.generators import register as register_kind
from llava_vlora.weights import Factors, PerceptualWeights

NAME = "mean_pool"
#: What a user puts before LLaVA's trainer or any command.
REGISTER = "from tests import toy_generator; toy_generator.register()\n"


@dataclass(frozen=True)
class MeanPoolConfig(GeneratorConfig):
    """Settings of the toy."""

    kind: ClassVar[str] = NAME
    width: int = setting(8, "vlora_pool_width", "Width of the pooled vector.", shape=True)

    def __post_init__(self) -> None:
        self._whole("width")
        super().__post_init__()


class MeanPoolGenerator(Generator):
    """``delta_W = W diag(v) U^T``, where v is the mean of the patches."""

    config: MeanPoolConfig

    def __init__(
        self, config: MeanPoolConfig, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> None:
        super().__init__(config, shape, visual_dim, num_patches)
        count, width = len(self.layers), config.width
        self.pool = nn.Linear(visual_dim, width)
        self.reads = nn.ParameterDict(
            {t: 0.1 * torch.randn(count, shape.in_features[t], width) for t in config.types}
        )
        self.writes = nn.ParameterDict(
            {t: torch.zeros(count, shape.out_features[t], width) for t in config.types}
        )

    @property
    def like(self) -> Tensor:
        return self.pool.weight

    def latents(self, features: Tensor) -> dict[str, Tensor]:
        return {"mean": self.pool(self.checked(features)).mean(1)}

    def expand(self, latents: Mapping[str, Tensor]) -> PerceptualWeights:
        core = torch.diag_embed(latents["mean"])
        factors = {
            t: Factors(self._owned(self.reads[t]), self._owned(self.writes[t]))
            for t in self.config.types
        }
        present = torch.ones(len(core), dtype=torch.bool, device=core.device)
        return PerceptualWeights(factors, self.layers, present, core)

    def look(self, features: Tensor) -> Tensor:
        sizes = self.pool(self.checked(features)).norm(dim=-1)
        shares = sizes / sizes.sum(-1, keepdim=True)
        shape = (len(self.config.types), len(self.layers))
        return shares[:, None, None].expand(-1, *shape, -1)

    @classmethod
    def parameter_counts(
        cls, config: Any, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> dict[str, int]:
        count, width = len(config.layers(shape.num_layers)), config.width
        found = {"pool.weight": visual_dim * width, "pool.bias": width}
        for t in config.types:
            found[f"reads.{t}"] = count * shape.in_features[t] * width
            found[f"writes.{t}"] = count * shape.out_features[t] * width
        return found

    @classmethod
    def macs(cls, config: Any, shape: DecoderShape, visual_dim: int, num_patches: int) -> int:
        return num_patches * visual_dim * config.width

    @classmethod
    def token_macs(cls, config: Any, shape: DecoderShape, types: str) -> int:
        widths = sum(shape.in_features[t] + config.width + shape.out_features[t] for t in types)
        return len(config.layers(shape.num_layers)) * config.width * widths

    @classmethod
    def merge_macs(cls, config: Any, shape: DecoderShape, types: str) -> int:
        areas = sum(shape.out_features[t] * (config.width + shape.in_features[t]) for t in types)
        return len(config.layers(shape.num_layers)) * config.width * areas

    @classmethod
    def image_values(cls, config: Any, shape: DecoderShape) -> int:
        return config.width**2

    @classmethod
    def kept_values(
        cls, config: Any, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> int:
        return num_patches * visual_dim

    @classmethod
    def kept_token_values(cls, config: Any, shape: DecoderShape) -> int:
        return 2 * config.width * len(config.types)


def register() -> None:
    """Add the toy to the registry, once in a process."""
    if NAME not in KINDS:
        register_kind(Kind(NAME, "Mean pool", MeanPoolConfig, MeanPoolGenerator))

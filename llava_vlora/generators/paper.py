"""The paper's generator: patch features of an image -> perceptual weights (paper section 3.2, Fig. 3).

Parameter names and arithmetic are those of the public VLoRA checkpoints, so that these load unchanged.
Knows nothing about language models beyond the widths in :class:`~llava_vlora.decoder.DecoderShape`.

Shapes: B images, V patches, D generator width, T weight types, K injected layers, R rank, I/O input and
output width of a weight type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import VLoRAConfig
from ..decoder import TARGETS, DecoderShape
from ..errors import ConfigError
from ..weights import PerceptualWeights
from .base import Generator, linear_counts, norm_counts

_MLP_RATIO = 4
#: Tensors of ``[B, Q, D]`` that a block keeps for the backward pass: norms, projections and the MLP.
_BLOCK_TENSORS = 21


class CrossAttention(nn.MultiheadAttention):
    """Attention of a few queries to many patches, in the order of products that suits them.

    ``nn.MultiheadAttention`` projects every patch to a key and a value. With fewer queries than patches it takes
    less work to project the queries back to the patches' space, ``q (W_k p) = (q W_k) p``, and to project only what
    was looked up: a quarter of the arithmetic in the paper's setting, and no keys and values to keep for training.
    """

    def forward(  # type: ignore[override]
        self, queries: Tensor, image: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Queries ``[B, Q, D]`` look at patches ``[B, V, D]``; weights ``[B, Q, V]`` (mean over heads) on request."""
        batch, count, dim = queries.shape
        heads, width = self.num_heads, self.head_dim
        if need_weights or count * heads >= dim:
            return super().forward(queries, image, image, need_weights=need_weights)
        to_query, to_key, to_value = cast(Tensor, self.in_proj_weight).chunk(3)
        bias, _, value_bias = cast(Tensor, self.in_proj_bias).chunk(3)
        query = F.linear(queries, to_query, bias).view(batch, count, heads, width)
        # The bias of the keys adds the same to all patches, which softmax does not see.
        back = _by_head(query.permute(2, 0, 1, 3), to_key.view(heads, width, dim))
        back = back.transpose(0, 1).flatten(1, 2)
        seen = F.scaled_dot_product_attention(
            back[:, None], image[:, None], image[:, None], scale=width**-0.5
        )
        seen = seen.view(batch, heads, count, dim).transpose(0, 1)
        value = _by_head(seen, to_value.view(heads, width, dim).mT)
        value = value.permute(1, 2, 0, 3).reshape(batch, count, dim) + value_bias
        return self.out_proj(value), None


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """``x [H, B, Q, I] @ weight [H, I, O]``, with the batch among the rows: broadcast, it would copy the weight."""
    heads, batch, count, _ = x.shape
    return (x.flatten(1, 2) @ weight).view(heads, batch, count, -1)


class DecoderBlock(nn.Module):
    """Pre-norm block: queries attend to each other, then to the image, then an MLP (Fig. 3a)."""

    def __init__(self, dim: int, heads: int) -> None:
        """A block of width ``dim`` with ``heads`` attention heads."""
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.multihead_attn = CrossAttention(dim, heads, batch_first=True)
        self.linear1 = nn.Linear(dim, _MLP_RATIO * dim)
        self.linear2 = nn.Linear(_MLP_RATIO * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self, queries: Tensor, image: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """One step.

        Args:
            queries: ``[B, Q, D]``.
            image: ``[B, V, D]``; enters the cross-attention without a norm, as released.
            need_weights: Also return where the queries looked.

        Returns:
            The new queries ``[B, Q, D]`` and the cross-attention ``[B, Q, V]`` (mean over heads) or None.
        """
        x = self.norm1(queries)
        queries = queries + self.self_attn(x, x, x, need_weights=False)[0]
        x = self.norm2(queries)
        seen, attention = self.multihead_attn(x, image, need_weights)
        queries = queries + seen
        x = self.norm3(queries)
        return queries + self.linear2(F.gelu(self.linear1(x))), attention


class SubGenerator(nn.Module):
    """Learned queries, decoder blocks and the shared linear head that spells each query out as a factor."""

    def __init__(self, config: VLoRAConfig, queries: int, width: int) -> None:
        """A sub-generator with ``queries`` learned queries whose factors are ``[width, rank]``."""
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, config.dim))
        self.decoders = nn.ModuleList(
            DecoderBlock(config.dim, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.weights_head = nn.Linear(config.dim, width * config.rank)

    def forward(self, image: Tensor, need_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        """Latents ``[B, Q, D]`` and, on request, attention ``[B, Q, V]`` averaged over blocks and heads."""
        queries, seen = self.queries.expand(image.shape[0], -1, -1), []
        for block in self.decoders:
            queries, attention = block(queries, image, need_weights)
            if attention is not None:
                seen.append(attention)
        return self.norm(queries), torch.stack(seen).mean(0) if seen else None


class PerceptualWeightsGenerator(Generator):
    """Turns the patch features of an image into low-rank weights for a language model.

    One factor of each weight depends on the image, the other (``Bs``) is learned and shared by all images;
    it starts at zero, so an untrained generator leaves the language model unchanged.
    """

    config: VLoRAConfig

    def __init__(
        self, config: VLoRAConfig, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> None:
        """Build the generator for a decoder of ``shape`` and a vision tower.

        Args:
            config: Settings.
            shape: Widths of the decoder's linear layers, for each letter of ``config.types``.
            visual_dim: Width of the patch features.
            num_patches: Patches of an image.

        Raises:
            ConfigError: The injected layers do not fit the decoder, or a single generator
                (``weights_sep False``) would need factors of different widths.
        """
        super().__init__(config, shape, visual_dim, num_patches)
        self.generated_features, self.shared_features = _widths(config, shape)
        k, widths = len(self.layers), list(self.generated_features.values())
        self.visual_proj = nn.Linear(visual_dim, config.dim)
        self.pos_embed = nn.Parameter(torch.randn(1, num_patches, config.dim))
        self.gen: nn.ModuleList | SubGenerator
        if config.separate:
            self.gen = nn.ModuleList(SubGenerator(config, k, width) for width in widths)
        else:
            width = _one_width(self.generated_features)
            self.gen = SubGenerator(config, len(widths) * k, width)
        self._init_linear()
        # Rectangular weights (grouped-query attention) cannot share the public format's single tensor.
        self.square = len({*widths, *self.shared_features.values()}) == 1
        flat = {t: torch.zeros(1, k, n * config.rank) for t, n in self.shared_features.items()}
        self.Bs: nn.Parameter | nn.ParameterDict
        if self.square:
            self.Bs = nn.Parameter(torch.cat(list(flat.values()), dim=1))
        else:
            self.Bs = nn.ParameterDict({t: nn.Parameter(b) for t, b in flat.items()})

    def _init_linear(self) -> None:
        # The public code's scheme: queries and position embeddings keep their unit variance.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def like(self) -> Tensor:
        """The weight that reads the features."""
        return self.visual_proj.weight

    def latents(self, features: Tensor) -> dict[str, Tensor]:
        """The image in its smallest form: for each weight type ``[B, K, D]``.

        Raises:
            ImageError: The features have another width or patch count than the generator was built for.
        """
        return {
            letter: latent
            for letter, (latent, _) in self._run(features, need_weights=False).items()
        }

    def look(self, features: Tensor) -> Tensor:
        """Where the generator looks: cross-attention ``[B, T, K, V]``, mean over blocks and heads; rows sum to one."""
        found = self._run(features, need_weights=True)
        return torch.stack(
            [attention for _, attention in found.values() if attention is not None], dim=1
        )

    def expand(self, latents: Mapping[str, Tensor]) -> PerceptualWeights:
        """Spell latents out as factors (the paper's shared linear layer W_s of Fig. 3b)."""
        factors: dict[str, tuple[Tensor, ...]] = {}
        for i, letter in enumerate(self.config.types):
            latent = latents[letter]
            batch, k, _ = latent.shape
            sub = (
                self.gen if isinstance(self.gen, SubGenerator) else cast(SubGenerator, self.gen[i])
            )
            width = self.generated_features[letter]
            own = sub.weights_head(latent).view(batch, k, width, self.config.rank)
            shared = self._static(i, letter)
            factors[letter] = (own, shared) if TARGETS[letter].generated == "a" else (shared, own)
        return PerceptualWeights.from_bare(factors, self.layers)

    def _static(self, i: int, letter: str) -> Tensor:
        k = len(self.layers)
        flat = (
            self.Bs[:, i * k : (i + 1) * k]
            if isinstance(self.Bs, nn.Parameter)
            else self.Bs[letter]
        )
        shared = flat.view(k, self.shared_features[letter], self.config.rank)
        return self._owned(shared, self.config.scale)

    def _run(self, features: Tensor, need_weights: bool) -> dict[str, tuple[Tensor, Tensor | None]]:
        image = self.visual_proj(self.checked(features)) + self.pos_embed
        if isinstance(self.gen, nn.ModuleList):
            return {
                t: sub(image, need_weights)
                for t, sub in zip(self.config.types, self.gen, strict=True)
            }
        latent, attention = self.gen(image, need_weights)
        k, count = len(self.layers), len(self.config.types)
        parts = latent.split(k, dim=1)
        looks = attention.split(k, dim=1) if attention is not None else (None,) * count
        return {t: (parts[i], looks[i]) for i, t in enumerate(self.config.types)}

    # --- sizes and costs --------------------------------------------------------------------------------

    @classmethod
    def parameter_counts(
        cls, config: VLoRAConfig, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> dict[str, int]:
        """Parameters by name."""
        dim, rank, injected = config.dim, config.rank, len(config.layers(shape.num_layers))
        generated, shared = _widths(config, shape)
        found = {"pos_embed": num_patches * dim, **linear_counts("visual_proj", visual_dim, dim)}
        if config.separate:
            for i, width in enumerate(generated.values()):
                found |= dict(_sub_generator(f"gen.{i}", config, injected, width))
        else:
            width = _one_width(generated)
            found |= dict(_sub_generator("gen", config, injected * len(generated), width))
        if len({*generated.values(), *shared.values()}) == 1:
            return found | {"Bs": sum(shared.values()) * injected * rank}
        return found | {f"Bs.{t}": injected * width * rank for t, width in shared.items()}

    @classmethod
    def macs(
        cls,
        config: VLoRAConfig,
        shape: DecoderShape,
        visual_dim: int,
        num_patches: int,
        *,
        project: bool = False,
    ) -> int:
        """MACs of one image; ``project`` counts as the public code computes, see :class:`CrossAttention`."""
        dim, injected = config.dim, len(config.layers(shape.num_layers))
        groups = len(config.types) if config.separate else 1
        queries = injected * len(config.types) // groups
        linear = queries * (4 + 4 + 8) * dim**2
        if not project and queries * config.heads < dim:
            look = 2 * queries * config.heads * num_patches * dim
        else:
            look = 2 * (num_patches - queries) * dim**2 + 2 * queries * num_patches * dim
        attention = 2 * queries**2 * dim + look
        heads = dim * cls.image_values(config, shape)
        trunk = groups * config.depth * (linear + attention)
        return num_patches * visual_dim * dim + trunk + heads

    @classmethod
    def token_macs(cls, config: VLoRAConfig, shape: DecoderShape, types: str) -> int:
        """MACs of a token."""
        widths = sum(shape.in_features[t] + shape.out_features[t] for t in types)
        return len(config.layers(shape.num_layers)) * config.rank * widths

    @classmethod
    def merge_macs(cls, config: VLoRAConfig, shape: DecoderShape, types: str) -> int:
        """MACs of a merge (paper equation 4)."""
        areas = sum(shape.in_features[t] * shape.out_features[t] for t in types)
        return len(config.layers(shape.num_layers)) * config.rank * areas

    @classmethod
    def image_values(cls, config: VLoRAConfig, shape: DecoderShape) -> int:
        """Numbers in the generated factors."""
        generated, _ = _widths(config, shape)
        return len(config.layers(shape.num_layers)) * config.rank * sum(generated.values())

    @classmethod
    def shared_values(cls, config: VLoRAConfig, shape: DecoderShape) -> int:
        """Numbers in the learned factors."""
        _, shared = _widths(config, shape)
        return len(config.layers(shape.num_layers)) * config.rank * sum(shared.values())

    @classmethod
    def kept_values(
        cls, config: VLoRAConfig, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> int:
        """Numbers kept of an image."""
        dim, types = config.dim, len(config.types)
        groups = types if config.separate else 1
        queries = len(config.layers(shape.num_layers)) * types // groups
        block = _BLOCK_TENSORS * queries * dim
        if queries * config.heads < dim:  # see CrossAttention: patches are not projected
            block += 2 * config.heads * queries * dim
        else:
            block += 2 * num_patches * dim
        return num_patches * (visual_dim + dim) + groups * config.depth * block

    @classmethod
    def cast_values(
        cls, config: VLoRAConfig, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> int:
        """Every block casts the patches anew."""
        groups = len(config.types) if config.separate else 1
        return groups * config.depth * num_patches * config.dim

    @classmethod
    def kept_token_values(cls, config: VLoRAConfig, shape: DecoderShape) -> int:
        """Numbers kept of a token in an injected layer."""
        return config.rank * len(config.types)


def _widths(config: VLoRAConfig, shape: DecoderShape) -> tuple[dict[str, int], dict[str, int]]:
    """Width of the generated and of the shared factor, by weight type."""
    sides = {"a": shape.in_features, "b": shape.out_features}
    generated = {t: sides[TARGETS[t].generated][t] for t in config.types}
    shared = {t: sides["ab".replace(TARGETS[t].generated, "")][t] for t in config.types}
    return generated, shared


def _one_width(generated: Mapping[str, int]) -> int:
    """The width that all generated factors have.

    Raises:
        ConfigError: They differ.
    """
    if len(set(generated.values())) > 1:
        raise ConfigError(
            "weights_sep False needs one generated width for all weight types, but they are "
            f"{dict(generated)}; use weights_sep True."
        )
    return next(iter(generated.values()))


def _sub_generator(
    name: str, config: VLoRAConfig, queries: int, width: int
) -> Iterator[tuple[str, int]]:
    dim = config.dim
    yield f"{name}.queries", queries * dim
    for i in range(config.depth):
        block = f"{name}.decoders.{i}"
        for attention in ("self_attn", "multihead_attn"):
            yield f"{block}.{attention}.in_proj_weight", 3 * dim**2
            yield f"{block}.{attention}.in_proj_bias", 3 * dim
            yield from linear_counts(f"{block}.{attention}.out_proj", dim, dim).items()
        yield from linear_counts(f"{block}.linear1", dim, _MLP_RATIO * dim).items()
        yield from linear_counts(f"{block}.linear2", _MLP_RATIO * dim, dim).items()
        for norm in ("norm1", "norm2", "norm3"):
            yield from norm_counts(f"{block}.{norm}", dim).items()
    yield from norm_counts(f"{name}.norm", dim).items()
    yield from linear_counts(f"{name}.weights_head", dim, width * config.rank).items()

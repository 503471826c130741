"""The perceptual weights generator: patch features of an image -> perceptual weights (paper section 3.2, Fig. 3).

Parameter names and arithmetic are those of the public VLoRA checkpoints, so that these load unchanged.
Knows nothing about language models beyond the widths in :class:`~llava_vlora.decoder.DecoderShape`.

Shapes: B images, V patches, D generator width, T weight types, K injected layers, R rank, I/O input and
output width of a weight type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import VLoRAConfig
from .decoder import TARGETS, DecoderShape
from .errors import ConfigError, ImageError
from .weights import Factors, PerceptualWeights

_MLP_RATIO = 4


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


class PerceptualWeightsGenerator(nn.Module):
    """Turns the patch features of an image into low-rank weights for a language model.

    One factor of each weight depends on the image, the other (``Bs``) is learned and shared by all images;
    it starts at zero, so an untrained generator leaves the language model unchanged.
    """

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
        super().__init__()
        self.config = config
        self.layers = config.layers(shape.num_layers)
        self.num_patches, self.visual_dim = num_patches, visual_dim
        sides = {"a": shape.in_features, "b": shape.out_features}
        generated = {t: TARGETS[t].generated for t in config.types}
        self.generated_features = {t: sides[side][t] for t, side in generated.items()}
        self.shared_features = {
            t: sides["ab".replace(side, "")][t] for t, side in generated.items()
        }
        k, widths = len(self.layers), list(self.generated_features.values())
        self.visual_proj = nn.Linear(visual_dim, config.dim)
        self.pos_embed = nn.Parameter(torch.randn(1, num_patches, config.dim))
        self.gen: nn.ModuleList | SubGenerator
        if config.separate:
            self.gen = nn.ModuleList(SubGenerator(config, k, width) for width in widths)
        elif len(set(widths)) == 1:
            self.gen = SubGenerator(config, len(widths) * k, widths[0])
        else:
            raise ConfigError(
                "weights_sep False needs one generated width for all weight types, but they are "
                f"{self.generated_features}; use weights_sep True."
            )
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

    def __call__(self, features: Tensor) -> PerceptualWeights:
        """Patch features ``[B, V, visual_dim]`` -> the weights of B images."""
        return self._pack(super().__call__(features))

    def forward(self, features: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors by weight type: bare tensors, because ZeRO-3's module hooks look into no other class."""
        factors = self.expand(self.latents(features)).factors
        return {letter: (factor.a, factor.b) for letter, factor in factors.items()}

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
        factors: dict[str, tuple[Tensor, Tensor]] = {}
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
        return self._pack(factors)

    def _pack(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> PerceptualWeights:
        some = next(t for pair in factors.values() for t in pair if t.ndim == 4)
        present = torch.ones(len(some), dtype=torch.bool, device=some.device)
        return PerceptualWeights(
            {letter: Factors(a, b) for letter, (a, b) in factors.items()}, self.layers, present
        )

    def _static(self, i: int, letter: str) -> Tensor:
        k = len(self.layers)
        flat = (
            self.Bs[:, i * k : (i + 1) * k]
            if isinstance(self.Bs, nn.Parameter)
            else self.Bs[letter]
        )
        shared = flat.view(k, self.shared_features[letter], self.config.rank)
        # In training at the paper's scale of one, the factor is the parameter itself. Elsewhere it is a copy: weights
        # that are kept must not change with the generator.
        itself = self.training and torch.is_grad_enabled() and self.config.scale == 1
        return shared if itself else self.config.scale * shared

    def _run(self, features: Tensor, need_weights: bool) -> dict[str, tuple[Tensor, Tensor | None]]:
        if features.ndim != 3 or features.shape[1:] != (self.num_patches, self.visual_dim):
            raise ImageError(
                f"Image features have shape {tuple(features.shape)}; the generator was built for "
                f"[images, {self.num_patches} patches, {self.visual_dim}]. Use the vision tower and the image "
                "size that the model was trained with."
            )
        image = self.visual_proj(features.to(self.visual_proj.weight.dtype)) + self.pos_embed
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

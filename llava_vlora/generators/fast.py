"""Fast weights: an image as one matrix, the sum of outer products of what its patches hold.

A language model needs an associative memory of the image: what is bound to what is asked about. A matrix is one, if it
is written as a sum of outer products (Schlag, Irie, Schmidhuber 2021, arXiv 2102.11174). One trunk turns patches into
vectors ``z [P, D]``; for each weight type t and injected layer l two learned matrices read and write, ::

    delta_W[t, l] = scale * W[t, l] (z.T z) U[t, l].T        # [O, I], rank at most min(P, D)

so the whole image is the one symmetric matrix ``scale * z.T z [D, D]``, however many patches there are.

Shapes: B images, V patches, P vectors, D width, K injected layers, I/O input and output width of a weight type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import GeneratorConfig, setting
from ..decoder import DecoderShape
from ..errors import ConfigError, listing
from ..weights import Factors, PerceptualWeights, wide
from .base import Generator, linear_counts, norm_counts

Positions = Literal["grid", "learned"]

_MLP_RATIO = 4
#: Patches from which neighbours are gathered by default: fewer are few enough to hold an object each.
_GATHER_FROM = 64
#: Length of what ``U`` reads from a hidden state whose numbers are of unit size, at the start.
_READ = 2.25
#: ``scale = alpha * _GAIN / (D sqrt(P))``: with Adam, a step of rate lr moves what is written by about
#: ``lr * D * scale * |z|^2 / D`` and P vectors of any sign add up as ``sqrt(P)``, so steps are alike at all P and D.
_GAIN = 100.0


@dataclass(frozen=True)
class FastWeightsConfig(GeneratorConfig):
    """Settings of fast weights and of where they go."""

    kind: ClassVar[str] = "vlora_fast"
    dim: int = setting(256, "vlora_dim", "Width of the generator and of an image.", shape=True)
    """Width D of the trunk and of the matrix that an image is."""
    depth: int = setting(2, "vlora_depth", "Blocks of the generator.", shape=True)
    """Transformer blocks over the vectors."""
    heads: int = setting(8, "vlora_heads", "Attention heads of a block.")
    """Attention heads of a block; divides ``dim``."""
    alpha: float | None = setting(None, "vlora_alpha", "Multiplies the weights (1).")
    """Multiplies all weights; the scale has the width and the number of vectors inside already."""
    window: int | None = setting(
        None, "vlora_window", "Rows and columns of patches that a vector sees.", shape=True
    )
    """Side of the square of patches that a vector is made of; None: twice the stride, or 1 patch."""
    stride: int | None = setting(None, "vlora_stride", "Patches between two vectors.", shape=True)
    """Patches from one vector to the next, in rows and columns; None: 2 from 64 patches on, else 1."""
    gate: bool = setting(True, "vlora_gate", "A learned gate for each vector.", shape=True)
    """Whether vectors can be silent: a LayerNorm alone gives all of them the same length."""
    positions: Positions = setting("grid", "vlora_positions", "grid or learned.", shape=True)
    """``grid``: sine and cosine of row and column. ``learned``: a table that starts small."""

    def __post_init__(self) -> None:
        """Reject settings that cannot work with any model."""
        self._whole("dim", "depth", "heads")
        self._whole(*(name for name in ("window", "stride") if getattr(self, name) is not None))
        super().__post_init__()
        self._divides(self.dim, self.heads)
        self._positive_alpha(self.alpha)
        if self.window is not None and self.window < (self.stride or 1):
            raise ConfigError(
                f"vlora_window {self.window} is smaller than vlora_stride {self.stride}: patches between the windows "
                "would not be seen. Choose a window of at least the stride."
            )
        if not isinstance(self.gate, bool):
            raise ConfigError(f"vlora_gate must be True or False, not {self.gate!r}.")
        if self.positions not in get_args(Positions):
            raise ConfigError(
                f"vlora_positions {self.positions!r} is unknown; valid: {listing(get_args(Positions))}."
            )

    def resolved(self, num_patches: int) -> FastWeightsConfig:
        """The settings with the window and the stride that images of so many patches get."""
        stride = self.stride
        if stride is None:
            stride = 2 if num_patches >= _GATHER_FROM and self.window != 1 else 1
        window = self.window if self.window is not None else (1 if stride == 1 else 2 * stride)
        return replace(self, stride=stride, window=window)


@dataclass(frozen=True)
class Grid:
    """How the patches of an image become vectors."""

    side: int
    """Rows and columns of patches."""
    window: int
    stride: int
    rest: int = 0
    """1 where the tower hands its class token over, which comes first and has no place."""

    @classmethod
    def of(cls, config: FastWeightsConfig, num_patches: int) -> Grid:
        """The grid of ``num_patches`` patches.

        Raises:
            ConfigError: They form no square, with or without a class token.
        """
        settings = config.resolved(num_patches)
        assert settings.window is not None
        assert settings.stride is not None
        side = math.isqrt(num_patches)
        rest = num_patches - side * side
        if rest not in (0, 1) or side < 1:
            raise ConfigError(
                f"{num_patches} patches form no square, with or without a class token; fast weights need to know the "
                "row and column of each patch."
            )
        return cls(side, settings.window, settings.stride, rest)

    @property
    def across(self) -> int:
        """Rows and columns of vectors."""
        return -(-self.side // self.stride)

    @property
    def vectors(self) -> int:
        """Vectors of an image."""
        return self.across**2 + self.rest

    def windows(self, patches: Tensor) -> Tensor:
        """Patches ``[B, side * side, C]`` -> what each vector sees, ``[B, across * across, C * window * window]``.

        Windows are centred on their stride; beyond the edge of the image there are zeros.
        """
        if self.window == 1:
            return patches
        batch, _, width = patches.shape
        before = (self.window - self.stride) // 2
        after = (self.across - 1) * self.stride + self.window - before - self.side
        image = patches.mT.reshape(batch, width, self.side, self.side)
        padded = F.pad(image, (before, after, before, after))
        return F.unfold(padded, self.window, stride=self.stride).mT

    def back(self, shares: Tensor) -> Tensor:
        """What each vector has, ``[..., vectors]``, given to the patches of its stride, ``[..., patches]``."""
        first, cells = torch.split_with_sizes(shares, [self.rest, self.across**2], dim=-1)
        square = cells.reshape(*cells.shape[:-1], self.across, self.across)
        for dim in (-2, -1):
            square = square.repeat_interleave(self.stride, dim=dim)
        square = square[..., : self.side, : self.side]
        square = square / square.sum((-2, -1), keepdim=True) * cells.sum(-1)[..., None, None]
        return torch.cat([first, square.flatten(-2)], dim=-1)


def grid_positions(across: int, dim: int) -> Tensor:
    """Sine and cosine of row and column, ``[across * across, dim]``, each number of unit size.

    Wavelengths run geometrically from 4 vectors to 4 times the side, so that neighbours differ and no two places agree.
    """
    count = -(-dim // 4)
    span = torch.linspace(0, 1, count) if count > 1 else torch.zeros(1)
    rates = math.pi / 2 * float(max(across, 1)) ** -span
    angles = torch.arange(across)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(-1, across, -1)
    columns = waves[None].expand(across, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:, :dim].contiguous()


class Block(nn.Module):
    """A pre-norm transformer block over the vectors of an image."""

    def __init__(self, dim: int, heads: int) -> None:
        """A block of width ``dim``."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.linear1 = nn.Linear(dim, _MLP_RATIO * dim)
        self.linear2 = nn.Linear(_MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, P, D]`` -> ``[B, P, D]``."""
        query, key, value = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        seen = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        x = x + self.linear2(F.gelu(self.linear1(self.norm2(x))))
        return x


class ReadWrite(nn.Module):
    """The learned matrices of one weight type in all injected layers."""

    def __init__(self, layers: int, read: int, written: int, dim: int) -> None:
        """``U [K, I, D]`` and ``W [K, O, D]``; W is zero, so that an untrained generator changes nothing."""
        super().__init__()
        self.reads = nn.Parameter(torch.randn(layers, read, dim) * (_READ / math.sqrt(read * dim)))
        self.writes = nn.Parameter(torch.zeros(layers, written, dim))

    def forward(self, itself: bool) -> tuple[Tensor, Tensor]:
        """U and W; copies, unless ``itself``: weights that are kept must not change with the generator."""
        if itself:  # views, which outlive ZeRO-3's letting go of the parameters
            return self.reads.view_as(self.reads), self.writes.view_as(self.writes)
        return self.reads.clone(), self.writes.clone()


class FastWeightsGenerator(Generator):
    """Patch features -> one matrix for an image, between learned matrices of the model."""

    config: FastWeightsConfig
    caches_rank = True

    def __init__(
        self, config: FastWeightsConfig, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> None:
        """Build the generator for a decoder of ``shape`` and a vision tower.

        Args:
            config: Settings.
            shape: Widths of the decoder's linear layers, for each letter of ``config.types``.
            visual_dim: Width of the patch features.
            num_patches: Patches of an image, a square with or without a class token.

        Raises:
            ConfigError: The injected layers do not fit the decoder, or the patches form no square.
        """
        super().__init__(config.resolved(num_patches), shape, visual_dim, num_patches)
        self.grid = grid = Grid.of(config, num_patches)
        dim = config.dim
        self.norm_in = nn.LayerNorm(visual_dim)
        self.gather = nn.Linear(visual_dim * grid.window**2, dim)
        if grid.rest:
            self.whole = nn.Linear(visual_dim, dim)
        if config.positions == "learned":
            self.places = nn.Parameter(0.02 * torch.randn(grid.across**2, dim))
        self.blocks = nn.ModuleList(Block(dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        if config.gate:
            self.gate = nn.Linear(dim, 1)
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        self.types = nn.ModuleDict(
            {
                t: ReadWrite(len(self.layers), shape.in_features[t], shape.out_features[t], dim)
                for t in config.types
            }
        )

    @property
    def like(self) -> Tensor:
        """The weight that reads the features."""
        return self.gather.weight

    @property
    def scale(self) -> float:
        """What ``z.T z`` is multiplied by."""
        alpha = 1.0 if self.config.alpha is None else self.config.alpha
        return alpha * _GAIN / (self.config.dim * math.sqrt(self.grid.vectors))

    def latents(self, features: Tensor) -> dict[str, Tensor]:
        """Vectors ``z [B, P, D]`` whose outer products add up to the image, the scale inside.

        Raises:
            ImageError: The features have another width or patch count than the generator was built for.
        """
        return {"z": math.sqrt(self.scale) * self._vectors(features)}

    def expand(self, latents: Mapping[str, Tensor]) -> PerceptualWeights:
        """The image as one matrix ``[B, D, D]`` between the learned matrices."""
        z = latents["z"]
        itself = self.training and torch.is_grad_enabled()
        factors = {t: Factors(*pair(itself)) for t, pair in self.types.items()}
        present = torch.ones(len(z), dtype=torch.bool, device=z.device)
        return PerceptualWeights(factors, self.layers, present, z.mT @ z)

    def shorten(self, latents: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], Tensor]:
        """``rank`` vectors that keep the most of ``z.T z``, and the share ``[B]`` of its sum of squares that is lost.

        Raises:
            ConfigError: The rank is below 1 or above D.
        """
        if not isinstance(rank, int) or not 1 <= rank <= self.config.dim:
            raise ConfigError(
                f"Rank {rank!r} is not one of 1 to {self.config.dim}, the width of an image (vlora_dim)."
            )
        z = latents["z"]
        if rank >= z.shape[1]:
            return {"z": z}, z.new_zeros(len(z), dtype=torch.float32)
        _, values, right = torch.linalg.svd(wide(z), full_matrices=False)
        powers = values**4
        lost = powers[:, rank:].sum(1) / powers.sum(1).clamp(min=torch.finfo(powers.dtype).tiny)
        return {"z": (values[:, :rank, None] * right[:, :rank]).to(z.dtype)}, lost

    def look(self, features: Tensor) -> Tensor:
        """Share of each patch in the weights: ``[B, T, K, V]``, the norm of its outer product; rows sum to one."""
        z = self._vectors(features)
        rows = []
        for pair in self.types.values():
            reads, writes = pair(itself=True)
            # |W z (U z)^T| = |W z| |U z|
            rows.append(
                (z[:, None] @ reads.mT).norm(dim=-1) * (z[:, None] @ writes.mT).norm(dim=-1)
            )
        found = torch.stack(rows, dim=1)
        even = torch.full_like(found, 1 / found.shape[-1])
        total = found.sum(-1, keepdim=True)
        return self.grid.back(torch.where(total > 0, found / total, even))

    def _vectors(self, features: Tensor) -> Tensor:
        normed = self.norm_in(self.checked(features))
        sizes = [self.grid.rest, self.grid.side**2]
        first, patches = torch.split_with_sizes(normed, sizes, dim=1)
        places: Tensor
        if self.config.positions == "learned":
            places = self.places
        else:
            places = grid_positions(self.grid.across, self.config.dim).to(normed)
        x: Tensor = self.gather(self.grid.windows(patches)) + places
        if self.grid.rest:
            x = torch.cat([self.whole(first), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x * self.gate(x).sigmoid() if self.config.gate else x

    # --- sizes and costs --------------------------------------------------------------------------------

    @classmethod
    def parameter_counts(
        cls, config: FastWeightsConfig, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> dict[str, int]:
        """Parameters by name."""
        dim, grid = config.dim, Grid.of(config, num_patches)
        injected = len(config.layers(shape.num_layers))
        found = norm_counts("norm_in", visual_dim)
        found |= linear_counts("gather", visual_dim * grid.window**2, dim)
        if grid.rest:
            found |= linear_counts("whole", visual_dim, dim)
        if config.positions == "learned":
            found["places"] = grid.across**2 * dim
        for i in range(config.depth):
            block = f"blocks.{i}"
            found |= norm_counts(f"{block}.norm1", dim) | norm_counts(f"{block}.norm2", dim)
            found |= linear_counts(f"{block}.qkv", dim, 3 * dim)
            found |= linear_counts(f"{block}.out", dim, dim)
            found |= linear_counts(f"{block}.linear1", dim, _MLP_RATIO * dim)
            found |= linear_counts(f"{block}.linear2", _MLP_RATIO * dim, dim)
        found |= norm_counts("norm", dim)
        if config.gate:
            found |= linear_counts("gate", dim, 1)
        for t in config.types:
            found[f"types.{t}.reads"] = injected * shape.in_features[t] * dim
            found[f"types.{t}.writes"] = injected * shape.out_features[t] * dim
        return found

    @classmethod
    def macs(
        cls, config: FastWeightsConfig, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> int:
        """MACs of one image: gathering, blocks, gate and ``z.T z``."""
        dim, grid = config.dim, Grid.of(config, num_patches)
        count = grid.vectors
        gathered = grid.across**2 * visual_dim * grid.window**2 * dim
        gathered += grid.rest * visual_dim * dim
        block = count * (4 + 2 * _MLP_RATIO) * dim**2 + 2 * count**2 * dim
        return gathered + config.depth * block + config.gate * count * dim + count * dim**2

    @classmethod
    def token_macs(cls, config: FastWeightsConfig, shape: DecoderShape, types: str) -> int:
        """MACs of a token: ``D (I + D + O)`` for each weight."""
        widths = sum(shape.in_features[t] + config.dim + shape.out_features[t] for t in types)
        return len(config.layers(shape.num_layers)) * config.dim * widths

    @classmethod
    def merge_macs(cls, config: FastWeightsConfig, shape: DecoderShape, types: str) -> int:
        """MACs of a merge: ``W M`` first, then ``O x D x I``."""
        areas = sum(shape.out_features[t] * (config.dim + shape.in_features[t]) for t in types)
        return len(config.layers(shape.num_layers)) * config.dim * areas

    @classmethod
    def image_values(cls, config: FastWeightsConfig, shape: DecoderShape) -> int:
        """Numbers of an image: one matrix."""
        return config.dim**2

    @classmethod
    def kept_values(
        cls, config: FastWeightsConfig, shape: DecoderShape, visual_dim: int, num_patches: int
    ) -> int:
        """Numbers kept of an image."""
        dim, grid = config.dim, Grid.of(config, num_patches)
        seen = num_patches * visual_dim + grid.across**2 * visual_dim * grid.window**2
        # Norms (their inputs and outputs), q, k, v, what attention gives, and the MLP's two inner tensors.
        block = (2 + 2 + 3 + 1 + 2 * _MLP_RATIO) * dim
        return seen + grid.vectors * (config.depth * block + 4 * dim)

    @classmethod
    def kept_token_values(cls, config: FastWeightsConfig, shape: DecoderShape) -> int:
        """Numbers kept of a token in an injected layer: before and after the core."""
        return 2 * config.dim * len(config.types)

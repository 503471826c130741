"""How the patches of an image become vectors: windows in rows and columns, and where each stands.

Shapes: B images, C width of a patch, D width of a vector.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ConfigError


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
    def of(cls, num_patches: int, window: int, stride: int) -> Grid:
        """The grid of ``num_patches`` patches.

        Raises:
            ConfigError: They form no square, with or without a class token.
        """
        side = math.isqrt(num_patches)
        rest = num_patches - side * side
        if rest not in (0, 1) or side < 1:
            raise ConfigError(
                f"{num_patches} patches form no square, with or without a class token; fast weights need to know the "
                "row and column of each patch."
            )
        return cls(side, window, stride, rest)

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


@functools.cache
def grid_positions(across: int, dim: int) -> Tensor:
    """Sine and cosine of row and column, ``[across * across, dim]``, each number of unit size.

    Wavelengths run geometrically from 4 vectors to 4 times the side, so that neighbours differ and no two places agree.
    """
    with (
        torch.inference_mode(False),
        torch.device("cpu"),
    ):  # kept for calls of any kind and on any device
        return _waves(across, dim)


def _waves(across: int, dim: int) -> Tensor:
    count = -(-dim // 4)
    span = torch.linspace(0, 1, count) if count > 1 else torch.zeros(1)
    rates = math.pi / 2 * float(max(across, 1)) ** -span
    angles = torch.arange(across)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(-1, across, -1)
    columns = waves[None].expand(across, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)[:, :dim].contiguous()


class Gather(nn.Linear):
    """What a vector sees of its window of patches, ``C * window * window`` numbers, as one vector.

    What binds must lie in one vector, and a window is wide enough for what lies across strides. At first a vector is
    made of the patches of its stride alone: with all patches of a window weighted alike, what is in the middle is a
    small part of the vector and takes long to be found.
    """

    def __init__(self, width: int, dim: int, grid: Grid) -> None:
        """For patches of ``width``."""
        self.grid = grid  # before the weights are made: ZeRO-3 takes them away as soon as they are
        super().__init__(width * grid.window**2, dim)

    def reset_parameters(self) -> None:
        """As a linear layer of the patches of the stride, which stand in the middle."""
        nn.init.zeros_(self.weight)
        window, stride = self.grid.window, self.grid.stride
        first = (window - stride) // 2
        middle = slice(first, first + stride)
        bound = (self.in_features / window**2 * stride**2) ** -0.5
        with torch.no_grad():
            kernel = self.weight.view(self.out_features, -1, window, window)
            kernel[..., middle, middle].uniform_(-bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

"""How much each weight matters: scores that are made a slice at a time, and three that need no Wanda.

Shapes: O outputs, I inputs of a linear layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..decoder import TARGETS
from ..errors import IMAError
from ..weights import PerceptualWeights
from .linears import Place, block_linears, language_parameters, probe, shapes

#: Scores of some rows of one layer: ``[rows, I]`` float32, not negative, contiguous.
Make = Callable[[Place, slice], Tensor]
#: Linear layers that perceptual weights write to, with their type.
LETTERS = {target.path: letter for letter, target in TARGETS.items() if target.mergeable}


@dataclass(frozen=True)
class Scores:
    """Scores of all weights of a model, which must not change while they are read."""

    of: Make
    shapes: Mapping[Place, tuple[int, int]]
    """``(O, I)``."""
    probe: Tensor
    """See :func:`~.linears.probe`."""
    parameters: int
    """Of the whole language model."""
    about: Mapping[str, Any]
    """What was scored on what; fit for JSON."""


def scores_of(model: nn.Module, make: Make, about: Mapping[str, Any]) -> Scores:
    """Scores of a live model.

    Raises:
        IMAError: A linear layer of a block is quantised, sharded, has an adapter or is not in memory.
    """
    linears = block_linears(model)
    return Scores(make, shapes(linears), probe(linears), language_parameters(model), about)


def magnitude_scores(model: nn.Module, *, delta: PerceptualWeights | None = None) -> Scores:
    """``|W_ij|``, or with ``delta`` as :func:`magnitudes` has it."""
    make = magnitudes(model, delta)
    return scores_of(model, make, {"score": "magnitude", "weight": weight_name(delta)})


def random_scores(model: nn.Module, *, seed: int = 0) -> Scores:
    """Uniform random scores, the same on every machine."""
    sizes = shapes(block_linears(model))

    def make(place: Place, rows: slice) -> Tensor:
        out, into = sizes[place]
        # A seed for each row, so that slices of any size agree.
        return torch.stack([_uniform(seed, place, i, into) for i in range(out)[rows]])

    return scores_of(model, make, {"score": "random", "seed": seed})


def _uniform(seed: int, place: Place, row: int, count: int) -> Tensor:
    text = f"{seed} {place[0]} {place[1]} {row}"
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
    return torch.rand(count, generator=torch.Generator().manual_seed(number))


def magnitudes(model: nn.Module, delta: PerceptualWeights | None = None) -> Make:
    """The absolute weights of a live model.

    Args:
        model: The model.
        delta: Perceptual weights of some images. Then it is the mean over the images of ``|W + B A|`` where they
            write, else ``|W|``.
    """
    linears = block_linears(model)

    def make(place: Place, rows: slice) -> Tensor:
        weight = linears[place].weight.detach()[rows].float()
        letter = LETTERS.get(place[1], "")
        if delta is None or letter not in delta.factors or place[0] - 1 not in delta.layers:
            return weight.abs()
        total = torch.zeros_like(weight)
        for i in range(len(delta)):
            a, b = (t.detach().to(weight) for t in delta.pair(letter, place[0] - 1, i))
            total += torch.addmm(weight, b[rows], a.T).abs()
        return total / len(delta)

    if delta is not None and not len(delta):
        raise IMAError("There are no perceptual weights to score: the batch of images is empty.")
    return make


def weight_name(delta: PerceptualWeights | None) -> str:
    """What of the weight is scored."""
    return "W" if delta is None else f"W + BA, mean over {len(delta)} images"

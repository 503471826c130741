"""Perceptual weights with parts left out, replaced or shared; none of these writes to its argument.

Blocks are counted from 1, as in the results. Shapes: B images, K injected layers, I, O input and output width, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..errors import IMAError, WeightsError, listing
from ..weights import Factors, PerceptualWeights

#: (block, weight type) -> whether it is meant.
Cells = Callable[[int, str], bool]


def keep(
    weights: PerceptualWeights, wanted: Cells, instead: PerceptualWeights | None = None
) -> PerceptualWeights:
    """The weights at some cells; elsewhere nothing, or the weights of another image.

    Args:
        weights: The weights.
        wanted: Which cells stay.
        instead: One row that fills the other cells; by default they are empty, and types and layers without any cell
            are gone.

    Raises:
        WeightsError: ``instead`` has other types or layers, or several rows.
    """
    types, layers = weights.types, weights.layers
    if instead is not None:
        weights, instead = weights.spelled(), instead.spelled()
    if instead is None:
        types = "".join(t for t in types if any(wanted(n + 1, t) for n in layers))
        layers = tuple(n for n in layers if any(wanted(n + 1, t) for t in types))
    elif (instead.types, instead.layers, len(instead)) != (types, layers, 1):
        raise WeightsError(
            f"Weights of types {weights.types!r} in layers {listing(weights.layers)} cannot be filled with "
            f"{len(instead)} rows of types {instead.types!r} in layers {listing(instead.layers)}."
        )
    places = [weights.layers.index(n) for n in layers]
    factors = {}
    for letter in types:
        gate = torch.tensor([wanted(n + 1, letter) for n in layers], device=weights.device)
        picked = _blocks(weights.factors[letter], places)
        other = picked.map(torch.zeros_like) if instead is None else instead.factors[letter]
        gate = gate[:, None, None]
        factors[letter] = Factors(
            torch.where(gate, picked.a, other.a), torch.where(gate, picked.b, other.b)
        )
    return PerceptualWeights(factors, layers, weights.present, weights.core)


def truncate(weights: PerceptualWeights, rank: int) -> PerceptualWeights:
    """The nearest weights of a rank, see :meth:`~llava_vlora.weights.PerceptualWeights.truncate`."""
    return weights.truncate(rank)


def share(weights: PerceptualWeights, block: int) -> PerceptualWeights:
    """The weights of one block in all injected blocks.

    Raises:
        WeightsError: The block has no weights.
    """
    if block - 1 not in weights.layers:
        raise WeightsError(
            f"Block {block} has no perceptual weights; there are some in blocks "
            f"{listing(n + 1 for n in weights.layers)}."
        )
    places = [weights.layers.index(block - 1)] * len(weights.layers)
    factors = {letter: _blocks(factor, places) for letter, factor in weights.factors.items()}
    return PerceptualWeights(factors, weights.layers, weights.present, weights.core)


def mean_image(images: Iterable[PerceptualWeights]) -> PerceptualWeights:
    """The mean of the weights of several images, as one row: what is the same whatever the image.

    Raises:
        IMAError: There is no image, or the weights are not as a generator makes them, one factor shared by all
            images; the mean of products would not be the product of means.
    """
    total, count = None, 0
    first: PerceptualWeights | None = None
    for weights in (one.spelled() for one in images):
        first = first or weights
        _check_alike(first, weights)
        sums = {t: f.map(_sum_of_rows) for t, f in weights.factors.items()}
        total = sums if total is None else {t: _plus(total[t], sums[t]) for t in sums}
        count += len(weights)
    if first is None or total is None or not count:
        raise IMAError("There is no image to take the mean of.")
    factors = {
        letter: Factors(_mean(total[letter].a, f.a, count), _mean(total[letter].b, f.b, count))
        for letter, f in first.factors.items()
    }
    return PerceptualWeights(factors, first.layers, first.present[:1])


def flops_per_token(weights: PerceptualWeights) -> int:
    """FLOPs that weights beside the model add to each text token.

    ``2 R (I + O)`` for each that is not zero, with a core ``2 R (I + R + O)``.
    """
    middle = 0 if weights.core is None else weights.rank
    return sum(
        2 * factor.a.shape[-1] * (factor.a.shape[-2] + middle + factor.b.shape[-2])
        for factor in weights.factors.values()
        for j in range(len(weights.layers))
        if all(bool(t[..., j, :, :].any()) for t in (factor.a, factor.b))
    )


def _blocks(factor: Factors, places: list[int]) -> Factors:
    return factor.map(lambda t: t[..., places, :, :])


def _check_alike(first: PerceptualWeights, other: PerceptualWeights) -> None:
    for letter, factor in other.factors.items():
        one = first.factors[letter]
        pairs = [(one.a, factor.a), (one.b, factor.b)]
        shared = [p for p in pairs if p[0].ndim == 3]
        if len(shared) != 1 or not shared[0][0].equal(shared[0][1]):
            raise IMAError(
                f"The mean of images needs weights of one generator, one factor shared by all; those of type "
                f"{letter!r} are not."
            )


def _sum_of_rows(tensor: Tensor) -> Tensor:
    return tensor.double().sum(0, keepdim=True) if tensor.ndim == 4 else tensor


def _plus(first: Factors, second: Factors) -> Factors:
    pairs = ((first.a, second.a), (first.b, second.b))
    a, b = (one + other if one.ndim == 4 else one for one, other in pairs)
    return Factors(a, b)


def _mean(total: Tensor, like: Tensor, count: int) -> Tensor:
    return (total / count).to(like.dtype) if total.ndim == 4 else total

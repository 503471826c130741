"""What the weights of different images, and of neighbouring blocks, have in common.

Subspaces are compared by their principal angles (Björck and Golub 1973): the singular values of ``P^T Q`` for
orthonormal bases P and Q are the angles' cosines. Shapes: I, O input and output width, R rank.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import IMAError
from ..weights import Factors, PerceptualWeights
from .basis import Bases, Basis, Side, decompose_all
from .layout import View
from .views import Cell, Measured, Running

SIDES: tuple[Side, ...] = ("input", "output")


@dataclass(frozen=True)
class Overlap:
    """What :func:`measure_overlap` gives."""

    measured: tuple[Measured, ...]
    images: int
    pairs: int
    """Pairs of images compared."""
    view: View = "basis"


def principal_cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the principal angles between the spans of orthonormal columns ``[d, r]`` and ``[d, s]``.

    Returns:
        ``[min(r, s)]``, descending.
    """
    cosines: Tensor = torch.linalg.svdvals(first.T @ second)
    return cosines.clamp(max=1)


def overlap(first: Tensor, second: Tensor) -> float:
    """Mean squared cosine of the principal angles: 1 if one span holds the other, 0 if they are orthogonal.

    Args:
        first: Orthonormal columns ``[d, r]``.
        second: Orthonormal columns ``[d, s]``.
    """
    return float(principal_cosines(first, second).square().mean())


def chance_overlap(first: Tensor, second: Tensor) -> float:
    """:func:`overlap` of random subspaces of the same sizes, on average: ``max(r, s) / d``.

    The expectation of ``|P^T Q|^2`` is ``r s / d``, because that of ``Q Q^T`` is ``s / d`` times the identity.
    """
    return max(first.shape[1], second.shape[1]) / len(first)


def same_direction(first: Basis, second: Basis) -> float:
    """Cosine of two perceptual weights as vectors of ``O I`` numbers, without forming them."""
    left = first.values[:, None] * (first.left.T @ second.left) * second.values
    both = (left * (first.right.T @ second.right)).sum()
    return float(both / (first.values.norm() * second.values.norm()))


@torch.no_grad()
def measure_overlap(images: Iterable[PerceptualWeights], *, window: int = 1) -> Overlap:
    """Compare the weights of each image with those of the images before it, and each block with the next one.

    Args:
        images: Weights of images, each image once.
        window: Images before, with which each is compared; their bases are held meanwhile.

    Returns:
        Per block and weight type: ``input overlap`` and ``output overlap`` between images with the level of random
        subspaces as chance, full on the side of the factor that all images share; ``cosine`` of the weights; ``image
        share``, the part of the sum of squares of delta_W that differs between the images (unbiased; as
        ``vlora/image_share`` in training, which is about the generated factor); ``input overlap of blocks`` and
        ``output overlap of blocks`` of one image between a block and the next injected one.

    Raises:
        IMAError: There are fewer than two images, two in a row are the same, or a weight is zero.
    """
    view = OverlapView(window)
    for one in _single(images):
        view.add(one, decompose_all(one))
    return view.result()


class OverlapView:
    """The same image by image, see :func:`measure_overlap`."""

    def __init__(self, window: int = 1) -> None:
        """Nothing seen."""
        self._running, self._shares = Running("basis"), _Shares()
        self._before: deque[Bases] = deque(maxlen=window)
        self._count = self._pairs = 0

    def add(self, one: PerceptualWeights, bases: Bases) -> None:
        """Take in a further image.

        Args:
            one: Its weights, one row.
            bases: Their decompositions.

        Raises:
            IMAError: It is the same as the one before.
        """
        self._count += 1
        before = self._before
        if before and all(before[-1][key].values.equal(b.values) for key, b in bases.items()):
            raise IMAError(
                f"Images {self._count - 1} and {self._count} have equal weights; give each image once."
            )
        self._shares.add(one)
        for other in before:
            self._pairs += 1
            for (letter, layer), basis in bases.items():
                _between(self._running, "", basis, other[letter, layer], layer + 1, letter)
                cosine = same_direction(basis, other[letter, layer])
                self._running.add("cosine", layer + 1, letter, cosine, chance=0.0)
        for letter in one.types:
            for layer, following in pairwise(one.layers):
                pair = bases[letter, layer], bases[letter, following]
                _between(self._running, " of blocks", *pair, layer + 1, letter)
        before.append(bases)

    def result(self) -> Overlap:
        """What was measured.

        Raises:
            IMAError: There were fewer than two images.
        """
        if self._count < 2:
            raise IMAError("Weights of different images are compared; give at least two images.")
        measured = (*self._running.results(), self._shares.result())
        # What compares images first.
        ordered = sorted(measured, key=lambda one: one.quantity.endswith("of blocks"))
        return Overlap(tuple(ordered), self._count, self._pairs)


def _single(images: Iterable[PerceptualWeights]) -> Iterator[PerceptualWeights]:
    for weights in images:
        for row in range(len(weights)):
            yield weights.index([row])


def _between(
    running: Running, what: str, first: Basis, second: Basis, block: int, letter: str
) -> None:
    for side in SIDES:
        spans = first.side(side), second.side(side)
        chance = chance_overlap(*spans)
        running.add(f"{side} overlap{what}", block, letter, overlap(*spans), chance=chance)


class _Shares:
    """Sums over images from which the image-dependent share of delta_W follows; as large as the weights of one."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def add(self, one: PerceptualWeights) -> None:
        self._count += 1
        for letter, factor in one.spelled().factors.items():
            for j, layer in enumerate(one.layers):
                own = _compressed(factor, j, letter)
                before = self._sums.get((letter, layer), (torch.zeros_like(own), own.new_zeros(())))
                self._sums[letter, layer] = before[0] + own, before[1] + own.square().sum()

    def result(self) -> Measured:
        n, cells = self._count, []
        for (letter, layer), (total, squares) in self._sums.items():
            differing = (squares - total.square().sum() / n) * n / (n - 1)
            cells.append(Cell(layer + 1, letter, float(differing / squares), None, n))
        cells.sort(key=lambda cell: cell.block)
        return Measured("basis", "image share", tuple(cells))


def _compressed(factor: Factors, j: int, letter: str) -> Tensor:
    """A matrix whose scalar products between images are those of delta_W: ``a R^T`` where ``b = Q R`` is shared."""
    if (factor.a.ndim == 4) == (factor.b.ndim == 4):
        raise IMAError(
            f"The image share needs weights as a generator makes them, one factor shared by all images; those of "
            f"type {letter!r} were changed."
        )
    own, shared = (factor.a, factor.b) if factor.a.ndim == 4 else (factor.b, factor.a)
    small: Tensor = torch.linalg.qr(shared[j].double()).R
    return own[0, j].double() @ small.T

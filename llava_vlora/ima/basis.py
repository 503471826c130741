"""Basis view: the directions that perceptual weights read and write, whatever the text.

A perceptual weight is ``delta_W = b a^T = left diag(values) right^T``: its right singular vectors are what it reads
from a module's input, the left ones what it writes to the output. Shapes: I, O input and output width, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import IMAError
from ..low_rank import wide
from ..weights import PerceptualWeights
from .layout import Batch, View, Watch
from .states import Example, collect
from .views import Measured, Running, perceptual_weights

Side = Literal["input", "output"]

#: Weight type -> the state that it reads; what ``o`` reads, the heads' output, is no state of its own.
READS = {"q": "ln1", "k": "ln1", "v": "ln1", "m": "ln2", "g": "ln2", "u": "ln2", "d": "fc1"}
#: Weight type -> the state of the residual stream before it writes there, and how many blocks earlier that is.
WRITES = {"o": ("x", 1), "m": ("x_sa", 0), "d": ("x_sa", 0)}


@dataclass(frozen=True)
class Basis:
    """Singular value decomposition of one perceptual weight."""

    left: Tensor
    """``[O, R]``, orthonormal columns: what is written."""
    values: Tensor
    """``[R]``, descending."""
    right: Tensor
    """``[I, R]``, orthonormal columns: what is read."""

    @property
    def rank(self) -> int:
        """Numerical rank, with the tolerance of ``torch.linalg.matrix_rank``."""
        size = max(len(self.left), len(self.right))
        least = size * torch.finfo(self.values.dtype).eps * self.values.max()
        return int((self.values > least).sum())

    def side(self, side: Side) -> Tensor:
        """The directions of one side that a rank is made of: ``[I or O, rank]``."""
        return (self.right if side == "input" else self.left)[:, : self.rank]

    def tokens(self, side: Side) -> Tensor:
        """Directions weighted by their singular values: ``[rank, I or O]``.

        What is nearest to the perceptual tokens of other models, and independent of the text. The sign of each is
        arbitrary: only measures that ignore it, such as the absolute cosine, say something.
        """
        return (self.side(side) * self.values[: self.rank]).T


#: Weight type and injected layer, counted from 0 -> the basis of one image's weight.
Bases = Mapping[tuple[str, int], Basis]


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one perceptual weight over its Frobenius norm: mean over the images."""

    block: int
    """Counted from 1."""
    place: str
    """Weight type."""
    values: tuple[float, ...]
    """Descending; the sum of squares is 1 for each image."""


@dataclass(frozen=True)
class BasisResult:
    """What :func:`measure_basis` gives."""

    measured: tuple[Measured, ...]
    spectra: tuple[Spectrum, ...]
    view: View = "basis"


def decompose(weights: PerceptualWeights, letter: str, layer: int, row: int = 0) -> Basis:
    """The basis of one perceptual weight; QR of the factors first, so the dense matrix is never formed.

    Args:
        weights: The weights.
        letter: Weight type.
        layer: Injected layer, counted from 0 as in ``weights.layers``.
        row: Image.

    Raises:
        WeightsError: The type or the layer has no weight here.
        IMAError: The weight is zero and has no directions.
    """
    a, b = (wide(t) for t in weights.pair(letter, layer, row))
    (reads, small_a), (writes, small_b) = torch.linalg.qr(a), torch.linalg.qr(b)
    left, values, right = torch.linalg.svd(small_b @ small_a.T, full_matrices=False)
    if not bool(values[0] > 0):
        raise IMAError(
            f"The perceptual weight {letter!r} of block {layer + 1} is zero and has no directions; the generator is "
            "untrained, or the row shows no image."
        )
    return Basis(writes @ left, values, reads @ right.T)


def decompose_all(weights: PerceptualWeights, row: int = 0) -> Bases:
    """The bases of all perceptual weights of one image.

    Raises:
        IMAError: A weight is zero.
    """
    return {(t, n): decompose(weights, t, n, row) for n in weights.layers for t in weights.types}


def effective_rank(values: Tensor) -> float:
    """Exponential of the entropy of singular values ``[R]`` that are divided by their sum.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007. From 1 to R.
    """
    shares = values.double() / values.double().sum()
    return float(torch.special.entr(shares).sum().exp())


def lie_along(directions: Tensor, values: Tensor, tokens: Tensor) -> float:
    """How much tokens lie along weighted directions: 1 for random ones.

    The mean over tokens of ``sum_j values_j^2 cos^2(direction_j, token) / sum_j values_j^2``, times the width, whose
    inverse is the mean squared cosine of random directions. It ignores signs and is the same in every basis of
    directions with equal values.

    Args:
        directions: Orthonormal columns ``[d, R]``.
        values: Their singular values ``[R]``.
        tokens: t of them, ``[t, d]``.
    """
    tokens = wide(tokens.to(directions.device))
    squares = (tokens @ directions).square() / tokens.square().sum(-1, keepdim=True)
    share = (squares * values.square()).sum(-1) / values.square().sum()
    return float(share.mean()) * len(directions)


@torch.no_grad()
def measure_basis(model: nn.Module, batches: Iterable[Batch], *, kind: str = "T") -> BasisResult:
    """Spectra of perceptual weights, and how much the text's states lie along their directions.

    Args:
        model: A VLoRA model.
        batches: What to run; every example shows an image.
        kind: Tokens that are looked at: text without the system prompt by default.

    Returns:
        Per block and weight type, means over examples: ``Frobenius norm``, ``effective rank``, ``reading``
        (:func:`lie_along` of the input side and what the module reads, with the image shown; not for ``o``) and
        ``writing`` (the output side and the residual stream before it; for ``o``, ``m`` and ``d``).

    Raises:
        ConfigError: The kind is unknown.
        IMAError: An example has no image, or a weight is zero.
    """
    view = BasisView(kind)
    for batch in batches:
        view.add(model, batch)
    return view.result()


class BasisView:
    """The same batch by batch, see :func:`measure_basis`."""

    def __init__(self, kind: str = "T") -> None:
        """Nothing seen."""
        self._running, self._kind = Running("basis"), kind
        self._spectra: dict[tuple[int, str], Tensor] = {}

    @torch.no_grad()
    def add(self, model: nn.Module, batch: Batch, watches: Sequence[Watch] = ()) -> list[Bases]:
        """Run a batch and measure it.

        Args:
            model: A VLoRA model.
            batch: What to run.
            watches: Further hooks to have in the same pass.

        Returns:
            The bases of each example's weights.

        Raises:
            VLoRAError: As of :func:`measure_basis`.
        """
        weights = perceptual_weights(batch)
        batch.require(self._kind)
        found = []
        for row, example in enumerate(_texts(model, batch, weights, watches)):
            found.append(decompose_all(weights, row))
            for (letter, layer), basis in found[-1].items():
                self._measure(basis, example, (layer + 1, letter))
        return found

    def _measure(self, basis: Basis, example: Example, key: tuple[int, str]) -> None:
        norm = basis.values.norm()
        own = (basis.values / norm).double().cpu()
        self._spectra[key] = self._spectra[key] + own if key in self._spectra else own
        self._running.add("Frobenius norm", *key, float(norm))
        self._running.add("effective rank", *key, effective_rank(basis.values))
        _along(self._running, basis, example, self._kind, *key)

    def result(self) -> BasisResult:
        """What was measured.

        Raises:
            IMAError: There was no batch.
        """
        measured = self._running.results()
        count = measured[0].cells[0].count
        means = [Spectrum(*k, tuple((own / count).tolist())) for k, own in self._spectra.items()]
        return BasisResult(measured, tuple(means))


def _texts(
    model: nn.Module, batch: Batch, weights: PerceptualWeights, watches: Sequence[Watch]
) -> Iterable[Example]:
    """The states that the injected blocks read and write to."""
    points = [READS[t] for t in weights.types if t in READS]
    points += [WRITES[t][0] for t in weights.types if t in WRITES]
    # X before a block is X after the block before it.
    layers = sorted({n for layer in weights.layers for n in (layer, layer + 1)})
    wanted = list(dict.fromkeys(points))
    return collect(model, [batch], points=wanted, layers=layers, watches=watches)


def _along(
    running: Running, basis: Basis, example: Example, kind: str, block: int, letter: str
) -> None:
    if letter in READS:
        read = example.tokens(READS[letter], block, kind)
        share = lie_along(basis.right, basis.values, read)
        running.add("reading", block, letter, share, chance=1.0)
    if letter in WRITES:
        point, earlier = WRITES[letter]
        written = example.tokens(point, block - earlier, kind)
        share = lie_along(basis.left, basis.values, written)
        running.add("writing", block, letter, share, chance=1.0)

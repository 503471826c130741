"""Tokens in the plane: t-SNE and principal components (arXiv 2405.16700, figure 2)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ConfigError, IMAError, listing
from .curves import Layers
from .states import Example

Method = Literal["tsne", "pca"]


@dataclass(frozen=True)
class Embedding:
    """Points of the plane, one for each example and kind of tokens, or one for each token."""

    method: str
    view: str
    layer: int
    x: list[float]
    y: list[float]
    data_sets: list[str]
    """Of each point."""
    kinds: list[str]
    """Of each point."""
    names: list[str]
    """The example of each point."""
    explained: tuple[float, float] | None
    """Shares of the variance along x and y; None for t-SNE, whose axes mean nothing."""


def embed_2d(
    data_sets: Mapping[str, Iterable[Example]],
    layer: int,
    *,
    method: Method = "tsne",
    kinds: Sequence[str] = ("P", "T"),
    point: str = "x",
    tokens: Literal["mean", "all"] = "mean",
    perplexity: float = 30,
    seed: int = 42,
) -> Embedding:
    """Show states of one block in the plane.

    Args:
        data_sets: Name -> examples.
        layer: The block.
        method: t-SNE (van der Maaten and Hinton 2008; needs scikit-learn) or principal components.
        kinds: Kinds of tokens.
        point: State inside the blocks.
        tokens: The mean of an example's tokens of a kind, or all of them.
        perplexity: Of t-SNE: about the number of neighbours of a point.
        seed: Of t-SNE.

    Raises:
        ConfigError: An argument is unknown, scikit-learn is missing, or there are too few points for the perplexity.
        IMAError: States or tokens are missing, examples are of two views, or there are fewer than 3 points.
    """
    if method not in ("tsne", "pca") or tokens not in ("mean", "all"):
        raise ConfigError(
            f"method={method!r}, tokens={tokens!r}: choose method from {listing(['tsne', 'pca'])} and tokens from "
            f"{listing(['mean', 'all'])}."
        )
    if method == "tsne" and importlib.util.find_spec("sklearn") is None:
        raise ConfigError(
            "t-SNE needs scikit-learn, which is not installed: pip install llava-vlora[ima], or use method='pca'."
        )
    views, rows, of = Layers(point), list[Tensor](), list[tuple[str, str, str]]()
    for label, examples in data_sets.items():
        for example in examples:
            views.check_view(example)
            for kind in kinds:
                found = example.tokens(point, layer, kind).detach().float().cpu()
                found = found.mean(0, keepdim=True) if tokens == "mean" else found
                rows.append(found)
                of += [(label, kind, example.name)] * len(found)
    if len(of) < 3:
        raise IMAError(f"{len(of)} points have no arrangement in the plane; give at least 3.")
    points = torch.cat(rows)
    explained = None
    if method == "pca":
        plane, explained = _pca(points)
    else:
        plane = _tsne(points, perplexity, seed)
    labels, sides, names = (list(part) for part in zip(*of, strict=True))
    x, y = (column.tolist() for column in plane.T)
    return Embedding(method, views.view, layer, x, y, labels, sides, names, explained)


def _pca(points: Tensor) -> tuple[Tensor, tuple[float, float]]:
    points = points.double()
    left, values, right = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    # The sign of a component is free; the largest loading is made positive.
    loadings = right[:2].gather(1, right[:2].abs().argmax(1, keepdim=True))
    plane = left[:, :2] * values[:2] * loadings.sign().T
    shares = values.square() / values.square().sum()
    return plane, (float(shares[0]), float(shares[1]))


def _tsne(points: Tensor, perplexity: float, seed: int) -> Tensor:
    if not 0 < perplexity < len(points):
        raise ConfigError(
            f"t-SNE of {len(points)} points needs a perplexity above 0 and below {len(points)}, not "
            f"{perplexity:g}: give another one, or more examples."
        )
    from sklearn.manifold import TSNE

    embedded = TSNE(2, perplexity=perplexity, random_state=seed).fit_transform(points.numpy())
    return torch.from_numpy(embedded)

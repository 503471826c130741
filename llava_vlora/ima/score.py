"""The IMA score: how alike perceptual and textual tokens are inside a language model (arXiv 2405.16700, section 4).

``IMA = mean_l mean_(n,m) Sim(P_n^l', T_m^l)`` with l' = l (``same``) or 0 (``input``: perceptual tokens as they enter).
The paper's blocks are l = 0 to L - 1. Values are small and near 0: they compare models, and have no threshold.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, IMAError, listing
from ..evaluation.statistics import Interval
from .curves import Curve, Layers, feed, pool
from .pairs import grids
from .similarity import (
    VECTOR_SIMS,
    Clusters,
    MatchedSimilarity,
    Pairs,
    Sim,
    VectorPairs,
    check_sim,
    cluster,
    labels,
)
from .states import Example

PerceptualLayer = Literal["same", "input"]


@dataclass(frozen=True)
class Value:
    """A mean over blocks and pairs."""

    score: float
    interval: Interval | None
    """Percentile bootstrap over examples or their clusters; None for a single one."""
    curve: Curve
    """The similarity at each block; spread over pairs."""
    examples: int


@dataclass(frozen=True)
class Score:
    """The score of a model."""

    view: str
    """What the perceptual tokens are; scores of two views cannot be compared."""
    sim: str
    perceptual_layer: str
    pairs: str
    point: str
    confidence: float
    whole: Value
    """Data sets count alike, however many examples each has; the curve's spread is over the pairs of all."""
    data_sets: dict[str, Value]


def ima_score(
    data_sets: Mapping[str, Iterable[Example]],
    *,
    perceptual_layer: PerceptualLayer = "same",
    sim: Sim = "median",
    layers: Sequence[int] | None = None,
    pairs: Pairs = "all",
    point: str = "x",
    kinds: tuple[str, str] = ("P", "T"),
    clusters: Mapping[str, Clusters] | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Score:
    """The IMA score with an interval.

    Matched pairs, and ``avg`` and ``mean`` over all pairs, take one pass over any iterable in constant memory; other
    measures over all pairs need a list or a :class:`~.store.StateStore`.

    Args:
        data_sets: Name -> examples.
        perceptual_layer: Perceptual tokens at the block of the textual ones, or as the first block reads them.
        sim: Measure.
        layers: Blocks of the textual tokens; all that were collected by default. The paper's are 0 to L - 1.
        pairs: Each example with all of its data set (the paper's), or with itself alone.
        point: State inside the blocks.
        kinds: Kinds of tokens that take the places of P and T.
        clusters: Name of a data set -> name of an example -> what it shares with others, such as its image, whose
            tokens are the same whatever is asked about it; whole clusters are resampled then.
        confidence: Of the interval.
        resamples: Bootstrap samples, drawn in each data set for itself.
        seed: Of the samples.
        device: Where all pairs are computed; where the states are by default.

    Raises:
        ConfigError: An argument is unknown, or two contradict each other.
        IMAError: There is no example, or states, tokens or clusters are missing.
    """
    _check(perceptual_layer, sim, pairs, point)
    if not data_sets:
        raise IMAError("There is no data set to score.")
    first = 0 if perceptual_layer == "input" else None
    found = {}
    for name, examples in data_sets.items():
        if clusters is not None and name not in clusters:
            raise IMAError(f"The clusters lack the data set {name}; there are {listing(clusters)}.")
        own = None if clusters is None else clusters[name]
        asked = _Asked(kinds, sim, pairs, point, layers, first, own)
        found[name] = asked.pairs_of(examples, device)
    draw = np.random.default_rng(seed)
    drawn = {name: one.resampled(draw, resamples) for name, one in found.items()}
    values = {
        name: Value(one.curve.average, _interval(drawn[name], confidence), one.curve, one.examples)
        for name, one in found.items()
    }
    whole = _together(values, drawn, confidence)
    view = str(whole.curve.of["view"])
    return Score(view, sim, perceptual_layer, pairs, point, confidence, whole, values)


def _check(perceptual_layer: str, sim: str, pairs: str, point: str) -> None:
    check_sim(sim, pairs)
    if perceptual_layer not in ("same", "input"):
        raise ConfigError(
            f"There is no perceptual layer {perceptual_layer!r}; choose from {listing(['same', 'input'])}."
        )
    if perceptual_layer == "input" and point != "x":
        raise ConfigError(
            f"perceptual_layer='input' is the residual stream before the first block, and {point!r} is another state; "
            "use point='x' or perceptual_layer='same'."
        )


@dataclass(frozen=True)
class _Paired:
    """The pairs of one data set."""

    curve: Curve
    examples: int
    sums: Tensor
    """``[G, G]``: similarities of all pairs of two groups, mean over blocks; ``[G]`` for matched pairs."""
    sizes: Tensor
    """``[G]`` examples in each group."""

    def resampled(self, draw: np.random.Generator, count: int) -> np.ndarray:
        """Means of bootstrap samples of the groups: ``[count]``, or none of a single group."""
        groups = len(self.sizes)
        if groups < 2:
            return np.empty(0)
        chosen = draw.multinomial(groups, np.full(groups, 1 / groups), size=count).astype(float)
        sums, sizes = self.sums.numpy(), chosen @ self.sizes.numpy()
        if sums.ndim == 1:
            return np.asarray(chosen @ sums / sizes)
        return np.asarray(((chosen @ sums) * chosen).sum(1) / sizes**2)


@dataclass(frozen=True)
class _Asked:
    """What is asked of a data set."""

    kinds: tuple[str, str]
    sim: Sim
    pairs: str
    point: str
    layers: Sequence[int] | None
    first_layer: int | None
    clusters: Clusters | None

    def pairs_of(self, examples: Iterable[Example], device: torch.device | str | None) -> _Paired:
        options: dict[str, Any] = {
            "point": self.point,
            "layers": self.layers,
            "first_layer": self.first_layer,
        }
        if self.pairs == "matched":
            matched = MatchedSimilarity(self.kinds, self.sim, **options)
            feed(examples, matched)
            names, averages = zip(*matched.averages, strict=True)
            values = torch.tensor(averages, dtype=torch.float64)
            return self._grouped(matched.result(), names, values)
        if self.sim in VECTOR_SIMS:
            vectors = VectorPairs(self.kinds, self.sim, clusters=self.clusters, **options)
            feed(examples, vectors)
            sums = torch.stack(list(vectors.sums())).mean(0)
            sizes = vectors.sizes()
            return _Paired(vectors.result(), int(sizes.sum()), sums, sizes)
        return self._token_pairs(examples, device)

    def _token_pairs(
        self, examples: Iterable[Example], device: torch.device | str | None
    ) -> _Paired:
        if not isinstance(examples, Sequence):
            raise ConfigError(
                f"{self.sim!r} over all pairs reads each example many times, and this is a stream: give a list or a "
                f"StateStore, pairs='matched', or one of {listing(VECTOR_SIMS)}."
            )
        if not examples:
            raise IMAError("There is no example to analyse.")
        read = Layers(self.point, self.layers)
        chosen = read.of(examples[0])
        for example in examples:
            read.check_view(example)
        whole = torch.zeros(len(examples), len(examples), dtype=torch.float64)
        spread = []
        for grid in grids(examples, self.kinds[0], examples, self.kinds[1], self.sim, point=self.point,
                          layers=chosen, first_layer=self.first_layer, device=device):  # fmt: skip
            whole += grid / len(chosen)
            spread.append((float(grid.mean()), float(grid.std(correction=0))))
        mean, std = zip(*spread, strict=True)
        of = labels(read, self.kinds, self.sim, self.pairs, self.first_layer)
        curve = Curve(of, chosen, mean, std, len(examples) ** 2)
        return self._grouped(curve, [e.name for e in examples], whole)

    def _grouped(self, curve: Curve, names: Sequence[str], sums: Tensor) -> _Paired:
        """Sums over the examples of each cluster."""
        keys: list[Hashable] = list(range(len(names)))
        if self.clusters is not None:
            keys = [cluster(self.clusters, name) for name in names]
        places = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        index = torch.tensor([places[key] for key in keys])
        for dim in range(sums.ndim):
            shape = (len(places) if i == dim else n for i, n in enumerate(sums.shape))
            sums = torch.zeros(*shape, dtype=torch.float64).index_add(dim, index, sums)
        return _Paired(curve, len(names), sums, torch.bincount(index).double())


def _interval(drawn: np.ndarray, confidence: float) -> Interval | None:
    if not len(drawn):
        return None
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def _together(
    values: Mapping[str, Value], drawn: Mapping[str, np.ndarray], confidence: float
) -> Value:
    curves = [value.curve for value in values.values()]
    same = pool(curves, **curves[0].of)
    mean = tuple(float(m) for m in np.mean([c.mean for c in curves], axis=0))
    curve = Curve(same.of, same.layers, mean, same.std, same.count)
    whole = [d for d in drawn.values() if len(d)]
    together = np.mean(whole, axis=0) if len(whole) == len(drawn) else np.empty(0)
    examples = sum(value.examples for value in values.values())
    return Value(curve.average, _interval(together, confidence), curve, examples)

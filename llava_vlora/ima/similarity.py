"""Cosine similarity of sets of tokens: within an example, between all pairs of examples, and from block to block.

The measures are those of IMA (arXiv 2405.16700, section 4). For sets A (a tokens) and B (b tokens) of one pair,
``S [a, b]`` holds the cosines of all their tokens. Shapes: a and b tokens, d width, N and M examples. All sums are
float32 or wider, whatever the states are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, IMAError, listing
from .curves import Curve, Layers, Moments
from .states import Example

#: ``avg`` (AvgSim): cosine of the two mean vectors; ``mean``, ``median`` (MedSim), ``max`` (MaxSim), ``min`` (MinSim):
#: of all cosines S; ``max_mean``: mean over A of the best match in B; ``diag_*``: of token i of A with token i of B.
Sim = Literal[
    "avg", "mean", "median", "max", "min", "max_mean", "diag_mean", "diag_median", "diag_max"
]
Pairs = Literal["all", "matched"]
#: Name of an example -> what it shares with others, such as its image.
Clusters = Mapping[str, Hashable]
#: Measures that are a dot product of one vector for each set.
VECTOR_SIMS = ("avg", "mean")


def check_sim(sim: str, pairs: str = "matched") -> None:
    """Check a measure and which pairs it is to be taken of.

    Raises:
        ConfigError: There is no such measure or choice of pairs, or tokens are compared by their place in examples
            that have nothing to do with each other.
    """
    if sim not in get_args(Sim):
        raise ConfigError(f"There is no similarity {sim!r}; choose from {listing(get_args(Sim))}.")
    if pairs not in get_args(Pairs):
        raise ConfigError(f"There are no pairs {pairs!r}; choose from {listing(get_args(Pairs))}.")
    if pairs == "all" and sim.startswith("diag"):
        raise ConfigError(
            f"{sim} compares the same tokens in two states; tokens of different examples have nothing in common but "
            "their number. Use pairs='matched'."
        )


def similarity(
    first: Tensor,
    second: Tensor,
    sim: Sim = "median",
    names: tuple[str, str] = ("the first set", "the second set"),
) -> float:
    """Similarity of two sets of tokens ``[a, d]`` and ``[b, d]``, which messages call by ``names``.

    Raises:
        ConfigError: There is no such measure.
        IMAError: A vector is zero, so that it has no direction; or ``diag`` sets differ in size.
    """
    check_sim(sim)
    if sim in VECTOR_SIMS:
        return float(vector(first, sim, names[0]) @ vector(second, sim, names[1]))
    return float(reduce(unit(first, names[0]), unit(second, names[1]), sim))


def unit(tokens: Tensor, what: str = "the set of tokens") -> Tensor:
    """Rows of ``[n, d]`` in float32 with norm 1.

    Raises:
        IMAError: A row is zero.
    """
    tokens = tokens.detach().float()
    norms = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    if not bool(norms.all()):
        raise IMAError(
            f"A vector of {what} is zero and has no direction to compare; leave the block out."
        )
    directions: Tensor = tokens / norms
    return directions


def vector(tokens: Tensor, sim: str, what: str = "the set of tokens") -> Tensor:
    """The vector ``[d]`` that ``avg`` (direction of the mean) and ``mean`` (mean of the directions) are products of.

    Raises:
        IMAError: There is a zero vector.
    """
    if sim == "avg":
        return unit(tokens.detach().float().mean(0, keepdim=True), f"the mean of {what}")[0]
    return unit(tokens, what).mean(0)


def reduce(first: Tensor, second: Tensor, sim: str) -> Tensor:
    """A measure other than ``avg`` of two sets of unit vectors ``[a, d]`` and ``[b, d]``."""
    if not sim.startswith("diag"):
        return reduce_cosines(first @ second.T, sim)
    if first.shape != second.shape:
        raise IMAError(
            f"{sim} compares token by token, but there are {len(first)} and {len(second)} of them."
        )
    return reduce_cosines((first * second).sum(1), sim.removeprefix("diag_"))


def reduce_cosines(cosines: Tensor, sim: str) -> Tensor:
    """A measure, neither ``avg`` nor ``diag``, of all cosines ``[a, b]`` of two sets."""
    if sim == "median":
        return median(cosines)
    if sim == "max_mean":
        return cosines.amax(1).mean()
    if sim == "mean":
        return cosines.mean()
    return cosines.amax() if sim == "max" else cosines.amin()


def median(values: Tensor) -> Tensor:
    """The median of all values; the mean of the two in the middle of an even number."""
    flat = values.flatten()
    lower = flat.median()  # torch gives the lower of the two
    higher = flat.masked_fill(flat <= lower, torch.inf).amin()
    return torch.where((flat <= lower).sum() > len(flat) // 2, lower, (lower + higher) / 2)


# --- one pass --------------------------------------------------------------------------------------


class MatchedSimilarity:
    """Similarity of two kinds of tokens of the same example, block by block, in constant memory.

    Args:
        kinds: The two kinds, see :data:`~.layout.Kind`.
        sim: The measure.
        point: State inside the blocks.
        layers: Blocks; all that were collected by default.
        first_layer: Take the first kind at this block, whatever the block of the second one is.
    """

    def __init__(
        self,
        kinds: tuple[str, str] = ("P", "T"),
        sim: Sim = "median",
        *,
        point: str = "x",
        layers: Sequence[int] | None = None,
        first_layer: int | None = None,
    ) -> None:
        """Nothing seen."""
        check_sim(sim)
        self.kinds, self.sim, self.first_layer = kinds, sim, first_layer
        self._layers, self._moments = Layers(point, layers), Moments()
        self.averages: list[tuple[str, float]] = []
        """For each example its name and the mean over the blocks."""

    def update(self, example: Example) -> None:
        """Take in one example."""
        self.compare(example, example)

    def compare(self, first: Example, second: Example) -> None:
        """Take in a pair: the first kind of ``first`` with the second kind of ``second``."""
        point, (one, other), found = self._layers.point, self.kinds, []
        self._layers.check_view(first)
        for layer in self._layers.of(second):
            at = layer if self.first_layer is None else self.first_layer
            tokens = first.tokens(point, at, one), second.tokens(point, layer, other)
            names = title(first, one, at), title(second, other, layer)
            found.append(similarity(*tokens, self.sim, names))
        self._moments.add(torch.tensor([found], dtype=torch.float64))
        self.averages.append((second.name, sum(found) / len(found)))

    def result(self) -> Curve:
        """Mean and spread over examples."""
        of = labels(self._layers, self.kinds, self.sim, "matched", self.first_layer)
        return self._moments.curve(self._layers.known, **of)


class VectorPairs:
    """AvgSim or mean-pair similarity over all pairs of examples, in one pass and constant memory.

    Both measures are dot products, so that the mean over all pairs is the dot product of two sums. Up to ``groups``
    examples are kept apart, for the spread over pairs and for intervals; of more, sums of equal shares are kept: the
    mean stays exact and the groups can be resampled, but there is no spread over single pairs.

    Args:
        kinds: The two kinds of tokens.
        sim: ``avg`` or ``mean``.
        point: State inside the blocks.
        layers: Blocks; all that were collected by default.
        first_layer: Take the first kind at this block, whatever the block of the second one is.
        groups: Vectors kept for each block and kind.
        clusters: Example -> what it shares with others, such as its image, which are then kept in one group.
    """

    def __init__(
        self,
        kinds: tuple[str, str] = ("P", "T"),
        sim: Sim = "avg",
        *,
        point: str = "x",
        layers: Sequence[int] | None = None,
        first_layer: int | None = None,
        groups: int = 256,
        clusters: Clusters | None = None,
    ) -> None:
        """Nothing seen."""
        if sim not in VECTOR_SIMS:
            raise ConfigError(
                f"{sim!r} over all pairs needs the tokens of all examples at once: use cross_similarity() on a "
                f"StateStore or a list, or one of {listing(VECTOR_SIMS)}."
            )
        self.kinds, self.sim, self.first_layer = kinds, sim, first_layer
        self._layers, self._groups = Layers(point, layers), groups
        self._sums: dict[tuple[int, int], list[Tensor]] = {}
        self._sizes: list[int] = []
        self._clusters = clusters
        self._places: dict[Hashable, int] = {}

    def update(self, example: Example) -> None:
        """Take in one example."""
        place = sum(self._sizes)
        if self._clusters is not None:
            key = cluster(self._clusters, example.name)
            place = self._places.setdefault(key, len(self._places))
        place %= self._groups
        if place == len(self._sizes):
            self._sizes.append(0)
        self._sizes[place] += 1
        layers = self._layers.of(example)
        first = layers if self.first_layer is None else (self.first_layer,)
        for side, chosen in enumerate((first, layers)):
            for layer in chosen:
                tokens = example.tokens(self._layers.point, layer, self.kinds[side])
                own = vector(tokens, self.sim, title(example, self.kinds[side], layer)).cpu()
                kept = self._sums.setdefault((side, layer), [])
                if place < len(kept):
                    kept[place] += own
                else:
                    kept.append(own)

    def sums(self) -> Iterator[Tensor]:
        """For each block, sums ``[G, G]`` of the similarities of all pairs of two groups."""
        for layer in self._layers.known:
            at = layer if self.first_layer is None else self.first_layer
            yield (torch.stack(self._sums[0, at]) @ torch.stack(self._sums[1, layer]).T).double()

    def sizes(self) -> Tensor:
        """Examples in each group: ``[G]``."""
        return torch.tensor(self._sizes, dtype=torch.float64)

    def result(self) -> Curve:
        """Mean over all pairs."""
        layers, count = self._layers.known, sum(self._sizes)
        sums = list(self.sums())
        std = None
        if max(self._sizes) == 1:
            std = tuple(float(s.std(correction=0)) for s in sums)
        mean = tuple(float(s.sum()) / count**2 for s in sums)
        of = labels(self._layers, self.kinds, self.sim, "all", self.first_layer)
        return Curve(of, layers, mean, std, count**2)


def cluster(clusters: Clusters, name: str) -> Hashable:
    """What an example shares with others.

    Raises:
        IMAError: That is not known.
    """
    if name not in clusters:
        raise IMAError(
            f"The clusters lack example {name}; name what each example shares with others."
        )
    return clusters[name]


def labels(
    layers: Layers, kinds: Sequence[str], sim: str, pairs: str, first_layer: int | None
) -> dict[str, str | int | bool]:
    """What a curve of similarities says that it is."""
    found: dict[str, str | int | bool] = {
        "statistic": "similarity",
        "view": layers.view,
        "point": layers.point,
        "kinds": " vs ".join(kinds),
        "sim": sim,
        "pairs": pairs,
    }
    return found if first_layer is None else {**found, "first_layer": first_layer}


def title(example: Example, kind: str, layer: int) -> str:
    """What messages call some tokens."""
    return f"the tokens {kind} of example {example.name} at block {layer}"

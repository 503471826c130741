"""Similarity over all pairs of examples, from states that can be read again: a list of examples or a ``StateStore``.

Shapes: N and M examples, d width.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import IMAError
from .curves import Curve, Layers
from .similarity import (
    VECTOR_SIMS,
    MatchedSimilarity,
    Pairs,
    Sim,
    check_sim,
    labels,
    reduce_cosines,
    title,
    unit,
    vector,
)
from .states import Example

#: Rows of one block of a product of all pairs.
_ROWS = 4096


def cross_similarity(
    first: Sequence[Example],
    first_kind: str,
    second: Sequence[Example],
    second_kind: str,
    sim: Sim = "median",
    *,
    pairs: Pairs = "all",
    point: str = "x",
    layers: Sequence[int] | None = None,
    first_layer: int | None = None,
    device: torch.device | str | None = None,
) -> Curve:
    """Similarity of two kinds of tokens, block by block (arXiv 2405.16700, section 4).

    Args:
        first: Examples.
        first_kind: Kind of their tokens: ``P``, ``T``, ...
        second: The same examples, or those of another data set.
        second_kind: Kind of their tokens.
        sim: The measure.
        pairs: All pairs of an example of ``first`` with one of ``second``, or each with the one of its name.
        point: State inside the blocks.
        layers: Blocks; all that were collected by default.
        first_layer: Take ``first`` at this block, whatever the block of ``second`` is.
        device: Where to compute; where the states are by default.

    Returns:
        Mean and standard deviation over pairs.

    Raises:
        ConfigError: There is no such measure, or it makes no sense for these pairs.
        IMAError: States or tokens are missing or zero, or examples to be matched are not the same.
    """
    check_sim(sim, pairs)
    kinds = (first_kind, second_kind)
    if pairs == "matched":
        matched = MatchedSimilarity(kinds, sim, point=point, layers=layers, first_layer=first_layer)
        for a, b in _matching(first, second):
            matched.compare(a, b)
        return matched.result()
    read = Layers(point, layers)
    chosen = read.of(second[0])
    for example in (*first, *second):
        read.check_view(example)
    found = grids(first, first_kind, second, second_kind, sim, point=point, layers=chosen,
                  first_layer=first_layer, device=device)  # fmt: skip
    spread = [(float(grid.mean()), float(grid.std(correction=0))) for grid in found]
    mean, std = zip(*spread, strict=True)
    of = labels(read, kinds, sim, pairs, first_layer)
    return Curve(of, chosen, mean, std, len(first) * len(second))


def intra_similarity(
    examples: Sequence[Example],
    kind: str,
    sim: Sim = "median",
    *,
    seed: int = 0,
    point: str = "x",
    layers: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> Curve:
    """Similarity of the tokens of one kind inside a data set: a random half of the examples with the other half.

    Arguments, results and errors are those of :func:`cross_similarity`; ``seed`` draws the halves.
    """
    if len(examples) < 2:
        raise IMAError(f"{len(examples)} examples have no two halves; give at least 2.")
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    halves = [[examples[i] for i in sorted(order[part::2])] for part in (0, 1)]
    curve = cross_similarity(
        halves[0], kind, halves[1], kind, sim, point=point, layers=layers, device=device
    )
    return replace(curve, of={**curve.of, "pairs": "halves", "seed": seed})


def grids(
    first: Sequence[Example],
    first_kind: str,
    second: Sequence[Example],
    second_kind: str,
    sim: Sim,
    *,
    point: str,
    layers: Sequence[int],
    first_layer: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Tensor]:
    """For each block the similarities ``[N, M]`` of all pairs, float64; arguments as in :func:`cross_similarity`.

    Memory is that of the result, of two blocks of tokens and of their product.
    """
    for layer in layers:
        at = layer if first_layer is None else first_layer
        one, other = (
            _Side(first, first_kind, point, at, device),
            _Side(second, second_kind, point, layer, device),
        )
        if sim in VECTOR_SIMS:
            yield (one.vectors(sim) @ other.vectors(sim).T).cpu().double()
        else:
            yield _token_grid(one, other, sim)


@dataclass(frozen=True)
class _Side:
    """One kind of tokens of all examples at one block."""

    examples: Sequence[Example]
    kind: str
    point: str
    layer: int
    device: torch.device | str | None

    def vectors(self, sim: str) -> Tensor:
        """``[N, d]``."""
        return torch.stack([vector(self._tokens(e), sim, self._title(e)) for e in self.examples])

    def blocks(self) -> Iterator[tuple[int, list[Tensor]]]:
        """Unit vectors of successive examples, about ``_ROWS`` rows at once, with the number of the first one."""
        start, block, rows = 0, list[Tensor](), 0
        for i, example in enumerate(self.examples):
            tokens = unit(self._tokens(example), self._title(example))
            if block and rows + len(tokens) > _ROWS:
                yield start, block
                start, block, rows = i, [], 0
            block.append(tokens)
            rows += len(tokens)
        yield start, block

    def _tokens(self, example: Example) -> Tensor:
        return example.tokens(self.point, self.layer, self.kind).to(self.device)

    def _title(self, example: Example) -> str:
        return title(example, self.kind, self.layer)


def _token_grid(one: _Side, other: _Side, sim: str) -> Tensor:
    found = torch.empty(len(one.examples), len(other.examples), dtype=torch.float64)
    for i, rows in one.blocks():
        heights = [len(r) for r in rows]
        for j, columns in other.blocks():
            product = torch.cat(rows) @ torch.cat(columns).T
            values = torch.stack([
                reduce_cosines(cell, sim)
                for row in torch.split(product, heights)
                for cell in torch.split(row, [len(c) for c in columns], dim=1)
            ])  # fmt: skip
            found[i : i + len(rows), j : j + len(columns)] = values.view(len(rows), -1).cpu()
    return found


def _matching(
    first: Sequence[Example], second: Sequence[Example]
) -> Iterator[tuple[Example, Example]]:
    if first is second:
        yield from ((example, example) for example in first)
        return
    if len(first) != len(second):
        raise IMAError(
            f"{len(first)} examples cannot be matched with {len(second)}; collect the same examples twice."
        )
    for a, b in zip(first, second, strict=True):
        if a.name != b.name:
            raise IMAError(
                f"Example {a.name} stands where example {b.name} is in the other; collect the same in one order."
            )
        yield a, b

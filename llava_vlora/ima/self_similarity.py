"""How fast tokens change from block to block (arXiv 2405.16700, figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from .curves import Curve, Layers, Moments
from .similarity import check_sim, reduce, title, unit
from .states import Example


class SelfSimilarity:
    """How much of a token's direction is kept over some blocks: the cosine of each token with itself.

    ``stat_i cos(X_i^(l+n), X_i^l)`` over the tokens i of one kind, then the mean over examples: tokens are only ever
    compared with themselves (arXiv 2405.16700, figure 3).

    Args:
        steps: Numbers of blocks n between the two states.
        kinds: Kinds of tokens.
        stat: ``median`` or ``mean`` over the tokens.
        point: State inside the blocks.
        layers: Blocks l and l + n; all that were collected by default.
    """

    def __init__(
        self,
        steps: Sequence[int] = (1, 8),
        kinds: Sequence[str] = ("P", "T"),
        stat: Literal["median", "mean"] = "median",
        *,
        point: str = "x",
        layers: Sequence[int] | None = None,
    ) -> None:
        """Nothing seen."""
        self.steps, self.kinds, self.stat = tuple(steps), tuple(kinds), stat
        check_sim(f"diag_{stat}")
        self._layers = Layers(point, layers)
        self._moments = {(n, kind): Moments() for n in self.steps for kind in self.kinds}

    def update(self, example: Example) -> None:
        """Take in one example."""
        point, layers = self._layers.point, self._layers.of(example)
        for kind in self.kinds:
            units = {
                layer: unit(example.tokens(point, layer, kind), title(example, kind, layer))
                for layer in layers
            }
            for n in self.steps:
                found = [
                    float(reduce(units[layer + n], units[layer], f"diag_{self.stat}"))
                    for layer in self._layers.apart(n)
                ]
                self._moments[n, kind].add(torch.tensor([found], dtype=torch.float64))

    def result(self) -> list[Curve]:
        """For each step and kind, a curve over the earlier of the two blocks."""
        return [
            moments.curve(
                self._layers.apart(n),
                statistic="self-similarity",
                view=self._layers.view,
                point=self._layers.point,
                kinds=kind,
                sim=self.stat,
                step=n,
            )
            for (n, kind), moments in self._moments.items()
        ]

"""Lengths of tokens block by block (arXiv 2405.16700, figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, listing
from .curves import Curve, Layers, Moments
from .similarity import median
from .states import Example

Stat = Literal["median", "mean", "max", "min"]
_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "median": median,
    "mean": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
}


class TokenNorms:
    """Norms ``||X_i^l||_2`` of single tokens: a statistic over the tokens of an example, its mean over examples.

    Each comes with and without the first token of the kind, which often is an attention sink with a norm of its own
    order of magnitude.

    Args:
        kinds: Kinds of tokens.
        stats: Statistics over the tokens of one example.
        point: State inside the blocks.
        layers: Blocks; all that were collected by default.
    """

    def __init__(
        self,
        kinds: Sequence[str] = ("P", "T"),
        stats: Sequence[Stat] = get_args(Stat),
        *,
        point: str = "x",
        layers: Sequence[int] | None = None,
    ) -> None:
        """Nothing seen."""
        unknown = [s for s in stats if s not in _REDUCE]
        if unknown:
            raise ConfigError(
                f"There is no statistic {unknown[0]!r} of norms; choose from {listing(_REDUCE)}."
            )
        self.kinds, self.stats = tuple(kinds), tuple(stats)
        self._layers = Layers(point, layers)
        self._moments: dict[tuple[str, bool], Moments] = {}

    def update(self, example: Example) -> None:
        """Take in one example."""
        for kind in self.kinds:
            norms = torch.stack([
                torch.linalg.vector_norm(example.tokens(self._layers.point, layer, kind).float(), dim=1)
                for layer in self._layers.of(example)
            ])  # fmt: skip
            self._add(kind, True, norms)
            if norms.shape[1] > 1:
                self._add(kind, False, norms[:, 1:])

    def _add(self, kind: str, first: bool, norms: Tensor) -> None:
        found = [[_REDUCE[stat](row) for row in norms] for stat in self.stats]
        values = torch.tensor(found, dtype=torch.float64)
        self._moments.setdefault((kind, first), Moments()).add(values[None])

    def result(self) -> list[Curve]:
        """For each kind and statistic one curve with the first token and one without.

        The latter is over the examples that have more than one token of the kind.
        """
        layers, curves = self._layers.known, []
        for (kind, first), moments in self._moments.items():
            for i, stat in enumerate(self.stats):
                here = slice(i * len(layers), (i + 1) * len(layers))
                of: dict[str, str | int | bool] = {
                    "statistic": "norm",
                    "view": self._layers.view,
                    "point": self._layers.point,
                    "kinds": kind,
                    "stat": stat,
                    "first_token": first,
                }
                mean, std = tuple(moments.mean[here]), tuple(moments.std[here])
                curves.append(Curve(of, layers, mean, std, moments.count))
        return curves

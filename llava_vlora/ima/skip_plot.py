"""Accuracy against FLOPs: LLaVA, LLaVA under plans, VLoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

from matplotlib.figure import Figure

from ..report.plots import PALETTE, new_figure


@dataclass(frozen=True)
class Tradeoff:
    """One model under one plan or none."""

    series: str
    """Points of a series have one colour and are joined in their order."""
    label: str
    flops: float
    """To the first token."""
    accuracy: float
    interval: tuple[float, float] | None = None
    """Lower and upper end, where known."""


def tradeoff_plot(points: Sequence[Tradeoff], metric: str = "Accuracy, %") -> Figure:
    """Accuracy against FLOPs to the first token.

    Args:
        points: In the order in which a series is joined, such as by ratio.
        metric: What the accuracy is.
    """
    figure, (axes,) = new_figure(7.5, 4.5, 1)
    for series, color in zip(dict.fromkeys(p.series for p in points), cycle(PALETTE), strict=False):
        own = [p for p in points if p.series == series]
        x, y = [p.flops / 1e12 for p in own], [p.accuracy for p in own]
        axes.plot(x, y, "o-", color=color, label=series, markersize=6)
        for point in own:
            place = (point.flops / 1e12, point.accuracy)
            axes.annotate(
                point.label, place, (0, 6), textcoords="offset points", ha="center", fontsize=8
            )
            if point.interval is not None:
                axes.vlines(place[0], *point.interval, color=color, lw=1)
    axes.set_xlabel("TFLOPs to the first token, computed")
    axes.set_ylabel(metric)
    axes.set_xlim(left=0)
    axes.margins(y=0.15)
    axes.legend(frameon=False, fontsize=9)
    return figure

"""The figures of similarity, norms, embeddings and scores."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import IMAError
from ..report.plots import GRID, INK, PALETTE, new_figure
from .correlation import Correlation
from .curves import Curve
from .embedding import Embedding

#: Of lines, where there are more than colours.
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "^", "s", "D")


def curve_plot(
    curves: Mapping[str, Curve], *, label: str, log: bool = False, average: bool = False
) -> Figure:
    """Curves over blocks with bands of one standard deviation, where it was measured.

    Args:
        curves: Name -> curve.
        label: What the numbers are, with their unit.
        log: Logarithmic scale, as norms of sinks need.
        average: A dashed line at each curve's mean over blocks.

    Raises:
        IMAError: There is no curve.
    """
    if not curves:
        raise IMAError("There is no curve to draw.")
    figure, (axes,) = new_figure(7.2, 3.8, 1)
    looks = ((color, style) for style in cycle(_STYLES) for color in PALETTE)
    for (name, curve), (color, style) in zip(curves.items(), looks, strict=False):
        alone = "o" if len(curve.layers) == 1 else None
        axes.plot(curve.layers, curve.mean, color=color, ls=style, label=name, lw=1.6, marker=alone)
        if curve.std is not None:
            mean, std = np.array(curve.mean), np.array(curve.std)
            # A mean less its spread may be no number that a logarithm has.
            low = np.maximum(mean - std, mean / 10) if log else mean - std
            axes.fill_between(curve.layers, low, mean + std, color=color, alpha=0.15, lw=0)
        if average:
            axes.axhline(curve.average, color=color, lw=1, ls=(0, (4, 3)))
    axes.set_xlabel("Block")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(label)
    if log:
        axes.set_yscale("log")
    columns = max(1, min(4, len(curves), 72 // max(map(len, curves))))
    figure.legend(loc="outside upper center", ncols=columns, frameon=False)
    return figure


def embedding_plot(embedding: Embedding, *, lines: bool = True) -> Figure:
    """Points of the plane: colours for data sets, shapes for kinds of tokens.

    Args:
        embedding: The points.
        lines: Join the points of an example.
    """
    figure, (axes,) = new_figure(6.4, 5.6, 1)
    x, y = np.array(embedding.x), np.array(embedding.y)
    groups = list(zip(embedding.data_sets, embedding.kinds, strict=True))
    sets, kinds = list(dict.fromkeys(embedding.data_sets)), list(dict.fromkeys(embedding.kinds))
    if lines:
        places: dict[tuple[str, str], list[int]] = {}
        for i, pair in enumerate(zip(embedding.data_sets, embedding.names, strict=True)):
            places.setdefault(pair, []).append(i)
        for at in places.values():
            axes.plot(x[at], y[at], color=GRID, lw=0.8, zorder=1)
    for name, color in zip(sets, cycle(PALETTE), strict=False):
        for kind, marker in zip(kinds, cycle(_MARKERS), strict=False):
            chosen = [i for i, group in enumerate(groups) if group == (name, kind)]
            axes.scatter(
                x[chosen],
                y[chosen],
                s=32,
                marker=marker,
                color=color,
                edgecolor="white",
                linewidth=0.4,
                label=f"{name}, {kind}",
                zorder=2,
            )
    if embedding.explained is None:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"t-SNE at block {embedding.layer}", loc="left")
    else:
        first, second = (f"{100 * share:.0f} % of the variance" for share in embedding.explained)
        axes.set_xlabel(f"Component 1 ({first})")
        axes.set_ylabel(f"Component 2 ({second})")
        axes.set_title(f"Principal components at block {embedding.layer}", loc="left")
    figure.legend(loc="outside upper center", ncols=min(4, len(sets) * len(kinds)), frameon=False)
    return figure


def score_plot(
    scores: Mapping[str, float],
    metrics: Mapping[str, float],
    found: Correlation,
    *,
    score: str = "IMA score",
    metric: str,
) -> Figure:
    """A metric against a score, each point named, with the correlation above."""
    figure, (axes,) = new_figure(5.6, 4.4, 1)
    for name in found.names:
        axes.plot(scores[name], metrics[name], "o", color=PALETTE[0], markersize=7)
        axes.annotate(
            name,
            (scores[name], metrics[name]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=INK,
        )
    parts = [
        f"{name} {c.value:.2f} ({c.leave_one_out.low:.2f} to {c.leave_one_out.high:.2f} without one point), "
        f"p = {c.p_value:.2g}"
        for name, c in (("Pearson", found.pearson), ("Spearman", found.spearman))
    ]
    axes.set_title("\n".join([*parts, f"n = {found.n}"]), loc="left", fontsize=8.5)
    axes.margins(0.18)
    axes.set_xlabel(score)
    axes.set_ylabel(metric)
    return figure

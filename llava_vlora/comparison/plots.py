"""The figures of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.figure import Figure

from ..report.plots import GRID, INK, PALETTE, new_figure
from .analysis import Comparison
from .costs import flops_unit, known_costs

_BLIND = ("#999999", "#bbbbbb", "#777777")


def colors(comparison: Comparison) -> dict[str, str]:
    """A colour for each row."""
    blind = set(comparison["blind"])
    seeing, others = cycle(PALETTE), cycle(_BLIND)
    return {label: next(others if label in blind else seeing) for label in comparison["rows"]}


def credit_plot(comparison: Comparison) -> Figure:
    """Mean credit of all rows on each benchmark, with 95 % intervals."""
    scored = [b for b in comparison["benchmarks"] if b["scored"]]
    shown = colors(comparison)
    figure, (axes,) = new_figure(10.5, 0.9 + 0.22 * len(scored) * (1 + len(shown)), 1)
    step = 0.7 / len(shown)
    for i, (label, color) in enumerate(shown.items()):
        found = [
            (k + (i + 0.5) * step - 0.35, b["rows"][label]["credit"])
            for k, b in enumerate(scored)
            if label in b["rows"]
        ]
        means = [credit["mean"] for _, credit in found]
        arms = (
            [max(0.0, c["mean"] - c["interval"][0]) for _, c in found],
            [max(0.0, c["interval"][1] - c["mean"]) for _, c in found],
        )
        axes.errorbar(
            means, [y for y, _ in found], xerr=arms, fmt="o", color=color, label=label, capsize=3
        )
    for k in range(1, len(scored)):
        axes.axhline(k - 0.5, color=GRID)
    axes.set_yticks(range(len(scored)), [f"{b['title']}\nn = {b['scored']:,}" for b in scored])
    axes.set_ylim(len(scored) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID)
    axes.set_xlabel("Mean credit of a question, %")
    axes.set_xlim(0, 100)
    figure.legend(loc="outside upper center", ncols=min(4, len(shown)), frameon=False)
    return figure


def category_plot(comparison: Comparison, benchmark: Mapping[str, Any]) -> Figure:
    """Mean credit of all rows on each type of question of a benchmark, with 95 % intervals."""
    types, shown = benchmark["categories"], colors(comparison)
    rows = [label for label in shown if label in benchmark["rows"]]
    groups = {
        **{f"{name}\nn = {found['questions']:,}": found for name, found in types.items()},
        f"all\nn = {benchmark['scored']:,}": {
            "rows": {x: benchmark["rows"][x]["credit"]["mean"] for x in rows},
            "intervals": {x: benchmark["rows"][x]["credit"]["interval"] for x in rows},
        },
    }
    figure, (axes,) = new_figure(10.5, 4.2, 1)
    width = 0.8 / len(rows)
    for i, label in enumerate(rows):
        places = [k + (i + 0.5) * width - 0.4 for k in range(len(groups))]
        means = [group["rows"][label] for group in groups.values()]
        ends = [group["intervals"][label] for group in groups.values()]
        arms = (
            [max(0.0, m - low) for m, (low, _) in zip(means, ends, strict=True)],
            [max(0.0, high - m) for m, (_, high) in zip(means, ends, strict=True)],
        )
        axes.bar(places, means, width, color=shown[label], label=label, edgecolor="white", lw=0.5)
        axes.errorbar(places, means, arms, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.axvline(len(groups) - 1.5, color=GRID, lw=1.5)
    axes.set_ylabel("Mean credit, %")
    axes.set_ylim(0, 105)
    figure.legend(loc="outside upper center", ncols=min(5, len(rows)), frameon=False)
    return figure


def tradeoff_plot(comparison: Comparison) -> Figure:
    """Mean credit over the scored benchmarks against FLOPs and time to the first token."""
    figure, panels = new_figure(10.5, 3.8, 2)
    points, shown = tradeoff(comparison), colors(comparison)
    unit, size = flops_unit(known_costs(comparison))
    names = (f"{unit}FLOPs to the first token", "Milliseconds to the first token")
    for axes, name, index, scale in zip(panels, names, (0, 1), (size, 1e-3), strict=True):
        for label, costs, mean in points:
            cost = costs[index]
            if cost is not None:
                named = label if index == 0 else None
                axes.plot(cost / scale, mean, "o", color=shown[label], markersize=9, label=named)
        axes.set_xlabel(name)
        axes.set_xlim(left=0)
        axes.margins(x=0.2)
        axes.set_ylim(0, 105)
    panels[0].set_ylabel("Mean credit over benchmarks, %")
    figure.legend(loc="outside upper center", ncols=min(5, len(points)), frameon=False)
    return figure


def tradeoff(
    comparison: Comparison,
) -> Sequence[tuple[str, tuple[float | None, float | None], float]]:
    """Of each row with known cost: its label, FLOPs and seconds, and its mean over the benchmarks all share."""
    labels = comparison["rows"]
    shared = [
        b for b in comparison["benchmarks"] if b["scored"] and all(x in b["rows"] for x in labels)
    ]
    points = []
    for label in labels:
        model = label.removesuffix(", blind")
        cost = comparison["costs"].get(model)
        if cost is None or not shared:
            continue
        mean = sum(b["rows"][label]["credit"]["mean"] for b in shared) / len(shared)
        if label in comparison["blind"]:
            points.append((label, (cost["flops_blind"], None), mean))
        else:
            known = (cost["flops"]["first_token"], cost["time"]["first_token"])
            points.append((label, known, mean))
    return points

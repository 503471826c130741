"""Figures of a cost: parts of the work to the first token, and the paper's Fig. 4."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.plots import COLORS, GRID, new_figure
from .figure4 import TEXT
from .result import Result
from .table import FLOP_ROWS, heading, named_models

_PARTS = {
    "vision": "#c3ccd5",
    "connector": "#E69F00",
    "merge": "#CC79A7",
    "prefill": "#56B4E9",
    "low_rank": "#009E73",
}
_SHADES = dict(zip(TEXT, (COLORS["vlora"], COLORS["llava"], "#009E73"), strict=True))


def parts_plot(result: Result, *, macs: bool = False) -> Figure:
    """Work to the first token by part: LLaVA, the generators and the published settings."""
    rows = named_models(result)
    rows += [(row["name"], row) for row in result["competitors"]]
    scale = 2e12 if macs else 1e12
    figure, (axes,) = new_figure(10.0, 1.4 + 0.36 * len(rows), 1)
    names, left = [name for name, _ in rows], [0.0] * len(rows)
    for part, color in _PARTS.items():
        widths = [row["flops"][part] / scale for _, row in rows]
        if any(widths):
            label = FLOP_ROWS[part]
            axes.barh(names, widths, 0.65, left, color=color, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for i, total in enumerate(left):
        text = f" {total:.3g}  ({total / left[0]:.3f} of LLaVA)" if i else f" {total:.3g}"
        axes.annotate(text, (total, i), va="center", fontsize=8.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(left))
    axes.grid(axis="x", color=GRID)
    axes.grid(axis="y", visible=False)
    unit = "TMACs" if macs else "TFLOPs"
    published = "; other methods from their published settings" if result["competitors"] else ""
    axes.set_xlabel(f"{unit} to the first token, computed{published}, not measured", fontsize=9)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    figure.suptitle(heading(result), fontsize=9)
    return figure


def figure4_plot(result: Result) -> Figure:
    """The paper's Fig. 4 by the fitted formulas, and the same for the code as released."""
    figure, (flops, ratios) = new_figure(10.5, 4.2, 2)
    for text, color in _SHADES.items():
        points = [point for point in result["figure4"] if point["text"] == text]
        visual = [point["visual"] for point in points]
        llava = [point["paper_llava"] / 1e12 for point in points]
        vlora = [point["paper_vlora"] / 1e12 for point in points]
        flops.plot(visual, llava, "o-", ms=3.5, color=color, label=f"LLaVA, C = {text}")
        flops.plot(visual, vlora, "s--", ms=3.5, color=color, label=f"VLoRA, C = {text}")
        columns = list(zip(*(point["ratios"] for point in points), strict=True))
        for values, style in zip(columns, ("o-", "--", ":"), strict=True):
            ratios.plot(visual, values, style, ms=3.5, color=color)
    flops.set_title(
        "TFLOPs, the paper's convention (fitted to its Fig. 4)", loc="left", fontsize=9.5
    )
    flops.legend(frameon=False, fontsize=8.5)
    ratios.set_title("VLoRA / LLaVA", loc="left", fontsize=9.5)
    ratios.set_ylim(0, 1)
    _explain(ratios)
    for panel in (flops, ratios):
        panel.set_xlabel("visual tokens (576: LLaVA-1.5)")
        panel.set_xticks([64, 576, 1088, 1600, 2112, 2624])
        panel.set_xlim(left=0)
    flops.set_ylim(bottom=0)
    return figure


def _explain(axes: Axes) -> None:
    """Colours are text tokens, line styles are what is counted."""
    ink: dict[str, Any] = {"color": "#1f2933", "ms": 3.5}
    handles = [axes.plot([], [], color=color, lw=3)[0] for color in _SHADES.values()]
    labels = [f"C = {text} text tokens" for text in _SHADES]
    handles += [axes.plot([], [], style, **ink)[0] for style in ("o-", "--", ":")]
    labels += ["paper (fitted)", "code as released", "code, vision tower in both"]
    axes.legend(handles, labels, frameon=False, fontsize=8.5)

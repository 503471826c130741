"""The figure of a benchmark run."""

from __future__ import annotations

from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..report.plots import GRID, new_figure
from .colors import color
from .summary import Result, groups, precision, ratio
from .systems import BESIDE, IDLE, LLAVA, TEXT, parts_of, system

_BAR: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5}


def bench_plot(result: Result) -> Figure:
    """Four panels: first token, decoding, and growth with visual tokens and with text; what was measured of them."""
    parts = {cell["part"] for cell in result["cells"]}
    panels = [
        (part, draw)
        for part, draw in (
            ("first", _first_token),
            ("decode", _decoding),
            ("visual", _growth),
            ("text", _growth),
        )
        if part in parts
    ]
    rows = 2 if len(panels) > 2 else 1
    figure, axes = new_figure(10.0, 3.4 * rows, max(1, len(panels)), rows)
    for panel, (part, draw) in zip(axes, panels, strict=False):
        draw(panel, result, part)
    for empty in axes[len(panels) :]:
        empty.set_axis_off()
    shape, device = result["shape"], result["device"]
    figure.suptitle(
        f"{shape['name']} ({shape['what']}), {precision(result)}, {device['name']}",
        fontsize=10,
    )
    return figure


def _first_token(axes: Axes, result: Result, part: str) -> None:
    (group,) = groups(result, part)
    names = list(group)
    values = [median(group[name]["seconds"]) for name in names]
    bars = axes.barh(
        [result["systems"][n] for n in names],
        values,
        0.6,
        color=[color(n, result["kinds"]) for n in names],
        **_BAR,
    )
    axes.bar_label(bars, fmt="%.3g s", fontsize=8, padding=2)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(values))
    axes.grid(axis="x", color=GRID)
    axes.grid(axis="y", visible=False)
    text = group[TEXT]["text"]
    axes.set_title(f"To the first token, {text} text tokens", loc="left", fontsize=9.5)


def _decoding(axes: Axes, result: Result, part: str) -> None:
    found = groups(result, part)
    names = [name for name in found[-1] if name != TEXT and parts_of(name)[1] != IDLE]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        speeds = [ratio(group[TEXT], group[name]) for group in found]
        places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(found))]
        arms: Any = (
            [s.value - s.low for s in speeds],
            [s.high - s.value for s in speeds],
        )
        axes.bar(
            places,
            [s.value for s in speeds],
            width,
            color=color(name, result["kinds"]),
            label=result["systems"][name],
            **_BAR,
        )
        axes.errorbar(
            places, [s.value for s in speeds], arms, fmt="none", ecolor="#1f2933", elinewidth=1
        )
    axes.axhline(1, color=color(TEXT, ()), lw=1, ls="--")
    axes.set_xticks(range(len(found)), [f"batch {group['text']['batch']}" for group in found])
    axes.set_ylim(0, 1.3)
    axes.set_title("Decoding speed, text only = 1", loc="left", fontsize=9.5)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left")


def _growth(axes: Axes, result: Result, part: str) -> None:
    found = groups(result, part)
    for name in (LLAVA, *(system(kind, BESIDE) for kind in result["kinds"]), TEXT):
        sizes = [group[name][part] for group in found]
        seconds = [median(group[name]["seconds"]) for group in found]
        axes.plot(
            sizes, seconds, "o-", color=color(name, result["kinds"]), label=result["systems"][name]
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    what = "visual tokens" if part == "visual" else "text tokens"
    axes.set_title(f"Connector and prefill (s) by {what}", loc="left", fontsize=9.5)
    axes.set_xlabel(what)
    axes.legend(frameon=False, fontsize=8)

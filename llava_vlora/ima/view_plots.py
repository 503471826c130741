"""Figures of the views: curves and heat maps over blocks, spectra, ablations."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import IMAError
from ..report.plots import COLORS, INK, PALETTE, new_figure
from .ablation import AblationResult, Row
from .basis import BasisResult
from .states import POINTS
from .views import Measured, same_view

#: Colours of Okabe and Ito for weight types and states, in the order in which these are drawn.
_EIGHT = (*PALETTE, INK, "#999999")
#: Width of a page in inches, on which text of figures is as large as the page's.
_PAGE = 10.4
#: Of a legend, at most.
_COLUMNS = 8
_REFERENCES = {"nothing": COLORS["vlora"], "mean image": COLORS["llava"]}
#: Group of :class:`~.ablation.Row` -> what it is.
GROUPS = {
    "whole": "Whole weights",
    "all": "All weights removed",
    "without": "One removed",
    "alone": "One kept",
    "up to": "Kept up to",
    "from": "Kept from",
    "rank": "Truncated to",
    "shared": "One for all blocks",
}


def curves(measured: Sequence[Measured]) -> Figure:
    """A panel for each quantity, a line for each weight type or state, with a band of one standard deviation.

    Raises:
        IMAError: The quantities are of several views, or there are none.
    """
    view = same_view(measured)
    figure, panels = grid(3.4, 3.0, len(measured))
    places = list(dict.fromkeys(cell.place for one in measured for cell in one.cells))
    for axes, one in zip(panels, measured, strict=True):
        for place in dict.fromkeys(cell.place for cell in one.cells):
            color = _EIGHT[places.index(place) % len(_EIGHT)]
            cells = [cell for cell in one.cells if cell.place == place]
            blocks, means = [c.block for c in cells], [c.mean for c in cells]
            spread = [c.std or 0.0 for c in cells]
            axes.plot(blocks, means, "o-", color=color, label=_title(place), lw=1.4, ms=3.5)
            low = [m - s for m, s in zip(means, spread, strict=True)]
            high = [m + s for m, s in zip(means, spread, strict=True)]
            axes.fill_between(blocks, low, high, color=color, alpha=0.12, lw=0)
        _chance_line(axes, one)
        axes.set_title(one.quantity, loc="left", fontsize=9.5)
        axes.set_xlabel("Block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel(f"{view.capitalize()} view")
    legend(figure, panels)
    return figure


#: Blocks up to which a map's cells are wide enough for upright numbers, and inches of all cells beyond.
_WIDE, _CELLS = 16, 8.5


def heat(measured: Sequence[Measured]) -> Figure:
    """A map of blocks and weight types or states for each quantity, numbers in the cells.

    Raises:
        IMAError: The quantities are of several views, or there are none.
    """
    same_view(measured)
    blocks = {cell.block for one in measured for cell in one.cells}
    places = {cell.place for one in measured for cell in one.cells}
    cells = 0.5 * len(blocks) if len(blocks) <= _WIDE else _CELLS
    width, height = cells + 1.2, (0.3 if len(blocks) <= _WIDE else 0.4) * len(places) + 1.1
    figure, panels = grid(width, height, len(measured))
    for axes, one in zip(panels, measured, strict=True):
        _heat_map(axes, one)
    return figure


def _heat_map(axes: Axes, one: Measured) -> None:
    blocks = sorted({cell.block for cell in one.cells})
    places = list(dict.fromkeys(cell.place for cell in one.cells))
    values = [[float("nan")] * len(blocks) for _ in places]
    for cell in one.cells:
        values[places.index(cell.place)][blocks.index(cell.block)] = cell.mean
    low = min(0.0, *(cell.mean for cell in one.cells))
    high = max(1.0, *(cell.mean for cell in one.cells))
    axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    for cell in one.cells:
        bright = cell.mean > low + 0.6 * (high - low)
        axes.text(
            blocks.index(cell.block),
            places.index(cell.place),
            f"{cell.mean:.2f}",
            ha="center",
            va="center",
            fontsize=7.5,
            rotation=0 if len(blocks) <= _WIDE else 90,
            color=INK if bright else "white",
        )
    levels = {round(c.chance, 3) for c in one.cells if c.chance is not None}
    chance = f"\nchance {', '.join(f'{level:g}' for level in sorted(levels))}" if levels else ""
    axes.set_title(f"{one.quantity}{chance}", loc="left", fontsize=8.5)
    axes.set_xticks(range(len(blocks)), [str(block) for block in blocks])
    axes.set_yticks(range(len(places)), [_title(place) for place in places])
    axes.set_xlabel("Block")
    axes.grid(False)


def spectra(result: BasisResult) -> Figure:
    """Singular values over the Frobenius norm: a panel for each block, a line for each weight type."""
    blocks = sorted({spectrum.block for spectrum in result.spectra})
    places = list(dict.fromkeys(spectrum.place for spectrum in result.spectra))
    figure, panels = grid(2.9, 2.7, len(blocks))
    for axes, block in zip(panels, blocks, strict=True):
        if axes is not panels[0]:
            axes.sharey(panels[0])
        for spectrum in (s for s in result.spectra if s.block == block):
            color = _EIGHT[places.index(spectrum.place) % len(_EIGHT)]
            ranks = range(1, len(spectrum.values) + 1)
            axes.plot(ranks, spectrum.values, color=color, label=spectrum.place, lw=1.4)
        axes.set_yscale("log")
        axes.set_title(f"Block {block}", loc="left", fontsize=9.5)
        axes.set_xlabel("Singular value")
    panels[0].set_ylabel("Over the Frobenius norm")
    legend(figure, panels)
    return figure


def ablations(results: Sequence[AblationResult]) -> Figure:
    """What right answers lose in log-likelihood, with 95 % intervals, and the accuracy that is left.

    Args:
        results: Of one model and the same examples, with different references.

    Raises:
        IMAError: There are no results, or they are of several views or numbers of examples.
    """
    same_view(results)
    if len({result.examples for result in results}) != 1:
        raise IMAError("Ablations over different examples cannot be drawn in one figure.")
    keys = list(dict.fromkeys((r.group, r.name) for one in results for r in one.rows[1:]))
    ticks: list[float] = []
    for i, (group, _) in enumerate(keys):
        new = i > 0 and group != keys[i - 1][0]
        ticks.append(ticks[-1] + (1.7 if new else 1) if ticks else 0.0)
    figure, panels = new_figure(10.5, 0.22 * ticks[-1] + 1.6, 2)
    height = 0.8 / len(results)
    for i, result in enumerate(results):
        own = {(r.group, r.name): r for r in result.rows[1:]}
        shown = [(tick, own[key]) for tick, key in zip(ticks, keys, strict=True) if key in own]
        places = [tick + (i - (len(results) - 1) / 2) * height for tick, _ in shown]
        _bars(panels, places, [row for _, row in shown], height, result)
    for axes in panels:
        axes.set_yticks(ticks, [name for _, name in keys], fontsize=8)
        axes.set_ylim(ticks[-1] + 0.8, -1.2)
        axes.grid(axis="x", color="#e4e7eb")
        axes.grid(False, axis="y")
    for i, (group, _) in enumerate(keys):
        if i == 0 or group != keys[i - 1][0]:
            panels[0].text(0, ticks[i] - 0.55, GROUPS[group], fontsize=7.5, color=INK, va="bottom")
    panels[0].set_xlabel("Log-likelihood of the right answer: drop")
    panels[1].set_xlabel("Right answers, %")
    panels[1].axvline(100 * results[0].rows[0].accuracy, color=INK, lw=1, ls=(0, (3, 2)),
                      label="whole weights")  # fmt: skip
    panels[1].set_yticklabels([])
    legend(figure, panels)
    return figure


def _bars(
    panels: Sequence[Axes],
    places: Sequence[float],
    rows: Sequence[Row],
    height: float,
    result: AblationResult,
) -> None:
    color = _REFERENCES.get(result.reference, _EIGHT[-1])
    label = f"{result.reference} in place of what is removed"
    drops = [row.drop for row in rows]
    panels[0].barh(places, drops, height, color=color, label=label)
    for place, row in zip(places, rows, strict=True):
        ends = [row.drop_interval.low, row.drop_interval.high]
        panels[0].plot(ends, [place, place], color=INK, lw=0.9)
    panels[1].barh(places, [100 * row.accuracy for row in rows], height, color=color)


def grid(width: float, height: float, count: int) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, as many in a row as a page has room for; a shorter last row ends early."""
    rows = -(-count // max(1, int(_PAGE // width)))
    columns = -(-count // rows)
    figure, panels = new_figure(width * columns + 0.5, height * rows + 0.4, rows * columns, rows)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def _title(place: str) -> str:
    """A state as the paper writes it; a weight type is its letter."""
    return POINTS[place].title if place in POINTS else place


def _chance_line(axes: Axes, one: Measured) -> None:
    levels = {cell.chance for cell in one.cells if cell.chance is not None}
    if len(levels) == 1:
        axes.axhline(levels.pop(), color=INK, lw=1, ls=(0, (3, 2)), label="chance")


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend above all panels, each label once."""
    shown: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    if not shown:
        return
    figure.legend(
        list(shown.values()),
        list(shown),
        loc="outside upper center",
        ncols=min(_COLUMNS, len(shown)),
        frameon=False,
    )

"""Files of an analysis: what was found as JSON, and a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import provenance
from ..evaluation.files import write_json
from ..report.plots import save
from .runs import Found, Options, curves_figures


def write_found(
    folder: Path, what: str, found: Mapping[str, Found], label: str, options: Options
) -> Iterator[str]:
    """Write ``<what>.json`` and figures; gives lines to print.

    Args:
        folder: Where to.
        what: Name of the analysis.
        found: By model.
        label: Of the figure's axis.
        options: How examples were read.
    """
    values = {name: one.values for name, one in found.items()}
    figures = {name: figure for one in found.values() for name, figure in one.figures.items()}
    figures |= curves_figures(found, label, log=what == "norms")
    drawn = {f"{what}-{name}.png": figure for name, figure in figures.items()}
    file = write_values(folder, what, values, options=asdict(options), figures=list(drawn))
    for one in found.values():
        yield from one.lines
        for name, curve in one.curves.items():
            ends = f"{curve.mean[0]:.3f} to {curve.mean[-1]:.3f}"
            yield f"{name}: mean {curve.average:.3f} over blocks {curve.layers[0]} to {curve.layers[-1]} ({ends})"
    for name, figure in drawn.items():
        path = folder / name
        save(figure, path)
        yield f"Written: {path}"
    yield f"Written: {file}"


def write_values(folder: Path, what: str, models: Any, **more: Any) -> Path:
    """Write ``<what>.json``: values, and the command, versions and commit that made them."""
    stated = {
        "what": what,
        "models": models,
        **more,
        "command": provenance.command(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }
    file = folder / f"{what}.json"
    write_json(file, stated)
    return file

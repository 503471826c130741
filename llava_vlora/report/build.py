"""From a run folder to ``report.json``, ``plots/*.png`` and ``report.html``."""

from __future__ import annotations

from ..demo.plan import RunFolder
from ..evaluation.files import write_json, write_text
from .collect import Report, collect
from .page import render_page
from .plots import accuracy_plot, cost_plot, loss_plot, released_plot, save

_PLOTS = {
    "accuracy": accuracy_plot,
    "cost": cost_plot,
    "released": released_plot,
    "loss": loss_plot,
}


def build_report(folder: RunFolder) -> Report:
    """Build the report of a finished run anew; returns what ``report.json`` holds.

    Raises:
        DataError: A file of the run is missing or damaged; the message names it.
    """
    report = collect(folder)
    plots = {name: folder.root / "plots" / f"{name}.png" for name in _PLOTS}
    for name, path in plots.items():
        save(_PLOTS[name](report), path)
    page = render_page(report, plots, folder.files.image_folder)
    write_json(folder.root / "report.json", report)
    write_text(folder.root / "report.html", page)
    return report

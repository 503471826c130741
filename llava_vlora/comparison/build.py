"""From a run folder to ``report.html``, ``comparison.{json,csv,md}``, ``plots/*.png`` and model cards."""

from __future__ import annotations

from pathlib import Path

from ..evaluation.files import require_writable, write_json, write_text
from ..report.plots import save
from .analysis import Comparison, analyse
from .outputs import model_card, to_csv, to_markdown
from .page import render_page
from .plots import category_plot, credit_plot, tradeoff, tradeoff_plot
from .results import COMPARISON, read_results


def build(folder: Path, *, seed: int = 0) -> Comparison:
    """Build everything anew from the files of a run folder; returns what ``comparison.json`` holds.

    Raises:
        DataError: A file is missing or damaged, or models were asked different questions.
        ConfigError: The folder cannot be written.
    """
    results = read_results(folder)
    require_writable(folder)
    comparison = analyse(results, seed=seed)
    files = write_plots(comparison, folder / "plots")
    write_json(folder / COMPARISON, comparison)
    write_text(folder / "comparison.csv", to_csv(comparison))
    write_text(folder / "comparison.md", to_markdown(comparison))
    for model in comparison["models"]:
        card = folder / "cards" / f"{model.replace(' ', '-')}.md"
        write_text(card, model_card(comparison, model))
    write_text(folder / "report.html", render_page(comparison, files, folder))
    return comparison


def write_plots(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Draw what there is to draw; returns the files by name."""
    plots = {}
    if any(b["scored"] for b in comparison["benchmarks"]):
        plots["credit"] = credit_plot(comparison)
    if tradeoff(comparison):
        plots["tradeoff"] = tradeoff_plot(comparison)
    for benchmark in comparison["benchmarks"]:
        if len(benchmark["categories"]) > 1:
            plots[f"types-{benchmark['name']}"] = category_plot(comparison, benchmark)
    files = {name: folder / f"{name}.png" for name in plots}
    for name, plot in plots.items():
        save(plot, files[name])
    return files

"""The demo's own figures; those of accuracy and cost are of every comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..comparison.plots import colors
from ..report.plots import new_figure

_TITLES = {"pretrain": "1. Pretraining: captions", "finetune": "2. Fine-tuning: questions"}


def loss_plot(report: Mapping[str, Any]) -> Figure:
    """Training loss of all models in both stages."""
    figure, both = new_figure(10.5, 3.2, 2)
    shown = colors(report["comparison"])
    for axes, (stage, title) in zip(both, _TITLES.items(), strict=True):
        for model, stages in report["training"].items():
            steps, losses = zip(*stages[stage]["loss"], strict=True)
            axes.plot(steps, losses, color=shown[model], label=model, lw=1.6)
        axes.set_title(title, loc="left")
        axes.set_xlabel("Step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("Loss")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    return figure

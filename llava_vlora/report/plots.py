"""The figures of a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .collect import Report

#: Colours of Okabe and Ito, told apart by colour-blind readers too.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLORS = {"llava": "#0072B2", "vlora": "#D55E00", "blind": "#999999"}
NAMES = {"llava": "LLaVA", "vlora": "VLoRA", "blind": "Blind (LLaVA without the image)"}
#: Of figures as they are saved.
DPI = 160
INK, GRID = "#1f2933", "#e4e7eb"
_PARTS = {"vision": "vision tower", "connector": "connector", "prefill": "language model"}
_PART_COLORS = {"vision": "#c3ccd5", "connector": "#E69F00", "prefill": "#56B4E9"}
_STAGE_NAMES = {"pretrain": "1. Pretraining: captions", "finetune": "2. Fine-tuning: questions"}
_STYLE: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5}


def accuracy_plot(report: Report) -> Figure:
    """Accuracy for each question type with 95 % intervals, beside chance."""
    figure, (axes,) = new_figure(10.5, 4.2, 1)
    categories = report["categories"]
    width = 0.26
    for offset, (name, rows) in enumerate(report["accuracy"].items()):
        places = [i + (offset - 1) * width for i in range(len(categories))]
        shares = [100 * rows[c]["share"] for c in categories]
        low = [100 * rows[c]["interval"]["low"] for c in categories]
        high = [100 * rows[c]["interval"]["high"] for c in categories]
        arms = (
            [s - end for s, end in zip(shares, low, strict=True)],
            [end - s for s, end in zip(shares, high, strict=True)],
        )
        axes.bar(places, shares, width, color=COLORS[name], label=NAMES[name], **_STYLE)
        axes.errorbar(places, shares, arms, fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    for i, category in enumerate(categories):
        level = 100 * report["baselines"]["chance"][category]
        label = "Chance" if i == 0 else None
        axes.plot([i - 0.45, i + 0.45], [level, level], color=INK, ls=(0, (3, 2)), label=label)
    counts = report["accuracy"]["llava"]
    axes.set_xticks(range(len(categories)), [f"{c}\nn = {counts[c]['total']}" for c in categories])
    axes.axvline(len(categories) - 1.5, color=GRID, lw=1.5)
    axes.set_ylabel("Exact match, %")
    axes.set_ylim(0, 105)
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] == "Chance")
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper center",
        ncols=4,
        frameon=False,
    )
    return figure


def loss_plot(report: Report) -> Figure:
    """Training loss of both models in both stages."""
    figure, both = new_figure(10.5, 3.2, 2)
    for axes, (stage, title) in zip(both, _STAGE_NAMES.items(), strict=True):
        for model, stages in report["training"].items():
            steps, losses = zip(*stages[stage]["loss"], strict=True)
            axes.plot(steps, losses, color=COLORS[model], label=NAMES[model], lw=1.6)
        axes.set_title(title, loc="left")
        axes.set_xlabel("Step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("Loss")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)
    return figure


def cost_plot(report: Report) -> Figure:
    """Tokens, FLOPs, times and memory of answering one question."""
    figure, axes = new_figure(10.5, 2.6, 5)
    models = report["cost"]["models"]
    memory = report["memory"]
    panels: tuple[tuple[str, Callable[[str], float]], ...] = (
        ("Tokens the LLM reads", lambda m: models[m]["sequence"]),
        ("MFLOPs, first token", lambda m: models[m]["flops"]["first_token"] / 1e6),
        ("ms, first token", lambda m: 1e3 * models[m]["time"]["first_token"]),
        ("ms, each further token", lambda m: 1e3 * models[m]["time"]["per_token"]),
        ("MiB for model and answer", lambda m: added_memory(memory[m]) / 2**20),
    )
    for panel, (title, value) in zip(axes, panels, strict=True):
        _pair_of_bars(panel, title, {model: value(model) for model in models})
    _stack_parts(axes[1], models)
    return figure


def released_plot(report: Report) -> Figure:
    """Computed FLOPs at the size of LLaVA-1.5 7B against the number of image patches."""
    figure, (axes,) = new_figure(10.5, 3.2, 1)
    rows = report["released"]["rows"]
    patches = [row["patches"] for row in rows]
    for model in ("llava", "vlora"):
        total = [row[model]["first_token"] / 1e12 for row in rows]
        axes.plot(patches, total, "o-", color=COLORS[model], label=NAMES[model])
    tower = [row["vlora"]["vision"] / 1e12 for row in rows]
    axes.plot(patches, tower, "--", color=INK, lw=1, label="Vision tower, part of both")
    axes.set_xlabel("Image patches (576: LLaVA-1.5)")
    axes.set_ylabel("TFLOPs to the first token")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def added_memory(memory: Mapping[str, int]) -> int:
    """Peak bytes that loading a model and answering add to the bare process."""
    return memory["after_answer"] - memory["before_load"]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", dpi=DPI)
    os.replace(partial, path)


def new_figure(
    width: float, height: float, panels: int, rows: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure of ``width`` by ``height`` inches with panels in rows, in the style of all reports."""
    # Without pyplot there is no global state, and no display is looked for.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, -(-panels // rows), squeeze=False).flat)
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("#9aa5b1")
        panel.grid(axis="y", color=GRID)
        panel.set_axisbelow(True)
        panel.tick_params(colors=INK, labelsize=9)
    return figure, axes


def _pair_of_bars(axes: Axes, title: str, values: Mapping[str, float]) -> None:
    models = list(values)
    axes.bar([NAMES[m] for m in models], [values[m] for m in models], 0.6,
             color=[COLORS[m] for m in models], **_STYLE)  # fmt: skip
    for i, model in enumerate(models):
        text = f"{values[model]:.3g}" if values[model] < 1000 else f"{values[model]:,.0f}"
        axes.annotate(text, (i, values[model]), ha="center", va="bottom", fontsize=9)
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_ylim(0, 1.15 * max(values.values()) or 1)


def _stack_parts(axes: Axes, models: Mapping[str, Any]) -> None:
    """Show what the FLOPs are spent on instead of one bar."""
    for bar in list(axes.patches):
        bar.remove()
    for i, flops in enumerate(model["flops"] for model in models.values()):
        bottom = 0.0
        for part, name in _PARTS.items():
            height = flops[part] / 1e6
            label = name if i == 0 else None
            axes.bar(i, height, 0.6, bottom, color=_PART_COLORS[part], label=label, **_STYLE)
            bottom += height
    axes.legend(
        fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=1
    )

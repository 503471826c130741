"""A comparison as CSV, as Markdown and as a section of a model card."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from ..evaluation.statistics import format_p
from .analysis import Comparison
from .costs import cost_table
from .findings import findings, joined

_CSV = (
    "benchmark",
    "model",
    "image",
    "metric",
    "value",
    "questions",
    "low_95",
    "high_95",
    "chance",
)


def to_csv(comparison: Comparison) -> str:
    """One line a figure: benchmark, model, with or without image, metric; intervals stand beside mean credit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for benchmark in comparison["benchmarks"]:
        for label, row in benchmark["rows"].items():
            model, see = label.removesuffix(", blind"), label not in comparison["blind"]
            place = [benchmark["name"], model, "yes" if see else "no"]
            for metric, value in row["metrics"].items():
                chance = benchmark["chance"] if metric == benchmark["headline"] else None
                writer.writerow(
                    [*place, metric, value, benchmark["questions"], "", "", _cell(chance)]
                )
            if row["credit"] is not None:
                credit = row["credit"]
                ends = credit["interval"]
                writer.writerow(
                    [*place, "mean credit", credit["mean"], benchmark["scored"], *ends, ""]
                )
    return text.getvalue()


def _cell(value: float | None) -> object:
    return "" if value is None else value


def value(figure: float) -> str:
    """A score for readers: one digit behind the point."""
    return f"{figure:.1f}"


def headline(benchmark: Mapping[str, Any], label: str) -> str:
    """The headline score of a row with its interval."""
    row = benchmark["rows"].get(label)
    if row is None:
        return ""
    if benchmark["headline"] is None:
        return "scored elsewhere"
    shown = value(row["metrics"][benchmark["headline"]])
    if row["headline_interval"] is not None:
        low, high = row["headline_interval"]
        return f"{shown} ({low:.1f} to {high:.1f})"
    # A single row may agree by chance, as a number of right answers does at 0.
    if all(_is_mean(other, benchmark["headline"]) for other in benchmark["rows"].values()):
        low, high = row["credit"]["interval"]
        shown += f" ({low:.1f} to {high:.1f})"
    return shown


def _is_mean(row: Mapping[str, Any], metric: str) -> bool:
    credit = row["credit"]
    return credit is not None and abs(credit["mean"] - row["metrics"][metric]) < 1e-6


def score_table(comparison: Comparison) -> list[list[str]]:
    """Head and lines: benchmark, metric, questions, each row's headline, chance."""
    labels = comparison["rows"]
    lines = [["Benchmark", "Metric", "Questions", *labels, "Chance"]]
    for benchmark in comparison["benchmarks"]:
        chance = benchmark["chance"]
        lines.append(
            [
                benchmark["title"],
                benchmark["headline"] or "",
                str(benchmark["questions"]),
                *(headline(benchmark, label) for label in labels),
                "" if chance is None else value(chance),
            ]
        )
    return lines


def pair_table(comparison: Comparison) -> list[list[str]]:
    """Head and lines of the paired tests between rows."""
    head = ["Benchmark", "Pair", "Points", "95 %", "p", "p, all benchmarks", "Detectable", "Test"]
    lines = [head]
    for benchmark in comparison["benchmarks"]:
        for pair in benchmark["pairs"]:
            ends, least = pair["interval"], pair["detectable"]
            lines.append(
                [
                    benchmark["title"],
                    f"{pair['first']} - {pair['second']}",
                    f"{pair['difference']:+.1f}",
                    "" if ends is None else f"{ends[0]:+.1f} to {ends[1]:+.1f}",
                    format_p(pair["p"]).removeprefix("= "),
                    format_p(pair["p_holm"]).removeprefix("= "),
                    "" if least is None else value(least),
                    pair["test"],
                ]
            )
    return lines


def contribution_table(comparison: Comparison) -> list[list[str]]:
    """Head and lines of what the image adds to the headline score, in percent of the blind one."""
    models = comparison["models"]
    lines = [["Benchmark", *models]]
    for benchmark in comparison["benchmarks"]:
        found = benchmark["contribution"]
        if found:
            cells = (f"{100 * found[m]:+.1f} %" if m in found else "" for m in models)
            lines.append([benchmark["title"], *cells])
    return lines


def markdown_table(lines: list[list[str]]) -> str:
    """A table of Markdown; the first line is its head."""
    head, *rest = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rows = [head, ["---"] * len(head), *rest]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def to_markdown(comparison: Comparison) -> str:
    """Findings and tables."""
    parts = [f"# {joined(comparison['models'] or comparison['rows'])}\n"]
    parts += ["".join(f"- {sentence}\n" for sentence in findings(comparison))]
    parts += ["## Scores\n", markdown_table(score_table(comparison))]
    parts += [
        "Headline metric of each benchmark, with the 95 % interval where it is the mean credit of the questions.\n"
    ]
    pairs, shares = pair_table(comparison), contribution_table(comparison)
    if len(pairs) > 1:
        parts += ["## Paired tests\n", markdown_table(pairs), _TESTS]
    costs = cost_table(comparison)
    if len(costs) > 1:
        parts += ["## Cost of an answer\n", markdown_table(costs)]
    if len(shares) > 1:
        parts += ["## What the image adds\n", markdown_table(shares), _ADDS]
    return "\n".join(part for part in parts if part)


_TESTS = (
    "Points of mean credit; p for no difference, once as it is and once allowing for all benchmarks (Holm); "
    "detectable: the smallest true difference that this many questions would show with 80 % power at 5 %; empty where "
    "the answers are too few or too much alike to say.\n"
)
_ADDS = "(score with image - score without) / score without, of the headline metric.\n"


def model_card(comparison: Comparison, model: str) -> str:
    """A model card's section on evaluation, for the model's README.

    Args:
        comparison: The figures.
        model: One of the models.
    """
    runs = [runs[model] for runs in comparison["runs"].values() if model in runs]
    versions = ", ".join(f"{k} {v}" for k, v in (runs[0]["versions"] or {}).items())
    metadata = "".join(_indexed(b, model) for b in comparison["benchmarks"] if model in b["rows"])
    results = f"\n{metadata}" if metadata else " []\n"
    tags = "- vlora\n" if runs[0].get("vlora") else ""
    commands = "\n".join(dict.fromkeys(str(run["command"]) for run in runs))
    return (
        f"---\npipeline_tag: image-text-to-text\ntags:\n- llava\n{tags}model-index:\n"
        f"- name: {json.dumps(model)}\n  results:{results}---\n\n# {model}\n\n## Evaluation\n\n"
        f"{markdown_table(score_table(comparison))}\n"
        f"Greedy answers, template {runs[0]['asking'].get('conv_mode')}, made with {versions} by\n\n"
        f"```bash\n{commands}\n```\n"
    )


def _indexed(benchmark: Mapping[str, Any], model: str) -> str:
    """One entry of a model index, as hubs read it."""
    metrics = "".join(
        f"    - name: {json.dumps(name)}\n      type: {json.dumps(name.lower().replace(' ', '_'))}\n"
        f"      value: {figure}\n"
        for name, figure in benchmark["rows"][model]["metrics"].items()
    )
    if not metrics:
        return ""
    return (
        "  - task:\n      type: visual-question-answering\n"
        f"    dataset:\n      name: {json.dumps(benchmark['title'])}\n      type: {benchmark['name']}\n"
        f"    metrics:\n{metrics}"
    )

"""``report.html`` of a comparison: one file that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..evaluation.files import read_rows
from ..report.markup import CSS, figure, table
from .analysis import NEARLY_BLIND, Comparison
from .costs import cost_table, in_turns, known_costs
from .disagreements import FILE
from .findings import findings, joined
from .outputs import contribution_table, headline, pair_table, value
from .plots import colors

_WIDE = """
main { max-width: 1180px; }
.scroll { overflow-x: auto; }
.scroll table { min-width: 100%; width: auto; }
.scroll td:not(:first-child) { white-space: nowrap; }
.sample td:first-child { width: auto; white-space: nowrap; padding-right: 12px; }
.sample img { object-fit: contain; background: var(--tint); }
.sample .text { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def render_page(comparison: Comparison, plots: Mapping[str, Path], folder: Path) -> str:
    """The whole page.

    Args:
        comparison: The figures.
        plots: PNG files by name, as :mod:`llava_vlora.comparison.plots` makes them.
        folder: The run folder, for disagreements and their pictures.
    """
    title = joined(comparison["models"] or comparison["rows"])
    parts = [_header(comparison, title), *sections(comparison, plots, folder), _details(comparison)]
    return whole_page(comparison, title, parts)


def sections(comparison: Comparison, plots: Mapping[str, Path], folder: Path) -> list[str]:
    """Scores, tests, costs and disagreements, for any page; arguments as of :func:`render_page`."""
    return [
        _scores(comparison, plots),
        _image(comparison),
        _pairs(comparison),
        _cost(comparison, plots),
        _categories(comparison, plots),
        _disagreements(comparison, folder),
    ]


def whole_page(comparison: Comparison, title: str, parts: Sequence[str], style: str = "") -> str:
    """Sections between head and foot; ``style`` is CSS beside that of all reports."""
    body = "\n".join(part for part in parts if part)
    css = f"{CSS}{_WIDE}{_row_colors(comparison)}{style}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n"
        f"<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def _row_colors(comparison: Comparison) -> str:
    shown = colors(comparison).values()
    return "".join(f".row{i} {{ color: {color}; }}\n" for i, color in enumerate(shown))


def row_name(comparison: Comparison, label: str) -> str:
    """A row's name in its colour."""
    return f'<b class="row{comparison["rows"].index(label)}">{escape(label)}</b>'


def _minus(text: str) -> str:
    return escape(text).replace(" -", " &minus;").replace("(-", "(&minus;")


def _lines(lines: Sequence[Sequence[str]]) -> str:
    """A table of plain text that scrolls where it is wider than the page."""
    head, *rest = lines
    cells = [[_number(c) for c in line] for line in rest]
    return f'<div class="scroll">{table(map(escape, head), cells)}</div>'


def _number(text: str) -> str:
    shown = escape(text).replace(" -", " &minus;")
    return "&minus;" + shown[1:] if shown.startswith("-") else shown


def _header(comparison: Comparison, title: str) -> str:
    count = len(comparison["benchmarks"])
    asked = sum(b["questions"] for b in comparison["benchmarks"])
    all_asked = all(set(b["rows"]) == set(comparison["rows"]) for b in comparison["benchmarks"])
    each = " to each model" if all_asked else ""
    return (
        f"<h1>{escape(title)}</h1>"
        f'<p class="soft">{count} benchmark{"s" if count != 1 else ""}, {asked:,} questions{each}; '
        f"the same prompts and greedy answers.</p>{listed_findings(comparison)}"
    )


def listed_findings(comparison: Comparison) -> str:
    """The outcome in sentences."""
    items = "".join(f"<li>{_minus(sentence)}</li>" for sentence in findings(comparison))
    return f'<ul class="findings">{items}</ul>' if items else ""


def _scores(comparison: Comparison, plots: Mapping[str, Path]) -> str:
    labels = comparison["rows"]
    head = [
        "Benchmark",
        "Metric",
        "n",
        *(row_name(comparison, label) for label in labels),
        "Chance",
    ]
    rows = []
    for benchmark in comparison["benchmarks"]:
        chance = benchmark["chance"]
        rows.append(
            [
                escape(benchmark["title"]),
                escape(benchmark["headline"] or ""),
                f"{benchmark['questions']:,}",
                *(_interval(headline(benchmark, label)) for label in labels),
                "" if chance is None else value(chance),
            ]
        )
        rows += [
            [
                "",
                escape(metric),
                "",
                *(
                    value(benchmark["rows"][label]["metrics"][metric])
                    if label in benchmark["rows"]
                    else ""
                    for label in labels
                ),
                "",
            ]
            for metric in list(next(iter(benchmark["rows"].values()))["metrics"])[1:]
        ]
    notes = "".join(
        f"<li>{escape(b['title'])}: {escape(note)}</li>"
        for b in comparison["benchmarks"]
        for note in b["notes"]
    )
    plot = (
        figure(plots["credit"], "Mean credit of a question, 95 % intervals.")
        if "credit" in plots
        else ""
    )
    return (
        "<h2>Scores</h2><p>The headline metric of each benchmark with, where it is the mean credit of its questions, "
        "a 95 % interval (Wilson, or a bootstrap over images where several questions share one). Chance: answers drawn "
        "at random.</p>"
        + plot
        + f'<div class="scroll">{table(head, rows)}</div>'
        + (f'<ul class="soft">{notes}</ul>' if notes else "")
    )


def _interval(text: str) -> str:
    figure_, bracket, rest = text.partition(" (")
    return f"{escape(figure_)} <small>[{escape(rest[:-1])}]</small>" if bracket else escape(text)


def _image(comparison: Comparison) -> str:
    lines = contribution_table(comparison)
    if len(lines) == 1:
        return ""
    blind = [b["title"] for b in comparison["benchmarks"] if b["nearly_blind"]]
    named = (
        f" Nearly blind here: {escape(', '.join(blind))}."
        if blind
        else " None is nearly blind here."
    )
    return (
        "<h2>What the image adds</h2><p>(Score with image &minus; score without) / score without, of the headline "
        f"metric. Without images answered: {escape(', '.join(comparison['blind']))}. A benchmark on which the blind "
        f"model reaches {100 * NEARLY_BLIND:.0f} % of the best score says little about seeing.{named}</p>"
        + _lines(lines)
    )


def _pairs(comparison: Comparison) -> str:
    lines = pair_table(comparison)
    if len(lines) == 1:
        return ""
    return (
        "<h2>Paired tests</h2><p>The same questions, answered by two rows: difference of mean credit in points with a "
        "95 % bootstrap interval over images; p for no difference, as it is and corrected for the number of benchmarks "
        "(Holm). Detectable: the smallest true difference that this many questions would show with 80 % power at the "
        "5 % level, given how often the two differ; empty where the answers are too few or too much alike to say.</p>"
        + _lines(lines)
    )


def _cost(comparison: Comparison, plots: Mapping[str, Path]) -> str:
    costs, (head, *rows) = known_costs(comparison), cost_table(comparison)
    if not costs:
        return ""
    first = next(iter(costs.values()))
    device = first["device"]
    name, question = str(device.get("name") or device["type"]), first["question"].splitlines()[0]
    turns = "in turns" if in_turns(comparison) else "one after the other"
    caption = "Accuracy against cost: mean over the benchmarks that all rows share."
    cells = [[escape(title), *map(_interval, values)] for title, *values in rows]
    names = [*head[:1], *(row_name(comparison, model) for model in head[1:])]
    return (
        f"<h2>Cost of an answer</h2><p>The question &ldquo;{escape(question)}&rdquo; with its image, batch of one, on "
        f"{escape(name)}. Tokens are seen in the model, FLOPs computed from its shapes. Times are medians, "
        f"fastest and slowest in brackets; the models were timed {turns}. Kept for an image: the keys and values "
        "of its tokens, or what differs between images in generated weights, which are applied unmerged.</p>"
        + (figure(plots["tradeoff"], caption) if "tradeoff" in plots else "")
        + f'<div class="scroll">{table(names, cells)}</div>'
        + f'<p class="soft">FLOPs: {escape(first["convention"])}.</p>'
    )


def _categories(comparison: Comparison, plots: Mapping[str, Path]) -> str:
    parts: list[str] = []
    labels = comparison["rows"]
    for benchmark in comparison["benchmarks"]:
        if len(benchmark["categories"]) < 2:
            continue
        rows = [
            [
                escape(name),
                f"{found['questions']:,}",
                *(value(found["rows"][x]) if x in found["rows"] else "" for x in labels),
            ]
            for name, found in benchmark["categories"].items()
        ]
        head = ["Type of question", "n", *(row_name(comparison, label) for label in labels)]
        plot = plots.get(f"types-{benchmark['name']}")
        caption = f"{benchmark['title']} by type of question, 95 % intervals."
        parts.append(
            f"<details{'' if parts else ' open'}><summary>{escape(benchmark['title'])}</summary>"
            + (figure(plot, caption) if plot else "")
            + f'<div class="scroll">{table(head, rows)}</div></details>'
        )
    if not parts:
        return ""
    return "<h2>By type of question</h2><p>Mean credit in percent.</p>" + "".join(parts)


def _disagreements(comparison: Comparison, folder: Path) -> str:
    parts: list[str] = []
    for benchmark in comparison["benchmarks"]:
        file = folder / benchmark["name"] / FILE
        if not file.is_file():
            continue
        found = read_rows(file, ("id", "prompt", "answers", "credit"))
        if not found:
            continue
        cards = [_card(comparison, row, file.parent) for row in found if row.get("shown")]
        parts.append(
            f"<details{' open' if not parts else ''}><summary>{escape(benchmark['title'])}: {len(found):,} of "
            f"{benchmark['scored']:,}, all in {escape(benchmark['name'])}/{FILE}</summary>"
            f'<div class="samples">{"".join(cards)}</div></details>'
        )
    if not parts:
        return ""
    return (
        "<h2>Where the models disagree</h2><p>Questions on which the models that see differ in credit. Shown are some "
        "of each way to disagree, drawn by chance.</p>" + "".join(parts)
    )


def _card(comparison: Comparison, row: Mapping[str, Any], folder: Path) -> str:
    data = base64.b64encode((folder / row["shown"]).read_bytes()).decode("ascii")
    answers = "".join(
        f'<tr><td>{row_name(comparison, label)}</td><td class="{"yes" if row["credit"][label] > 0 else "no"}">'
        f"{escape(text) or '(empty)'}</td></tr>"
        for label, text in row["answers"].items()
    )
    expected = (
        f"<tr><td>Expected</td><td>{escape(row['expected'])}</td></tr>" if row["expected"] else ""
    )
    return (
        f'<div class="sample"><div><img src="data:image/jpeg;base64,{data}" alt="image of question '
        f'{escape(str(row["id"]))}"><div><p class="text">{escape(row["prompt"])}</p>'
        f"<table>{expected}{answers}</table></div></div></div>"
    )


def _details(comparison: Comparison) -> str:
    commands: dict[str, None] = {}
    versions: dict[str, str] = {}
    for runs in comparison["runs"].values():
        for run in runs.values():
            commands[f"{run['command']}    # commit {run['commit'] or 'unknown'}"] = None
            for name, version in (run["versions"] or {}).items():
                known = versions.setdefault(name, version)
                if version not in known.split(", "):
                    versions[name] = f"{known}, {version}"
    models = {
        run["model"]["name"]: run["model"]
        for r in comparison["runs"].values()
        for run in r.values()
    }
    rows = [[escape(k), escape(v)] for k, v in versions.items()]
    asked = {
        json.dumps(run["asking"], sort_keys=True)
        for r in comparison["runs"].values()
        for run in r.values()
    }
    return (
        "<h2>How this was made</h2>"
        + _lines(
            [
                ["Model", "Checkpoint", "Base"],
                *([n, m["path"], m["base"] or ""] for n, m in models.items()),
            ]
        )
        + f"<p>Answers are greedy: nothing is drawn in them. Resampling has the seed {comparison['seed']}.</p>"
        + f"<details open><summary>Commands</summary><pre>{escape(chr(10).join(commands))}</pre></details>"
        + f"<details><summary>How models were asked</summary><pre>{escape(chr(10).join(sorted(asked)))}</pre></details>"
        + f"<details><summary>Versions</summary>{table(['Package', 'Version'], rows)}</details>"
    )

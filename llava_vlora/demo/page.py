"""``report.html`` of a demo, which needs nothing else: the sections of a comparison, and training, data and maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..comparison.analysis import Comparison
from ..comparison.costs import known_costs
from ..comparison.findings import joined
from ..comparison.outputs import value
from ..comparison.page import listed_findings, row_name, sections, whole_page
from ..report.markup import figure, table
from .heat import heat_uri, image_uri, peak_over_even
from .plan import RunFolder

_STYLE = """
.tiles { grid-template-columns: repeat(3, 1fr); }
.sample td:first-child { width: 1%; }
.sample .looks { display: grid; grid-template-columns: 5em repeat(4, 1fr); gap: 6px; margin-top: 10px;
                 align-items: center; font-size: 12px; }
.sample .looks img { width: 100%; height: auto; }
.sample .looks .row { display: contents; }
@media (max-width: 800px) { .tiles, .samples { grid-template-columns: 1fr 1fr; } }
@media (max-width: 700px) { .tiles, .samples { grid-template-columns: 1fr; } }
"""
#: Maps in a row; of more layers, so many are shown.
_MAPS = 4


def render_page(report: Mapping[str, Any], plots: Mapping[str, Path], folder: RunFolder) -> str:
    """The whole page.

    Args:
        report: The figures.
        plots: PNG files by name: the comparison's, and ``loss``.
        folder: The run, for images.
    """
    comparison = report["comparison"]
    title = f"{joined(comparison['models'])}, trained side by side"
    scores, *others, disagreements = sections(comparison, plots, folder.eval)
    parts = [
        _header(report, title),
        scores,
        *others,
        _samples(report, folder.files.image_folder),
        disagreements,
        _training(report, plots["loss"]),
        _data(report),
        _details(report),
    ]
    return whole_page(comparison, title, parts, _STYLE)


def _header(report: Mapping[str, Any], title: str) -> str:
    comparison, data, run = report["comparison"], report["data"], report["run"]
    costs = known_costs(comparison)

    def cost(show: Callable[[Mapping[str, Any]], str]) -> dict[str, str]:
        return {model: show(found) for model, found in costs.items()}

    main = next(b for b in comparison["benchmarks"] if b["name"] == "sceneqa")
    right = {x: f"{row['credit']['mean']:.1f} %" for x, row in main["rows"].items()}
    tiles = {
        "Right answers, SceneQA": right,
        "Tokens the language model reads": cost(lambda c: str(c["sequence"])),
        "Time to the first token": cost(lambda c: f"{1e3 * c['time']['first_token']:.1f} ms"),
        "MFLOPs to the first token": cost(lambda c: f"{c['flops']['first_token'] / 1e6:.1f}"),
        "MFLOPs of the language model": cost(lambda c: f"{c['flops']['prefill'] / 1e6:.1f}"),
        "Parameters of projector or generator": cost(lambda c: f"{c['connector']:,}"),
    }
    shown = "".join(_tile(comparison, name, values) for name, values in tiles.items())
    return (
        f"<h1>{escape(title)}</h1>"
        f'<p class="soft">SceneQA size {escape(data["size"])}, seed {run["settings"]["seed"]}: '
        f"{data['train_images']:,} training scenes, {run['recipe']['pretrain_steps']} + "
        f"{run['recipe']['finetune_steps']} steps, {data['test_images']:,} held-out scenes. Same trainer, data, base "
        "models and steps; the difference is <code>--mm_projector_type</code>. Blind is the trained LLaVA without the "
        f'image.</p><div class="tiles">{shown}</div>{listed_findings(comparison)}'
    )


def _tile(comparison: Comparison, title: str, values: Mapping[str, str]) -> str:
    rows = "".join(
        f'<div><span class="row{comparison["rows"].index(label)}">{escape(label)}</span>'
        f"{escape(text)}</div>"
        for label, text in values.items()
    )
    return f'<div class="tile"><b>{escape(title)}</b>{rows}</div>'


def _samples(report: Mapping[str, Any], images: Path) -> str:
    if not report["samples"]:
        return ""
    cards = "".join(_sample(report["comparison"], sample, images) for sample in report["samples"])
    return (
        "<h2>Answers, and where the generators look</h2><p>Drawn by chance before any answer was known, every question "
        "type in turn. The maps show the share of each image patch in the weights that a generator makes for a layer, "
        "mean over weight types: where the paper's generator attends, and the length of a patch's outer product in "
        "fast weights. Dark is nothing; below a map stands how many times an even share its brightest patch has. "
        f'Generators do not see the question.</p><div class="samples">{cards}</div>'
    )


def _sample(comparison: Comparison, sample: Mapping[str, Any], images: Path) -> str:
    path = images / sample["image"]
    answers = "".join(
        f"<tr><td>{row_name(comparison, label)}</td>"
        f'<td class="{"yes" if sample["correct"][label] else "no"}">{escape(text) or "(empty)"}</td></tr>'
        for label, text in sample["answers"].items()
    )
    looks = "".join(
        f'<div class="row"><span>{row_name(comparison, title)}</span>'
        + "".join(_map(path, layer, shares) for layer, shares in _spread(maps))
        + "</div>"
        for title, maps in sample["looks"].items()
    )
    return (
        f'<div class="sample"><div><img src="{image_uri(path)}" alt="test image"><div>'
        f"<p><b>{escape(sample['question'])}</b></p><table><tr><td>Label</td>"
        f"<td>{escape(sample['expected'])}</td></tr>{answers}</table></div></div>"
        f'<div class="looks">{looks}</div></div>'
    )


def _spread(maps: Mapping[str, list[float]]) -> list[tuple[str, list[float]]]:
    """At most so many layers as there is room for, the first and the last among them."""
    items = list(maps.items())
    if len(items) <= _MAPS:
        return items
    return [items[round(i * (len(items) - 1) / (_MAPS - 1))] for i in range(_MAPS)]


def _map(image: Path, layer: str, shares: list[float]) -> str:
    return (
        f'<figure><img src="{heat_uri(image, shares)}" alt="map of layer {layer}">'
        f"<figcaption>layer {layer}: {peak_over_even(shares):.1f}&times;</figcaption></figure>"
    )


def _training(report: Mapping[str, Any], plot: Path) -> str:
    recipe = report["run"]["recipe"]
    rows = []
    for model, stages in report["training"].items():
        for stage, part in stages.items():
            step, loss = part["loss"][-1]
            batch = recipe[f"{stage}_batch"]
            rows.append(
                [
                    f"{row_name(report['comparison'], model)}, {stage}",
                    str(step),
                    f"{loss:.3f}",
                    f"{part['seconds']:.0f} s",
                    f"{step * batch / part['seconds']:.1f}" if part["seconds"] else "",
                ]
            )
    parallel = report["run"]["settings"]["parallel"]
    note = f" {parallel} trainings at a time shared the machine." if parallel > 1 else ""
    return (
        "<h2>Training</h2><p>LLaVA's own trainer, all models on the same data with the same "
        f"seed.{note} Times include the start of the process.</p>"
        + figure(plot, "Training loss.")
        + table(["", "Steps", "Last loss", "Time", "Samples a second"], rows)
    )


def _data(report: Mapping[str, Any]) -> str:
    data = report["data"]
    levels = ("chance", "majority", "prior")
    rows = [
        [
            escape(category),
            f"{level['questions']:,}",
            *(value(100 * level[kind]) for kind in levels),
        ]
        for category, level in data["blind"].items()
    ]
    head = ["Question type", "n", "Chance", "Most frequent<br>answer", "Best guess<br>unseen"]
    return (
        f"<h2>Data</h2><p>{data['train_images']:,} rendered training scenes with a caption and "
        f"{data['train_questions']:,} questions; {data['test_images']:,} scenes that training has not seen, with "
        f"{data['test_questions']:,} questions, and once more as many scenes for POPE. What is reached without "
        "looking, in percent: a guess among the answers that the question leaves open, always the most frequent "
        "answer, and for each question the answer that its wording has most often in training.</p>"
        + table(head, rows)
    )


def _details(report: Mapping[str, Any]) -> str:
    run = report["run"]
    commands = "\n\n".join(f"# {name}\n{line}" for name, line in run["commands"].items())
    versions = "".join(
        f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in run["versions"].items()
    )
    seconds = ", ".join(f"{escape(name)} {taken:.0f} s" for name, taken in run["seconds"].items())
    whole = "" if run["resumed"] else f"All of it took {run['wall_seconds'] / 60:.1f} minutes. "
    return (
        f"<h2>How this was made</h2><p>{whole}Steps: {seconds}. Machine: "
        f"{escape(run['machine']['platform'])}, {run['machine']['cores']} cores. Commit "
        f"{escape(run['commit'] or 'not a checkout')}.</p><table><tbody>{versions}</tbody></table>"
        f"<details><summary>Commands</summary><pre>{escape(commands)}</pre></details>"
    )

"""``report.html`` of a folder that ``llava-vlora ima`` has filled: one page for many models, from the files alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..evaluation.files import read_json, require_keys, write_text
from ..report.markup import CSS, figure, table

Values = Mapping[str, Any]

_TITLES = {
    "score": "IMA score",
    "correlate": "Score against metric",
    "sim": "Perceptual and textual tokens",
    "selfsim": "Tokens and themselves some blocks later",
    "norms": "Norms of tokens",
    "vocab": "Distributions over the vocabulary",
    "tsne": "Examples in the plane",
    "ablate": "Which blocks and weight types carry the image",
    "iou": "Overlap of masks",
    "subnet": "alpha-SubNet",
    "prune-eval": "Benchmarks of pruned models",
    "skip-eval": "Benchmarks with computation skipped",
}
_NARROW = "figure { max-width: 780px; }"
_VIEWS = {
    "tokens": "the rows where the image stands in the sequence",
    "counterfactual": "the change that the image makes to each textual token, since there are no visual tokens",
}


def build(folder: Path) -> Path:
    """Write the page of what is there; returns its path.

    Raises:
        DataError: The folder has no analysis, or a file is damaged.
    """
    found = {name: folder / f"{name}.json" for name in _TITLES}
    there = {name: read_json(file) for name, file in found.items() if file.is_file()}
    if not there:
        raise DataError(
            f"{folder} has no analysis; make some with `llava-vlora ima ... --out {folder}`."
        )
    for name, stated in there.items():
        require_keys(stated, ("models", "command", "versions"), str(found[name]))
    sections = [_section(name, stated, folder) for name, stated in there.items()]
    page = folder / "report.html"
    write_text(
        page,
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Alignment inside the language model</title>\n<style>{CSS}{_NARROW}</style>\n"
        "</head>\n<body><main>\n"
        "<h1>Alignment inside the language model</h1>"
        f'<p class="soft">{_models(there)}</p>\n'
        + "\n".join(sections)
        + _details(there)
        + "\n</main></body>\n</html>\n",
    )
    return page


def _models(there: Mapping[str, Values]) -> str:
    names = dict.fromkeys(
        name for what, stated in there.items() if what in _READERS for name in stated["models"]
    )
    return escape(", ".join(names))


def _section(name: str, stated: Values, folder: Path) -> str:
    plots = sorted(folder.glob(f"{name}.png")) + sorted(folder.glob(f"{name}-*.png"))
    shown = "".join(figure(plot, f"{_TITLES[name]}: {plot.stem}") for plot in plots)
    reader = _READERS.get(name) or _LISTS.get(name)
    body = reader(stated["models"]) if reader is not None else ""
    return f"<h2>{escape(_TITLES[name])}</h2>{body}{shown}"


def _score(models: Values) -> str:
    rows, views = [], dict[str, None]()
    for model, found in models.items():
        one = found["all"]
        views[one["view"]] = None
        whole = one["whole"]
        ends = whole["interval"]
        span = "" if ends is None else f" <small>[{ends['low']:.3f}, {ends['high']:.3f}]</small>"
        rows.append(
            [
                escape(model),
                escape(one["view"]),
                escape(f"{one['sim']}, {one['pairs']} pairs, {one['perceptual_layer']} block"),
                f"{whole['score']:.3f}{span}",
                str(whole["examples"]),
            ]
        )
    said = "; ".join(f"{escape(view)}: {_VIEWS.get(view, 'another view')}" for view in views)
    warning = " Scores of different views cannot be compared." if len(views) > 1 else ""
    return f"<p>What stands for perceptual tokens: {said}.{warning}</p>" + table(
        ["Model", "View", "Measure", "Score, 95 %", "Examples"], rows
    )


def _curves(models: Values) -> str:
    """First, last and mean of every curve."""
    rows = []
    for model, sets in models.items():
        for data, curves in sets.items():
            for curve in curves:
                of = curve["of"]
                if of.get("stat", "median") != "median" or not of.get("first_token", True):
                    continue
                what = [of["kinds"], of.get("point", "x")]
                what += [f"{of['step']} apart"] if "step" in of else []
                mean = curve["mean"]
                rows.append(
                    [
                        escape(model),
                        escape(data),
                        escape(of["view"]),
                        escape(", ".join(what)),
                        f"{curve['layers'][0]} to {curve['layers'][-1]}",
                        f"{mean[0]:.3f}",
                        f"{mean[-1]:.3f}",
                        f"{sum(mean) / len(mean):.3f}",
                    ]
                )
    head = ["Model", "Data", "View", "What", "Blocks", "First", "Last", "Mean"]
    return table(head, rows)


def _vocabulary(models: Values) -> str:
    rows = []
    for model, sets in models.items():
        for data, found in sets.items():
            for layer in found["layers"]:
                words = ["&nbsp;".join(escape(w) for w, _ in side[:5]) for side in layer["words"]]
                figures = [layer["kl"], layer["js"], *layer["entropy"], layer["top_overlap"]["1"]]
                rows.append(
                    [
                        escape(f"{model}, {data}"),
                        str(layer["layer"]),
                        *("infinite" if v is None else f"{v:.3f}" for v in figures),
                        *words,
                    ]
                )
    head = ["Model, data", "Block", "KL", "JS", "Entropy P", "Entropy T", "Top-1 overlap"]
    return table([*head, "Words of P", "Words of T"], rows)


def _ablations(models: Values) -> str:
    rows = []
    for model, sets in models.items():
        for data, found in sets.items():
            for row in found["rows"]:
                ends = row["drop_interval"]
                rows.append(
                    [
                        escape(f"{model}, {data}"),
                        escape(f"{row['group']} {row['name']}"),
                        f"{row['drop']:.3f} <small>[{ends['low']:.3f}, {ends['high']:.3f}]</small>",
                        f"{100 * row['accuracy']:.1f}",
                        f"{row['flops_saved']:,.0f}",
                    ]
                )
    head = ["Model, data", "Weights", "Log-likelihood lost", "Accuracy, %", "FLOPs saved a token"]
    return table(head, rows)


def _overlap(found: Values) -> str:
    rows = [
        [escape(name), *(_share(one["mean"][key]) for key in ("iou", "chance", "normalised"))]
        for name, one in found["overlaps"].items()
    ]
    return table(["Masks", "IoU", "Chance", "Normalised"], rows)


def _share(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _subnet(found: Values) -> str:
    return (
        f"<p>{found['masks']} masks, at least {found['min_votes']} votes: "
        f"{100 * found['sparsity']:.1f} % of the linear layers' weights are pruned, "
        f"{100 * found['model_sparsity']:.1f} % of the language model; independent masks would give "
        f"{100 * found['independent_sparsity']:.1f} %.</p>"
    )


def _pruned(found: Any) -> str:
    rows = [
        [
            escape(one["name"]),
            f"{100 * one['sparsity']:.1f}",
            f"{100 * one['model_sparsity']:.1f}",
            _metrics(one),
        ]
        for one in found
    ]
    return table(["Mask", "Linear layers, %", "Language model, %", "Scores"], rows)


def _skipped(found: Any) -> str:
    rows = []
    for one in found:
        plan = one["plan"]
        what = "dense"
        if plan is not None:
            last = plan["end"] or "the last"
            what = f"{plan['kind']} of {100 * plan['ratio']:g} % of {plan['target']}, blocks {plan['start']} to {last}"
        costs = ", ".join(f"{name} {flops / 1e9:,.3g}" for name, flops in one["flops"].items())
        rows.append([escape(what), escape(costs), _metrics(one)])
    return table(["Skipped", "GFLOPs to the first token", "Scores"], rows)


def _metrics(one: Values) -> str:
    """The headline of each benchmark."""
    parts = []
    for benchmark, metrics in one["metrics"].items():
        name, value = next(iter(metrics.items()), ("", None))
        parts.append(benchmark if value is None else f"{benchmark} {name} {value:.1f}")
    return escape(", ".join(parts))


#: Analyses by model, and those that are one list.
_READERS: dict[str, Callable[[Values], str]] = {
    "score": _score,
    "sim": _curves,
    "selfsim": _curves,
    "norms": _curves,
    "vocab": _vocabulary,
    "tsne": lambda models: "",
    "ablate": _ablations,
}
_LISTS: dict[str, Callable[[Any], str]] = {
    "iou": _overlap,
    "subnet": _subnet,
    "prune-eval": _pruned,
    "skip-eval": _skipped,
    "correlate": lambda found: _correlation(found),
}


def _correlation(found: Values) -> str:
    rows = []
    for name in ("pearson", "spearman"):
        one = found[name]
        ends = one["leave_one_out"]
        rows.append(
            [
                name,
                f"{one['value']:.2f}",
                f"{one['p_value']:.3g}",
                f"{ends['low']:.2f} to {ends['high']:.2f}",
            ]
        )
    return f"<p>{len(found['names'])} models, {escape(found['metric'])}.</p>" + table(
        ["", "Coefficient", "p", "Without one model"], rows
    )


def _details(there: Mapping[str, Values]) -> str:
    commands = "\n".join(
        dict.fromkeys(
            f"{stated['command']}    # commit {stated.get('commit') or 'unknown'}"
            for stated in there.values()
        )
    )
    versions = ", ".join(f"{k} {v}" for k, v in next(iter(there.values()))["versions"].items())
    return (
        f"<h2>How this was made</h2><details open><summary>Commands</summary><pre>{escape(commands)}</pre></details>"
        f'<p class="soft">{escape(versions)}</p>'
    )

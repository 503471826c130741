"""Tables of a report: what each analysis found, as its file has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from ..report.markup import table
from .view_plots import GROUPS

Values = Mapping[str, Any]

#: Rows beyond which a table is folded, and tables of one section beyond which further ones are.
_LONG, _SHOWN = 16, 2
VIEWS = {
    "tokens": "the rows where the image stands in the sequence",
    "counterfactual": "the change that the image makes to each textual token, since there are no visual tokens",
}
#: Of ``ima views``; u is what a perceptual weight adds, W x what the module gives, X the residual stream.
_QUANTITIES = {
    "u / W x": "size of what the image adds, beside the module's output",
    "cos(u, W x)": "their cosine",
    "u / X": "size of what the image adds, beside the residual stream",
    "cos(u, X)": "their cosine",
    "Frobenius norm": "size of the perceptual weight",
    "effective rank": "directions that it uses",
    "reading": "how much the text's states lie along what it reads; 1: as along random directions",
    "writing": "how much the residual stream lies along what it writes; 1: as along random directions",
    "input overlap": "of what is read for two images; 1: the same directions",
    "output overlap": "of what is written for two images",
    "cosine": "of the weights of two images",
    "image share": "part of the weights that differs between images",
    "input overlap of blocks": "of what is read in a block and in the next one",
    "output overlap of blocks": "of what is written in a block and in the next one",
}


def number(value: float | None, digits: int = 3) -> str:
    """A number for readers; large ones with fewer digits."""
    if value is None:
        return "undefined"
    text = f"{value:.{digits}f}" if abs(value) < 100 else f"{value:,.1f}"
    return text.replace("-", "\u2212")


def _span(ends: Sequence[float] | None, digits: int = 3) -> str:
    if ends is None:
        return ""
    low, high = (number(end, digits) for end in ends)
    return f" <small>[{low}, {high}]</small>"


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1, last: int = 0
) -> str:
    """A table that scrolls where the page is narrow, folded where it is long.

    Args:
        head: Titles.
        rows: Cells, HTML already.
        texts: Columns of text at the left.
        last: Columns of text at the right.
    """
    made = f'<div class="scroll left{texts} right{last}">{table(head, rows)}</div>'
    if len(rows) <= _LONG:
        return made
    return f"<details><summary>{len(rows)} rows</summary>{made}</details>"


def _each(models: Values) -> Iterator[tuple[str, str, Any]]:
    """Model, data set, what was found."""
    for model, sets in models.items():
        for data, found in sets.items():
            yield escape(model), escape(data), found


def score(models: Values) -> str:
    """Scores with intervals, of each data set where there are several."""
    rows, seen, measures = [], dict[str, None](), dict[str, None]()
    for model, sets in models.items():
        one = sets["all"]
        seen[one["view"]] = None
        measures[f"{one['sim']}, {one['pairs']} pairs, {one['perceptual_layer']} block"] = None
        scored = {"all": one["whole"]} if len(one["data_sets"]) > 1 else {}
        for data, found in (one["data_sets"] | scored).items():
            ends = found["interval"]
            span = _span(None if ends is None else (ends["low"], ends["high"]))
            texts = map(escape, (model, data, one["view"]))
            rows.append([*texts, number(found["score"]) + span, str(found["examples"])])
    said = "; ".join(f"<b>{escape(v)}</b>, {VIEWS.get(v, 'another view')}" for v in seen)
    warning = " Scores of different views cannot be compared." if len(seen) > 1 else ""
    asked = f"<p>Measure: {escape('; '.join(measures))}. What stands for perceptual tokens: {said}.{warning}</p>"
    return asked + _table(["Model", "Data", "View", "Score, 95 %", "Examples"], rows, 3)


def curves(models: Values) -> str:
    """First, last and mean of every curve."""
    rows = []
    for model, data, found in _each(models):
        for curve in found:
            of, mean = curve["of"], curve["mean"]
            if of.get("stat", "median") != "median" or not of.get("first_token", True):
                continue
            what = [of["kinds"], of.get("point", "x")]
            what += [f"{of['step']} apart"] if "step" in of else []
            blocks = f"{curve['layers'][0]} to {curve['layers'][-1]}"
            figures = (mean[0], mean[-1], sum(mean) / len(mean))
            texts = [model, data, escape(of["view"]), escape(", ".join(what)), blocks]
            rows.append([*texts, *map(number, figures), str(curve["count"])])
    head = ["Model", "Data", "View", "What", "Blocks", "First", "Last", "Mean", "Count"]
    return _table(head, rows, 5)


def vocabulary(models: Values) -> str:
    """Divergences, entropies and the likeliest words, block by block."""
    rows = []
    for model, data, found in _each(models):
        for layer in found["layers"]:
            words = [" ".join(escape(word) for word, _ in side[:5]) for side in layer["words"]]
            figures = [layer["kl"], layer["js"], *layer["entropy"], layer["top_overlap"]["1"]]
            shown = ["infinite" if v is None else number(v) for v in figures]
            rows.append([model, data, str(layer["layer"]), *shown, *words])
    head = ["Model", "Data", "Block", "KL", "JS", "Entropy P", "Entropy T", "Top-1 overlap"]
    return _table([*head, "Words of P", "Words of T"], rows, 2, 2)


def views(models: Values) -> str:
    """Each quantity by weight type, mean over the injected blocks."""
    parts = [
        "<p>u is what a perceptual weight adds at a module, W x what the module gives anyway, X the residual stream. "
        "Means over the injected blocks, by weight type; in brackets what random directions give. One factor of every "
        "weight is shared by all images, so on its side the images overlap fully.</p>"
    ]
    for model, data, found in _each(models):
        types = list(dict.fromkeys(t for one in found["means"] for t in one["types"]))
        rows = []
        for one in found["means"]:
            cells = [_beside_chance(*one["types"].get(t, (None, None))) for t in types]
            name = one["quantity"]
            said = f"{escape(name)}<br><small>{_QUANTITIES.get(name, '')}</small>"
            rows.append([escape(one["view"]), said, *cells])
        counts = f"{found['examples']} examples, {found['overlap']['images']} images"
        made = _table(["View", "Quantity", *types], rows, 2)
        if len(parts) <= _SHOWN:
            parts.append(f"<h3>{model}, {data}</h3><p class='soft'>{counts}</p>{made}")
        else:
            parts.append(f"<details><summary>{model}, {data}: {counts}</summary>{made}</details>")
    return "".join(parts)


def _beside_chance(mean: float | None, chance: float | None) -> str:
    if mean is None:
        return ""
    beside = "" if chance is None else f" <small>({number(chance, 2)})</small>"
    return number(mean, 2) + beside


def ablations(models: Values) -> str:
    """What answers lose without parts of the perceptual weights."""
    rows = []
    for model, data, found in _each(models):
        for row in found["rows"]:
            ends = row["drop_interval"]
            what = GROUPS[row["group"]]
            what += "" if row["name"] == row["group"] else f": {row['name']}"
            lost = number(row["drop"]) + _span((ends["low"], ends["high"]))
            texts = [model, data, escape(what)]
            rows.append(
                [*texts, lost, f"{100 * row['accuracy']:.1f}", f"{row['flops_saved']:,.0f}"]
            )
    head = ["Model", "Data", "Weights", "Log-likelihood lost", "Right answers, %"]
    return _table([*head, "FLOPs saved a token"], rows, 3)


def overlap(found: Values) -> str:
    """IoU of masks, beside chance."""
    rows = [
        [escape(name), *(number(one["mean"][key]) for key in ("iou", "chance", "normalised"))]
        for name, one in found["overlaps"].items()
    ]
    return _table(["Masks", "IoU", "Chance", "Normalised"], rows)


def subnet(found: Values) -> str:
    """How sparse an alpha-SubNet is."""
    return (
        f"<p>{found['masks']} masks, at least {found['min_votes']} votes: "
        f"{100 * found['sparsity']:.1f} % of the linear layers' weights are pruned, "
        f"{100 * found['model_sparsity']:.1f} % of the language model; independent masks would give "
        f"{100 * found['independent_sparsity']:.1f} %.</p>"
    )


def pruned(found: Any) -> str:
    """Scores under masks."""
    rows = []
    for one in found:
        shares = [f"{100 * one[key]:.1f}" for key in ("sparsity", "model_sparsity")]
        rows.append([escape(one["name"]), *shares, _metrics(one)])
    return _table(["Mask", "Linear layers, %", "Language model, %", "Scores"], rows, 1, 1)


def skipped(found: Any) -> str:
    """Scores and FLOPs under plans, and of other models."""
    rows = []
    for one in found:
        what = "dense" if one["plan"] is None else plan_text(one["plan"])
        costs = ", ".join(f"{name} {flops / 1e9:,.3g}" for name, flops in one["flops"].items())
        rows.append([escape(one["model"]), escape(what), escape(costs), _metrics(one)])
    return _table(["Model", "Skipped", "GFLOPs to the first token", "Scores, 95 %"], rows, 2, 1)


def plan_text(plan: Values) -> str:
    """A plan in words."""
    last, every = plan["end"] or "the last", plan["interval"]
    steps = f", every {every}th" if every > 1 else ""
    rows = f"{100 * plan['ratio']:g} % of {plan['target']}"
    return f"{plan['kind']} of {rows}, blocks {plan['start']} to {last}{steps}"


def times(found: Values) -> str:
    """Measured time under plans."""
    rows, notes = [], dict[str, None]()
    for one in found["measured"]:
        where = one["device"]
        threads = f", threads {where['threads']}" if "threads" in where else ""
        count = f"{one['rounds']} rounds, {one['layers']} blocks, {one['dtype']}"
        notes[f"{found['name']}: {count}, {where['name']}{threads}."] = None
        for time in one["times"]:
            middle, *ends = time["ratio"]
            seconds = sorted(time["dense"])[len(time["dense"]) // 2]
            cells = [str(one["rows"]["perceptual"]), time["part"], escape(plan_text(time["plan"]))]
            cells += [number(middle, 2) + _span(ends, 2), number(time["flops_ratio"], 2)]
            rows.append([*cells, number(1e3 * seconds)])
    head = ["Visual tokens", "Part", "Skipped", "Time over dense", "FLOPs over dense", "Dense, ms"]
    notes["Time: median of the rounds, lowest and highest; FLOPs are computed."] = None
    said = "".join(f"<p class='soft'>{escape(note)}</p>" for note in notes)
    return said + _table(head, rows, 3)


def _metrics(one: Values) -> str:
    """The headline of each benchmark."""
    parts = []
    for benchmark, metrics in one["metrics"].items():
        name, value = next(iter(metrics.items()), ("", None))
        said = benchmark if value is None else f"{benchmark} {name} {value:.1f}"
        parts.append(escape(said) + _span(one.get("intervals", {}).get(benchmark), 1))
    return ", ".join(parts)


def correlation(found: Values) -> str:
    """Coefficients with what they are without one model."""
    rows = []
    for name in ("pearson", "spearman"):
        one = found[name]
        ends = one["leave_one_out"]
        without = f"{number(ends['low'], 2)} to {number(ends['high'], 2)}"
        rows.append([name, number(one["value"], 2), f"{one['p_value']:.3g}", without])
    head = ["", "Coefficient", "p", "Without one model"]
    return (
        f"<p>{len(found['names'])} models, {escape(found['score'])} and {escape(found['metric'])}.</p>"
        + _table(head, rows)
    )


def chair(models: Values) -> str:
    """Shares of what captions name and images do not show."""
    rows = []
    for model, one in models.items():
        shares = []
        for metric in ("chair_i", "chair_s"):
            ends = one[f"{metric}_interval"]
            value = None if one[metric] is None else 100 * one[metric]
            span = None if ends is None else [100 * ends["low"], 100 * ends["high"]]
            shares.append(number(value, 1) + _span(span, 1))
        rows.append([escape(model), *shares, str(one["mentions"]), str(one["captions"])])
    return _table(["Model", "CHAIR-i, %", "CHAIR-s, %", "Mentions", "Captions"], rows)


#: Analyses by model, and those that are one list.
BY_MODEL: Mapping[str, Callable[[Values], str]] = {
    "score": score,
    "sim": curves,
    "selfsim": curves,
    "norms": curves,
    "vocab": vocabulary,
    "tsne": lambda models: "",
    "views": views,
    "ablate": ablations,
    "chair": chair,
}
OTHERS: Mapping[str, Callable[[Any], str]] = {
    "iou": overlap,
    "subnet": subnet,
    "prune-eval": pruned,
    "skip-eval": skipped,
    "skip-bench": times,
    "correlate": correlation,
}

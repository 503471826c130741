"""Tables of docs/experiments.md from the results of scripts/experiments.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Result = Mapping[str, Any]
#: What a table has where nothing was measured.
NONE = "-"


def block(result: Result) -> list[str]:
    """All tables of a sweep: one an axis, then kinds of questions, ranks, steps, and what failed."""
    lines = [_introduction(result), ""]
    for axis in result["blocks"]:
        lines += [*_axis(result, axis), ""]
    lines += [*_kinds(result), "", *_growing(result, "ranks"), *_growing(result, "steps")]
    return [*lines, *_failures(result)]


def inserted(text: str, mark: str, lines: Sequence[str]) -> str:
    """A document with the lines between its marks; new marks stand at its end."""
    start, end = f"<!-- {mark}:start -->", f"<!-- {mark}:end -->"
    if start not in text:
        text += f"\n{start}\n{end}\n"
    head, _, rest = text.partition(start)
    return f"{head}{start}\n{chr(10).join(lines)}\n{end}{rest.partition(end)[2]}"


def _introduction(result: Result) -> str:
    scenes, seeds, said = result["sceneqa"], result["seeds"], result["questions"]
    size = (
        f"SceneQA `{scenes['size']}`, {scenes['train_images']} scenes to learn from, "
        if scenes
        else ""
    )
    return (
        f"`llava-vlora sweep {result['sweep']}`: {size}{said} questions, exact match, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}. [All figures](results/{result['file']}), with the flags, "
        "versions and commit of every run."
    )


def _axis(result: Result, axis: Mapping[str, Any]) -> list[str]:
    """One row a variant: accuracy and what it costs."""
    heads = ["", "accuracy, %", "95 % over questions", "steps to 90 %", "connector", "LLM FLOPs"]
    heads += ["FLOPs to the first token", "bytes an image", "s a step, stage 1 / 2"]
    lines = [f"**{axis['title']}**", "", _line(heads), _line(["---"] * len(heads))]
    for row in axis["rows"]:
        found = result["variants"][row["variant"]]
        label = f"{row['label']} (default)" if row["variant"] == axis["default"] else row["label"]
        seconds = [found["seconds_a_step"][stage] for stage in ("pretrain", "finetune")]
        cells = [
            label,
            _accuracy(found["accuracy"]),
            _interval(found["overall"]),
            _steps(found["steps_to"]),
            NONE if found["connector"] is None else f"{found['connector'] / 1e6:.3g} M",
            *_flops(found["flops"], result["variants"].get(result["reference"], {}).get("flops")),
            NONE if found["image_bytes"] is None else f"{found['image_bytes']:,}",
            " / ".join(NONE if s is None else f"{s:.3g}" for s in seconds),
        ]
        lines.append(_line(cells))
    return lines


def _accuracy(values: Sequence[float]) -> str:
    if not values:
        return NONE
    several = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{several}"


def _interval(found: Mapping[str, Any] | None) -> str:
    return NONE if found is None else "{:.1f} to {:.1f}".format(*found["interval"])


def _steps(found: Sequence[int | None]) -> str:
    """Of each seed, fewest first; those that never came so far last."""
    known = sorted(step for step in found if step is not None)
    return ", ".join([*map(str, known), *["never"] * (len(found) - len(known))]) or NONE


def _flops(own: Mapping[str, int] | None, other: Mapping[str, int] | None) -> list[str]:
    """FLOPs of the language model and of all, with their shares of the reference's."""
    if own is None:
        return [NONE, NONE]
    cells = []
    for part in ("language_model", "first_token"):
        share = f" ({own[part] / other[part]:.0%})" if other else ""
        cells.append(f"{own[part] / 1e6:,.0f} M{share}")
    return cells


def _kinds(result: Result) -> list[str]:
    """Accuracy by kind of question, with intervals over images."""
    rows = {row["variant"]: row["label"] for row in result["blocks"][0]["rows"]}
    found = {label: result["variants"][name]["by_type"] for name, label in rows.items()}
    found |= {
        f"{label}, blind": result["variants"][name]["blind_by_type"] for name, label in rows.items()
    }
    found = {label: kinds for label, kinds in found.items() if kinds}
    if not found:
        return []
    names = list(dict.fromkeys(kind for kinds in found.values() for kind in kinds))
    lines = [
        "Accuracy by kind of question, % (95 % interval over images, credit averaged over seeds):",
        "",
        _line(["", *names]),
        _line(["---"] * (len(names) + 1)),
    ]
    for label, kinds in found.items():
        cells = [
            "{:.1f} ({:.1f} to {:.1f})".format(kinds[k]["mean"], *kinds[k]["interval"])
            if k in kinds
            else NONE
            for k in names
        ]
        lines.append(_line([label, *cells]))
    return lines


def _growing(result: Result, what: str) -> list[str]:
    """Accuracy against the rank of images, or against steps of stage 2."""
    said = {
        "ranks": "Accuracy, %, where an image is cut to a rank after training:",
        "steps": "Accuracy, %, on other scenes after steps of stage 2:",
    }
    found = {
        name: [
            {row["at"]: row["accuracy"] for row in run[what]} for run in entry["runs"] if run[what]
        ]
        for name, entry in result["variants"].items()
    }
    found = {name: runs for name, runs in found.items() if runs}
    if not found:
        return []
    columns = sorted({at for runs in found.values() for run in runs for at in run})
    lines = [said[what], "", _line(["", *map(str, columns)]), _line(["---"] * (len(columns) + 1))]
    for name, runs in found.items():
        values = [[run[at] for run in runs if at in run] for at in columns]
        lines.append(_line([name, *(f"{fmean(v):.1f}" if v else NONE for v in values)]))
    return [*lines, ""]


def _failures(result: Result) -> list[str]:
    if not result["failures"]:
        return ["Every run ended."]
    return [
        "Runs that did not end, or that warned:",
        "",
        *(
            f"- {f['variant']}, seed {f['seed']}, {f['step']}: {f['reason']}"
            for f in result["failures"]
        ),
    ]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

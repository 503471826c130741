"""Tables of docs/ima.md from committed results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
MEASURED = RESULTS / "ima-sceneqa"
MINUS = "\u2212"

#: What is shown of the study; the first of each kind was chosen before any was looked at.
STUDIED = {
    "llava": (
        "tokens: median, same block, all pairs",
        "tokens: avg, same block, all pairs",
        "tokens: median, input block, all pairs",
        "order",
    ),
    "vlora": (
        "counterfactual: median, same block, all pairs",
        "basis: reading",
        "basis: effective rank",
        "basis: image share",
        "stream: cos(u, W x)",
        "order",
    ),
}


def study_block() -> list[str]:
    """Correlations of scores with accuracy and false positives, over checkpoints."""
    study = _read(RESULTS / "ima-study.json")
    lines = [
        "| | score | accuracy | its changes | false positives | their changes |",
        "|---|---|---|---|---|---|",
    ]
    for group, scores in STUDIED.items():
        told = {(c["score"], c["metric"]): c for c in study["groups"][group]["correlations"]}
        for score in scores:
            cells = [
                _rank(told[score, metric].get(part))
                for metric in ("SceneQA accuracy", "POPE false positives")
                for part in ("level", "change")
            ]
            lines.append(f"| {group} | {score} | {' | '.join(cells)} |")
    return [*lines, "", *(_corrected(name, study["groups"][name]) for name in STUDIED)]


def _corrected(name: str, group: dict[str, Any]) -> str:
    """The smallest p of all changes, times their number: Holm's correction of the first one."""
    told = [c for c in group["correlations"] if c.get("change")]
    best = min(told, key=lambda c: c["change"]["spearman"]["p_value"])
    p = min(1.0, len(told) * best["change"]["spearman"]["p_value"])
    return (
        f"Of {len(told)} pairs of a score and a metric of {name}, the changes go together best for "
        f"`{best['score']}` and {best['metric']}: p {p:.2g} after Holm's correction.  "
    )


def _rank(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    one = found["spearman"]
    sign = f"{one['value']:+.2f}".replace("-", MINUS)
    return f"{sign} (p {one['p_value']:.2g})"


def carry_block() -> list[str]:
    """What each weight type has of the image, and what answers lose without that."""
    ((_, views),) = _read(MEASURED / "views.json")["models"].items()
    ((_, ablation),) = _read(MEASURED / "ablate.json")["models"].items()
    means = {m["quantity"]: m["types"] for m in views["sceneqa"]["means"]}
    rows = {(r["group"], r["name"]): r for r in ablation["sceneqa"]["rows"]}
    lines = [
        "| weight type | image share | cosine of two images | size beside W x | log-likelihood lost | accuracy, % |",
        "|---|---|---|---|---|---|",
    ]
    for letter in means["image share"]:
        quantities = [means[q][letter][0] for q in ("image share", "cosine", "u / W x")]
        row = rows["without", letter]
        low, high = row["drop_interval"].values()
        cells = [f"{value:.2f}" for value in quantities]
        cells += [f"{row['drop']:.2f} ({low:.2f} to {high:.2f})", f"{100 * row['accuracy']:.1f}"]
        lines.append(f"| {letter} | {' | '.join(cells)} |".replace("-", MINUS))
    for group, name, label in (("whole", "whole", "all kept"), ("all", "all", "all replaced")):
        row = rows[group, name]
        lines.append(f"| {label} | | | | {row['drop']:.2f} | {100 * row['accuracy']:.1f} |")
    return lines


def prune_block() -> list[str]:
    """Overlap of two masks, and accuracy under masks."""
    (overlap,) = _read(MEASURED / "iou.json")["models"]["overlaps"].values()
    mean = overlap["mean"]
    lines = [
        f"The masks of P and T share {mean['iou']:.2f} of what either keeps (IoU); chance is {mean['chance']:.2f}.",
        "",
    ]
    lines += ["| mask | pruned, % of the linear layers | accuracy, % |", "|---|---|---|"]
    for row in _read(MEASURED / "prune-eval.json")["models"]:
        (metrics,) = row["metrics"].values()
        name = row["name"].removeprefix("llava-sceneqa-").removesuffix("-0.5")
        lines.append(f"| {name} | {100 * row['sparsity']:.0f} | {metrics['accuracy']:.1f} |")
    return lines


def skip_block() -> list[str]:
    """Accuracy and computation of LLaVA, LLaVA with skipping, and VLoRA."""
    lines = ["| | MFLOPs to the first token | accuracy, % |", "|---|---|---|"]
    for row in _read(MEASURED / "skip-eval.json")["models"]:
        plan, ((low, high),) = row["plan"], row["intervals"].values()
        what = row["model"]
        if plan is not None:
            what += f", {plan['kind']} of {100 * plan['ratio']:.0f} % of its visual tokens skipped"
        ((name, flops),) = row["flops"].items()
        value = row["metrics"][name]["accuracy"]
        lines.append(f"| {what} | {flops / 1e6:.1f} | {value:.1f} ({low:.1f} to {high:.1f}) |")
    return lines


def time_block() -> list[str]:
    """Measured time beside computed FLOPs."""
    (measured,) = _read(RESULTS / "ima-skip-1b-cpu.json")["models"]["measured"]
    lines = [
        "| visual tokens skipped | kind | time, x dense | FLOPs, x dense |",
        "|---|---|---|---|",
    ]
    for time in measured["times"]:
        plan, (middle, low, high) = time["plan"], time["ratio"]
        spread = f"{middle:.2f} ({low:.2f}-{high:.2f})"
        share = f"{100 * plan['ratio']:.0f} %"
        lines.append(f"| {share} | {plan['kind']} | {spread} | {time['flops_ratio']:.2f} |")
    return lines


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


BLOCKS: dict[str, Callable[[], list[str]]] = {
    "study": study_block,
    "carry": carry_block,
    "prune": prune_block,
    "skip": skip_block,
    "time": time_block,
}

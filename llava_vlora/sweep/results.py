"""All figures of a sweep as one JSON-like value, read from the files of its folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import provenance
from ..evaluation.files import read_json, require_keys
from ..evaluation.statistics import credit_interval
from . import state
from .plan import Run, Step, settings
from .spec import Spec

#: What ``sweep.json`` holds.
Result = dict[str, Any]

#: What a score file says that is taken over as it is.
_COPIED = ("questions", "chance", "breakdown")
#: A block in which chance alone would set a value apart more often than this has no best one.
LEVEL = 0.05


def collect(spec: Spec, runs: Sequence[Run]) -> Result:
    """What has been trained and scored so far."""
    found = {v.name: [r for r in runs if r.variant.name == v.name] for v in spec.variants}
    variants = {name: _variant(own) for name, own in found.items()}
    return {
        "file": str(spec.file),
        "command": provenance.command(),
        "settings": settings(spec),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "machine": provenance.machine(),
        "benchmarks": _benchmarks(spec, variants),
        "blocks": [
            {
                "title": block.title,
                "default": block.default,
                "rows": [{"label": r.label, "variant": r.variant} for r in block.rows],
            }
            for block in spec.blocks
        ],
        "variants": variants,
        "origins": _origins(variants),
    }


def _variant(runs: Sequence[Run]) -> dict[str, Any]:
    variant = runs[0].variant
    rows = [_run(run) for run in runs]
    summary: dict[str, dict[str, Any]] = {}
    for kind in ("evaluate", "blind"):
        scored = [row["scores"][kind] for row in rows if kind in row["scores"]]
        names = dict.fromkeys(name for scores in scored for name in scores)
        summary[kind] = {name: _summary([s[name] for s in scored if name in s]) for name in names}
    return {"place": variant.place, "flags": variant.flags, "runs": rows, "summary": summary}


def _run(run: Run) -> dict[str, Any]:
    scores = {}
    for step in run.evaluations:
        files = {b: step.score(b) for b in step.benchmarks if step.score(b).is_file()}
        scores[step.kind] = {b: _score(file) for b, file in files.items()}
    steps = {step.kind: {"log": _below(step), **state.read(step)} for step in run.steps}
    return {"seed": run.seed, "steps": steps, "scores": scores}


def _below(step: Step) -> str:
    return str(step.log.relative_to(step.root))


def _score(file: Path) -> dict[str, Any]:
    """The headline of a score file, with its interval over the questions where it is their mean credit."""
    stated = read_json(file)
    require_keys(stated, ("metrics", "samples", *_COPIED), str(file))
    metrics = dict(stated["metrics"])
    headline = next(iter(metrics), None)
    value = metrics.get(headline) if headline else None
    credit = [float(sample["credit"]) for sample in stated["samples"]]
    interval = None
    if credit and value is not None and math.isclose(value, 100 * sum(credit) / len(credit)):
        images = [s["image"] or ("no image", s["id"]) for s in stated["samples"]]
        found, _ = credit_interval(credit, images, seed=0)
        interval = [100 * found.low, 100 * found.high]
    copied = {key: stated[key] for key in _COPIED}
    return {"metric": headline, "value": value, "interval": interval, "metrics": metrics, **copied}


def _summary(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, lowest and highest of several seeds; of a single one its interval over the questions."""
    values = [s["value"] for s in scores if s["value"] is not None]
    if not values:
        return {"values": [], "mean": None, "low": None, "high": None}
    low, high = min(values), max(values)
    if len(values) == 1:
        low, high = scores[0]["interval"] or (None, None)
    return {"values": values, "mean": sum(values) / len(values), "low": low, "high": high}


def _benchmarks(spec: Spec, variants: Mapping[str, Any]) -> dict[str, Any]:
    """Title, metric and chance level of the benchmarks, from the first score of each."""
    from ..benchmarks import find

    found = {}
    for name in spec.evaluate.benchmarks:
        scores = (
            run["scores"]["evaluate"][name]
            for variant in variants.values()
            for run in variant["runs"]
            if name in run["scores"].get("evaluate", {})
        )
        score: dict[str, Any] = next(scores, {})
        stated = {key: score.get(key) for key in ("metric", "questions", "chance")}
        found[name] = {"title": find(name).title, **stated}
    return found


def _origins(variants: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The different versions and commits that the steps were made with."""
    found: list[dict[str, Any]] = []
    for variant in variants.values():
        for run in variant["runs"]:
            for step in run["steps"].values():
                origin = {"versions": step.get("versions"), "commit": step.get("commit")}
                if step.get("done") and origin not in found:
                    found.append(origin)
    return found


def best(values: Mapping[str, Sequence[float]]) -> tuple[str | None, float]:
    """The variant that stands out from the others by more than its seeds differ, and how easily chance does that.

    Args:
        values: For each variant one value a seed; more is better.

    Returns:
        The variant whose lowest value is above all values of the others; None if there is none, or if chance would
        make one too easily. And the probability that some variant stands out like that if all were alike: the ``n``
        values of a variant are the ``n`` highest of all ``N`` in one of ``N! / (n! (N - n)!)`` orders.
    """
    counts = [len(own) for own in values.values()]
    if len(counts) < 2 or min(counts) < 2:
        return None, 1.0
    luck = min(1.0, sum(1 / math.comb(sum(counts), n) for n in counts))
    name = max(values, key=lambda n: min(values[n]))
    others = [v for n, own in values.items() if n != name for v in own]
    return (name if luck <= LEVEL and min(values[name]) > max(others) else None), luck

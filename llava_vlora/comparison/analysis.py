"""All figures of a comparison as one JSON-like value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from ..evaluation.statistics import (
    Interval,
    clustered_difference,
    credit_interval,
    detectable_difference,
    holm,
    mcnemar_exact,
    paired_permutation,
)
from .results import Results, Row

#: What ``comparison.json`` holds.
Comparison = dict[str, Any]
#: A benchmark on which the blind model reaches this share of the best score says little about seeing.
NEARLY_BLIND = 0.9
LEVEL = 0.05


def analyse(results: Results, *, seed: int = 0) -> Comparison:
    """Intervals, paired tests, breakdowns and the image's contribution, from score files alone.

    Args:
        results: What the run folder holds.
        seed: Of the resampling.
    """
    benchmarks = [
        _benchmark(name, rows, results.rows, seed) for name, rows in results.scores.items()
    ]
    _correct(benchmarks)
    labels = [row.label for row in results.rows]
    return {
        "rows": labels,
        "models": [row.name for row in results.rows if row.see],
        "blind": [row.label for row in results.rows if not row.see],
        "seed": seed,
        "benchmarks": benchmarks,
        "costs": results.costs,
        "runs": {
            name: {
                row.label: {
                    k: stated.get(k) for k in ("model", "vlora", "asking", "command", "commit")
                }
                | {k: stated.get(k) for k in ("versions", "machine", "run", "limit")}
                for row, stated in rows.items()
            }
            for name, rows in results.scores.items()
        },
        "plan": results.plan,
    }


def _benchmark(
    name: str, scores: Mapping[Row, Mapping[str, Any]], order: Sequence[Row], seed: int
) -> dict[str, Any]:
    rows = [row for row in order if row in scores]
    stated = scores[rows[0]]
    samples = stated["samples"]
    clusters = [s["image"] or ("no image", s["id"]) for s in samples]
    credit = {row: [float(s["credit"]) for s in scores[row]["samples"]] for row in rows}
    headline = next(iter(stated["metrics"]), None)
    contribution = _contribution(scores, rows, headline)
    return {
        "name": name,
        "title": stated["title"],
        "citation": stated.get("citation", ""),
        "questions": stated["questions"],
        "scored": len(samples),
        "images": len(set(clusters)),
        "headline": headline,
        "chance": stated["chance"],
        "notes": list(dict.fromkeys(n for row in rows for n in scores[row].get("notes", []))),
        "rows": {
            row.label: {
                "metrics": dict(scores[row]["metrics"]),
                "headline_interval": scores[row].get("headline_interval"),
                "credit": mean_credit(credit[row], clusters, seed) if samples else None,
            }
            for row in rows
        },
        "contribution": contribution,
        "nearly_blind": bool(contribution) and 1 + max(contribution.values()) <= 1 / NEARLY_BLIND,
        "pairs": [
            _pair(a, b, credit[a], credit[b], clusters, seed)
            for a, b in combinations(rows, 2)
            if samples
        ],
        "categories": _categories(samples, credit, clusters, seed),
        "disagreements": _disagreements(credit) if samples else 0,
    }


def _contribution(
    scores: Mapping[Row, Mapping[str, Any]], rows: Sequence[Row], headline: str | None
) -> dict[str, float]:
    """(with - blind) / blind of the headline: against the model's own blind row, else the only one there is."""
    blind = {row.model: scores[row]["metrics"] for row in rows if not row.see}
    found = {}
    for row in rows:
        other = blind.get(row.model) or (next(iter(blind.values())) if len(blind) == 1 else None)
        if row.see and headline is not None and other and other[headline] > 0:
            found[row.label] = scores[row]["metrics"][headline] / other[headline] - 1
    return found


def _binary(values: Sequence[float]) -> bool:
    return set(values) <= {0.0, 1.0}


def _alone(clusters: Sequence[object]) -> bool:
    return len(set(clusters)) == len(clusters)


def mean_credit(values: Sequence[float], clusters: Sequence[Any], seed: int) -> dict[str, Any]:
    """Mean credit with a 95 % interval, in percent."""
    interval, method = credit_interval(values, clusters, seed=seed)
    mean = 100 * sum(values) / len(values)
    return {"mean": mean, "interval": _percent(interval), "method": method}


def _percent(interval: Interval) -> list[float]:
    return [100 * interval.low, 100 * interval.high]


def _pair(
    a: Row,
    b: Row,
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Any],
    seed: int,
) -> dict[str, Any]:
    """Two rows on the same questions, in points of mean credit."""
    exact = _binary([*first, *second]) and _alone(clusters)
    if exact:
        p = mcnemar_exact([x > 0 for x in first], [x > 0 for x in second]).p_value
    else:
        p = paired_permutation(first, second, clusters, seed=seed)
    interval = _percent(clustered_difference(first, second, clusters, seed=seed))
    detectable = detectable_difference(first, second, clusters)
    return {
        "first": a.label,
        "second": b.label,
        "difference": 100 * (sum(first) - sum(second)) / len(first),
        # With few images, or all of them alike, resampling would promise too much.
        "interval": None if detectable is None else interval,
        "test": "exact McNemar" if exact else "permutation of images",
        "p": p,
        "first_better": sum(x > y for x, y in zip(first, second, strict=True)),
        "second_better": sum(x < y for x, y in zip(first, second, strict=True)),
        "detectable": None if detectable is None else 100 * detectable,
    }


def _correct(benchmarks: Sequence[dict[str, Any]]) -> None:
    """Add p-values that allow for one test a benchmark, for each pair of rows."""
    tests: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for benchmark in benchmarks:
        for pair in benchmark["pairs"]:
            tests.setdefault((pair["first"], pair["second"]), []).append(pair)
    for pairs in tests.values():
        for pair, p in zip(pairs, holm([pair["p"] for pair in pairs]), strict=True):
            pair["p_holm"] = p


def _categories(
    samples: Sequence[Mapping[str, Any]],
    credit: Mapping[Row, Sequence[float]],
    clusters: Sequence[Any],
    seed: int,
) -> dict[str, Any]:
    """Questions, mean credit in percent and its 95 % interval of each type of question."""
    places: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        if sample["category"]:
            places.setdefault(sample["category"], []).append(i)
    found = {}
    for name, chosen in places.items():
        shared = [clusters[i] for i in chosen]
        means = {
            row.label: mean_credit([values[i] for i in chosen], shared, seed)
            for row, values in credit.items()
        }
        found[name] = {
            "questions": len(chosen),
            "rows": {label: mean["mean"] for label, mean in means.items()},
            "intervals": {label: mean["interval"] for label, mean in means.items()},
        }
    return found


def _disagreements(credit: Mapping[Row, Sequence[float]]) -> int:
    """Questions that not all rows with images answer equally well."""
    seeing = [values for row, values in credit.items() if row.see]
    return sum(len(set(found)) > 1 for found in zip(*seeing, strict=True))

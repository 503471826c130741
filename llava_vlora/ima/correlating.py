"""Scores of models beside a metric of theirs, from files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from ..comparison.results import read_results
from ..errors import DataError, IMAError, VLoRAError, listing
from ..evaluation.files import read_json
from ..report.plots import save
from .chair_files import chair_metrics
from .correlation import correlate
from .plots import score_plot
from .writing import write_values


def correlate_files(scores: str, metrics: str, out: Path, *, seed: int = 0) -> str:
    """Write ``correlate.json`` and ``correlate.png``; returns the outcome in a sentence.

    Args:
        scores: ``score.json`` of ``ima score``, an object of model -> number, or ``views.json:QUANTITY`` of ``ima
            views``, of which the mean over blocks, weight types and data sets is taken.
        metrics: An object of model -> number; ``FOLDER:BENCHMARK`` of ``llava-vlora eval``, or
            ``FOLDER:BENCHMARK:METRIC`` for another figure than its first one, also of one type of question; or
            ``chair.json:METRIC`` of ``ima chair``.
        out: Folder.
        seed: Of sampled permutations.

    Raises:
        DataError: A file is missing or holds something else.
        IMAError: Scores are of different views, or there are fewer than 4 models.
    """
    (own, label), (theirs, name) = _scores(scores), _metrics(metrics)
    shared = {model: theirs[model] for model in own if model in theirs}
    lost = [model for model in own if model not in theirs]
    if lost:
        raise DataError(f"{metrics} has no figure of {listing(lost)}.")
    found = correlate(own, shared, seed=seed)
    write_values(out, "correlate", {"score": label, "metric": name, **asdict(found)})
    save(score_plot(own, shared, found, score=label, metric=name), out / "correlate.png")
    low, high = found.spearman.leave_one_out.low, found.spearman.leave_one_out.high
    return (
        f"{len(own)} models, {name}: Pearson {found.pearson.value:.2f} (p {found.pearson.p_value:.3g}), Spearman "
        f"{found.spearman.value:.2f} (p {found.spearman.p_value:.3g}; {low:.2f} to {high:.2f} without one model)"
    )


def _scores(text: str) -> tuple[dict[str, float], str]:
    """Scores by model, and what they are."""
    file, quantity = _file(text)
    try:
        return _read_scores(read_json(file), file, quantity)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, VLoRAError):
            raise
        raise DataError(
            f"{file} is not what this version writes ({error!r}); make it again."
        ) from error


def _read_scores(read: Any, file: Path, quantity: str) -> tuple[dict[str, float], str]:
    what = read.get("what") if isinstance(read, dict) else None
    if what == "views":
        return _of_views(read["models"], quantity, file), quantity
    if quantity:
        raise DataError(
            f"{file} is not of `ima views`, which alone has quantities, such as {quantity!r}."
        )
    if what == "score":
        models = {name: found["all"] for name, found in read["models"].items()}
        views = {found["view"] for found in models.values()}
        if len(views) > 1:
            raise IMAError(
                f"{file} has scores of the views {listing(sorted(views))}, which cannot be compared; score LLaVA and "
                "VLoRA models apart."
            )
        return {n: float(found["whole"]["score"]) for n, found in models.items()}, "IMA score"
    return _numbers(read, file), "IMA score" if file.stem == "scores" else file.stem


def _file(text: str) -> tuple[Path, str]:
    """A file and what is wanted of it."""
    name, colon, part = text.rpartition(":")
    if colon and Path(name).is_file() and not Path(text).is_file():
        return Path(name), part
    return Path(text), ""


def _of_views(models: Mapping[str, Any], quantity: str, file: Path) -> dict[str, float]:
    found = {}
    for name, sets in models.items():
        means = []
        for one in sets.values():
            types = {m["quantity"]: m["types"] for m in one["means"]}
            if quantity not in types:
                raise DataError(
                    f"{file} has no {quantity!r} of {name}; give {file.name}:QUANTITY with one of {listing(types)}."
                )
            means.append(fmean(mean for mean, _ in types[quantity].values()))
        found[name] = fmean(means)
    return found


def _metrics(text: str) -> tuple[dict[str, float], str]:
    """Figures by model, and what they are."""
    file, part = _file(text)
    if part:
        found = {name: own.get(part) for name, own in chair_metrics(file).items()}
        lost = [name for name, figure in found.items() if figure is None]
        if lost:
            raise DataError(f"{file} has no {part!r} of {listing(lost)}.")
        return {name: figure for name, figure in found.items() if figure is not None}, part
    if file.is_file():
        return _numbers(read_json(file), file), file.stem
    folder, benchmark, metric = _parts(text)
    results = read_results(folder)
    if benchmark not in results.scores:
        raise DataError(
            f"{folder} has no scores of {benchmark!r}; it has {listing(results.scores)}."
        )
    rows = {r.model: s for r, s in results.scores[benchmark].items() if r.see}
    there = {name: {**s["breakdown"], **s["metrics"]} for name, s in rows.items()}
    metric = metric or next(iter(next(iter(rows.values()))["metrics"]))
    for name, figures in there.items():
        if metric not in figures:
            raise DataError(
                f"{folder} has no {metric!r} of {name} on {benchmark}; there is {listing(figures)}."
            )
    return {name: figures[metric] for name, figures in there.items()}, f"{benchmark}, {metric}"


def _parts(text: str) -> tuple[Path, str, str]:
    """Folder, benchmark and metric; a folder's name may hold colons."""
    before, _, last = text.rpartition(":")
    folder, _, benchmark = before.rpartition(":")
    if folder and Path(folder).is_dir() and not Path(before).is_dir():
        return Path(folder), benchmark, last
    if not before:
        raise DataError(f"{text} is no file; give one, or FOLDER:BENCHMARK of `llava-vlora eval`.")
    return Path(before), last, ""


def _numbers(read: object, file: Path) -> dict[str, float]:
    if not isinstance(read, dict) or not all(isinstance(v, int | float) for v in read.values()):
        raise DataError(f"{file} is no object of model -> number.")
    return {str(name): float(value) for name, value in read.items()}

"""Scores of models beside a metric of theirs, from files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ..comparison.results import read_results
from ..errors import DataError, IMAError, listing
from ..evaluation.files import read_json
from ..report.plots import save
from .correlation import correlate
from .plots import score_plot
from .writing import write_values


def correlate_files(scores: Path, metrics: str, out: Path, *, seed: int = 0) -> str:
    """Write ``correlate.json`` and ``correlate.png``; returns the outcome in a sentence.

    Args:
        scores: ``score.json`` of ``ima score``, or an object of model -> number.
        metrics: Such an object, or ``FOLDER:BENCHMARK`` of ``llava-vlora eval``; ``FOLDER:BENCHMARK:METRIC`` for
            another figure than its first one, also of one type of question.
        out: Folder.
        seed: Of sampled permutations.

    Raises:
        DataError: A file is missing or holds something else.
        IMAError: Scores are of different views, or there are fewer than 4 models.
    """
    own, theirs, name = _scores(scores), *_metrics(metrics)
    shared = {model: theirs[model] for model in own if model in theirs}
    lost = [model for model in own if model not in theirs]
    if lost:
        raise DataError(f"{metrics} has no figure of {listing(lost)}.")
    found = correlate(own, shared, seed=seed)
    write_values(out, "correlate", {"metric": name, **asdict(found)})
    save(score_plot(own, shared, found, metric=name), out / "correlate.png")
    low, high = found.spearman.leave_one_out.low, found.spearman.leave_one_out.high
    return (
        f"{len(own)} models, {name}: Pearson {found.pearson.value:.2f} (p {found.pearson.p_value:.3g}), Spearman "
        f"{found.spearman.value:.2f} (p {found.spearman.p_value:.3g}; {low:.2f} to {high:.2f} without one model)"
    )


def _scores(file: Path) -> dict[str, float]:
    read = read_json(file)
    if isinstance(read, dict) and read.get("what") == "score":
        models = {name: found["all"] for name, found in read["models"].items()}
        views = {found["view"] for found in models.values()}
        if len(views) > 1:
            raise IMAError(
                f"{file} has scores of the views {listing(sorted(views))}, which cannot be compared; score LLaVA and "
                "VLoRA models apart."
            )
        return {name: float(found["whole"]["score"]) for name, found in models.items()}
    return _numbers(read, file)


def _metrics(text: str) -> tuple[dict[str, float], str]:
    """Figures by model, and what they are."""
    if Path(text).is_file():
        return _numbers(read_json(Path(text)), Path(text)), Path(text).stem
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

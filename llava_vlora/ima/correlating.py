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
        metrics: Such an object, or ``FOLDER:BENCHMARK`` of ``llava-vlora eval``.
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
    folder, colon, benchmark = text.rpartition(":")
    if not colon:
        return _numbers(read_json(Path(text)), Path(text)), Path(text).stem
    results = read_results(Path(folder))
    if benchmark not in results.scores:
        raise DataError(
            f"{folder} has no scores of {benchmark!r}; it has {listing(results.scores)}."
        )
    rows = results.scores[benchmark]
    metric = next(iter(next(iter(rows.values()))["metrics"]))
    return {
        r.model: s["metrics"][metric] for r, s in rows.items() if r.see
    }, f"{benchmark}, {metric}"


def _numbers(read: object, file: Path) -> dict[str, float]:
    if not isinstance(read, dict) or not all(isinstance(v, int | float) for v in read.values()):
        raise DataError(f"{file} is no object of model -> number.")
    return {str(name): float(value) for name, value in read.items()}

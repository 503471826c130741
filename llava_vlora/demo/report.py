"""The report of a demo: the comparison of its models, and what is the demo's own, from the files of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..comparison.build import build
from ..comparison.results import Row, read_results
from ..errors import DataError, listing
from ..evaluation.files import read_json, write_json, write_text
from ..report.plots import save
from .page import render_page
from .pipeline import LAYOUT
from .plan import STAGES, RunFolder
from .plots import loss_plot

#: A report: what ``report.json`` holds.
Report = dict[str, Any]
#: The benchmark of the samples.
_SAMPLED = "sceneqa"


def build_report(folder: RunFolder) -> Report:
    """Build the report of a finished run anew; returns what ``report.json`` holds.

    Raises:
        DataError: The run is of an older demo, or a file of it is missing or damaged; the message names it.
    """
    report = collect(folder)
    plots = {path.stem: path for path in (folder.eval / "plots").glob("*.png")}
    plots["loss"] = folder.root / "plots" / "loss.png"
    save(loss_plot(report), plots["loss"])
    page = render_page(report, plots, folder)
    write_json(folder.root / "report.json", report)
    write_text(folder.root / "report.html", page)
    return report


def collect(folder: RunFolder) -> Report:
    """Everything about a finished run; errors as of :func:`build_report`."""
    run = read_json(folder.run, "`llava-vlora demo` writes it")
    if run.get("layout") != LAYOUT:
        raise DataError(
            f"{folder.root} is a run of an older demo, which this version cannot read; run "
            f"`llava-vlora demo --out {folder.root}` again."
        )
    comparison = build(folder.eval, seed=run["settings"]["seed"])
    missing = [m["title"] for m in run["models"] if m["title"] not in comparison["costs"]]
    if missing:
        raise DataError(
            f"{folder.root} is not finished: nothing is known of what answers of {listing(missing)} cost. "
            f"`llava-vlora demo --out {folder.root}` goes on."
        )
    return {
        "run": run,
        "data": read_json(folder.files.statistics),
        "comparison": comparison,
        "training": {
            m["title"]: _training(folder, m["name"], run["seconds"]) for m in run["models"]
        },
        "samples": _samples(folder, {m["name"]: m["title"] for m in run["models"]}),
    }


def is_demo(folder: Path) -> bool:
    """Whether a folder is a demo's, of any version."""
    file = RunFolder(folder).run
    return file.is_file() and "recipe" in read_json(file)


def _training(folder: RunFolder, model: str, seconds: dict[str, float]) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    for stage in STAGES:
        history = read_json(folder.checkpoint(model, stage) / "trainer_state.json")["log_history"]
        stages[stage] = {
            "loss": [[row["step"], row["loss"]] for row in history if "loss" in row],
            "seconds": seconds[f"{stage} {model}"],
        }
    return stages


def _samples(folder: RunFolder, titles: dict[str, str]) -> list[dict[str, Any]]:
    """Questions with all answers, and where each generator looked."""
    results = read_results(folder.eval)
    scores = results.scores[_SAMPLED]
    looks = {
        titles[name]: read_json(folder.look(name)) for name in titles if folder.look(name).is_file()
    }
    known = {row: {str(s["id"]): s for s in stated["samples"]} for row, stated in scores.items()}
    answers = {row: results.answers(_SAMPLED, row) for row in scores}
    rows: list[Row] = sorted(scores, key=results.rows.index)
    found = []
    for number, name in enumerate(next(iter(looks.values()))["samples"] if looks else ()):
        key = str(name)
        sample = known[rows[0]][key]
        found.append(
            {
                "id": name,
                "image": sample["image"],
                "category": sample["category"],
                "question": answers[rows[0]][key]["prompt"].splitlines()[0],
                "expected": sample["expected"],
                "answers": {row.label: answers[row][key]["text"] for row in rows},
                "correct": {row.label: known[row][key]["credit"] > 0 for row in rows},
                "looks": {
                    title: dict(zip(map(str, look["layers"]), look["maps"][number], strict=True))
                    for title, look in looks.items()
                },
            }
        )
    return found

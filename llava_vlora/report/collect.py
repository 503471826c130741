"""All figures of a demo run as one JSON-like value, read from the files of its folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..config import VLoRAConfig
from ..demo.plan import ANSWERS, PROJECTORS, STAGES, RunFolder
from ..evaluation.cost import CLIP_L_336, VICUNA_7B, VisionShape, answer_cost
from ..evaluation.files import Question, read_answers, read_json, read_questions
from ..evaluation.scoring import OVERALL, Accuracy, accuracies, comparisons, is_correct

#: A report: what ``report.json`` holds.
Report = dict[str, Any]

#: Image sides in pixels for which the cost at the released size is computed; 336 is LLaVA-1.5's.
_RELEASED_SIDES = (112, 224, 336, 448, 560, 672)
_RELEASED_TEXT = 64


def collect(folder: RunFolder) -> Report:
    """Read and score a finished run.

    Raises:
        DataError: A file is missing or damaged; the message names it.
    """
    run = read_json(folder.run)
    statistics = read_json(folder.files.statistics)
    questions = read_questions(folder.files.test_questions)
    ids = [question.id for question in questions]
    labels = [
        str(row["label"]) for row in read_answers(folder.files.test_answers, ids, key="label")
    ]
    texts = {
        name: [str(row["text"]) for row in read_answers(folder.answers(name), ids)]
        for name in ANSWERS
    }
    hits = {name: is_correct(labels, texts[name]) for name in ANSWERS}
    found = {name: accuracies(questions, hits[name]) for name in ANSWERS}
    pairs = comparisons(questions, hits, seed=run["settings"]["seed"])
    return {
        "run": run,
        "data": statistics,
        "categories": [*statistics["blind"], OVERALL],
        "accuracy": {name: _accuracy_rows(rows) for name, rows in found.items()},
        "baselines": {kind: _baseline(statistics, kind) for kind in ("chance", "prior")},
        "comparisons": [asdict(pair) for pair in pairs],
        "pope": read_json(folder.pope),
        "batch_check": {
            name: read_json(folder.answers(name).with_suffix(".check.json")) for name in ANSWERS
        },
        "training": {model: _training(folder, model) for model in PROJECTORS},
        "cost": read_json(folder.measurements),
        "memory": {model: read_json(folder.memory(model)) for model in PROJECTORS},
        "released": _released(),
        "samples": _samples(folder, questions, labels, texts, hits),
    }


def _accuracy_rows(rows: dict[str, Accuracy]) -> dict[str, Any]:
    return {category: asdict(row) | {"share": row.share} for category, row in rows.items()}


def _baseline(statistics: dict[str, Any], kind: str) -> dict[str, float]:
    """What is reached without the image, by category and weighted over all questions."""
    levels = {category: level[kind] for category, level in statistics["blind"].items()}
    counts = {category: level["questions"] for category, level in statistics["blind"].items()}
    expected = sum(levels[category] * counts[category] for category in levels)
    return levels | {OVERALL: expected / sum(counts.values())}


def _training(folder: RunFolder, model: str) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    for stage in STAGES:
        history = read_json(folder.checkpoint(model, stage) / "trainer_state.json")["log_history"]
        stages[stage] = {
            "loss": [[row["step"], row["loss"]] for row in history if "loss" in row],
            "seconds": history[-1].get("train_runtime"),
            "samples_per_second": history[-1].get("train_samples_per_second"),
        }
    return stages


def _released() -> dict[str, Any]:
    """FLOPs at the size of the released models, by the formulas that the demo's size uses."""
    rows = []
    for side in _RELEASED_SIDES:
        vision = VisionShape(
            CLIP_L_336.width, CLIP_L_336.layers, CLIP_L_336.mlp, side, CLIP_L_336.patch
        )
        row: dict[str, Any] = {"patches": vision.patches}
        for model, settings in (("llava", None), ("vlora", VLoRAConfig())):
            cost = answer_cost(vision, VICUNA_7B, _RELEASED_TEXT, settings)
            row[model] = asdict(cost) | {"first_token": cost.first_token}
        rows.append(row)
    return {"text_tokens": _RELEASED_TEXT, "rows": rows}


def _samples(
    folder: RunFolder,
    questions: list[Question],
    labels: list[str],
    texts: dict[str, list[str]],
    hits: dict[str, list[bool]],
) -> dict[str, Any]:
    looks = read_json(folder.looks)
    rank = {question.id: i for i, question in enumerate(questions)}
    rows = []
    for sample in looks["samples"]:
        i = rank[sample["question_id"]]
        rows.append(
            {
                "question_id": questions[i].id,
                "image": questions[i].image,
                "category": questions[i].category,
                "question": questions[i].text,
                "label": labels[i],
                "answers": {name: texts[name][i] for name in texts},
                "correct": {name: hits[name][i] for name in hits},
                "look": sample["look"],
            }
        )
    return {"types": looks["types"], "layers": looks["layers"], "rows": rows}


def findings(report: Report) -> list[str]:
    """The outcome in sentences that follow from the figures alone, whichever way they fall."""
    names = {"llava": "LLaVA", "vlora": "VLoRA", "blind": "the blind baseline"}
    total = report["accuracy"]["llava"][OVERALL]["total"]
    sentences = []
    for pair in report["comparisons"]:
        first, second = names[pair["first"]], names[pair["second"]]
        points, low, high = (
            100 * value
            for value in (pair["difference"], pair["interval"]["low"], pair["interval"]["high"])
        )
        p = pair["test"]["p_value"]
        clear = p < 0.05 and not low <= 0 <= high
        verdict = "no clear difference"
        if clear:
            verdict = f"{first} is better" if points > 0 else f"{second} is better"
        sentences.append(
            f"{first} against {second}, {total} questions: {points:+.1f} points "
            f"(95 % {low:+.1f} to {high:+.1f}, exact McNemar p {format_p(p)}): {verdict}."
        )
    models = report["cost"]["models"]
    llava, vlora = models["llava"], models["vlora"]
    tokens = f"{vlora['sequence']} tokens instead of {llava['sequence']}"
    flops = vlora["flops"]["first_token"] / llava["flops"]["first_token"]
    seconds = vlora["time"]["first_token"] / llava["time"]["first_token"]
    sentences.append(
        f"At this size VLoRA's language model reads {tokens}; up to the first token VLoRA needs "
        f"{flops:.2f} times LLaVA's FLOPs and {seconds:.2f} times its time."
    )
    row = next(r for r in report["released"]["rows"] if r["patches"] == CLIP_L_336.patches)
    share = row["vlora"]["first_token"] / row["llava"]["first_token"]
    sentences.append(
        f"Computed by the same formulas for LLaVA-1.5 7B ({row['patches']} patches, "
        f"{report['released']['text_tokens']} text tokens): {share:.2f} times LLaVA's FLOPs."
    )
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def format_p(p: float) -> str:
    """A p-value for readers: never an exact zero."""
    return "< 0.0001" if p < 0.0001 else f"= {p:.4f}" if p < 0.01 else f"= {p:.2f}"
